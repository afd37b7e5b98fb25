"""Checkpoints that are whole or absent: written aside, synced, digested, renamed; the newest good one is resumed.

    OUTPUT_DIR/checkpoint-STEP/
        unet.pth                            float32 state dict of the policy (or pytorch_lora_weights.safetensors)
        optimizer.bin, random_states_N.pkl  what resuming needs, as accelerate writes it (FSDP, DeepSpeed: their shards)
        progress.json                       step, learning-rate schedule, counts, the settings the run was made with
        manifest.json                       size and SHA-256 of every file above
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from accelerate.utils import load as load_plain
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from training.options import TrainArguments
from common.errors import UserError, first_line, printable, warn
from common.locks import hold
from models.weights import LORA_FILE, load_strictly, load_unet, merge_lora, read_state_dict

MANIFEST, PROGRESS, RUN_FILE = "manifest.json", "progress.json", "run.json"

# What a run leaves in output_dir, besides the pipeline around its UNet, which the next result replaces whole.
RUN_OUTPUTS = ("checkpoint-*", RUN_FILE, "metrics.jsonl", "bad_data.jsonl", "nonfinite.jsonl", "unet.pth", LORA_FILE,
               "validation", "logs")

# Settings that may change between a run and its continuation without changing what is learned from which pair.
FREE_SETTINGS = {
    "cache_dir", "dataloader_num_workers", "max_train_steps", "num_train_epochs", "output_dir", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "allow_changed_resume", "hard_skip_resume", "logging_dir",
    "report_to", "tracker_project_name", "validation_prompts", "validation_steps", "validation_guidance",
    "validation_inference_steps", "push_to_hub", "hub_model_id", "local_rank",
    "gradient_checkpointing", "selective_checkpointing", "metrics_config", "max_bad_fraction", "max_nonfinite_steps",
    "watch_winner_rise", "watch_margin", "process_timeout", "cached_dataset", "compile",
    "channels_last", "offload_reference",
}


# --- files ---------------------------------------------------------------------------------------------------------

def sync(path: Path) -> None:
    """Force a file's, or a folder's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small text file so that it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)


def save_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a state dict so that it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    torch.save(state, aside)
    sync(aside)
    aside.replace(path)


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)

    def describe(path: Path) -> dict:
        sync(path)
        return {"bytes": path.stat().st_size, "sha256": digest(path)}

    with ThreadPoolExecutor() as pool:
        entries = dict(zip((path.relative_to(folder).as_posix() for path in files), pool.map(describe, files)))
    write_whole(folder / MANIFEST, json.dumps(entries, indent=1))
    sync(folder)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file of its manifest is there with its digest."""

    def file_fault(name: str) -> str | None:
        path, entry = folder / name, entries[name]
        if folder.resolve() not in path.resolve().parents:
            return f"{MANIFEST} names {name!r}, which lies outside the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        return f"{name} is damaged" if digest(path) != entry["sha256"] else None

    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        with ThreadPoolExecutor() as pool:
            problem = next(map(printable, filter(None, pool.map(file_fault, entries))), None)
        if problem is None:
            problem = None if PROGRESS in entries else f"{PROGRESS} is missing"
        if problem is None:
            read_progress(folder)
        return problem
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end"
    except UserError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is damaged ({first_line(error)})"


def read_progress(folder: Path) -> dict:
    """A checkpoint's progress.json: step, lr_scheduler, settings, and `record`, what the caller of save_checkpoint
    wanted kept. Raises UserError."""
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        kinds = {"step": int, "lr_scheduler": dict, "settings": dict, "record": dict}
        if all(type(progress[name]) is kind for name, kind in kinds.items()) and progress["step"] >= 0:
            return progress
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{folder / PROGRESS} is damaged")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-STEP folders, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*")
             if path.is_dir() and re.fullmatch(r"checkpoint-(\d+)", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


# --- settings of a run ---------------------------------------------------------------------------------------------

def as_json(value) -> dict:
    """What `value` is once it was written and read again."""
    return json.loads(json.dumps(value, default=str))


def run_settings(args, accelerator: Accelerator) -> dict:
    """What identifies a run: every option that matters, and how many processes share the batch."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    return as_json(settings | {"num_processes": accelerator.num_processes})


def changed_settings(before: dict, now: dict) -> list[str]:
    return [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)]


def settings_of_run(output_dir: Path) -> dict | None:
    """The settings that the run in output_dir was made with; None where there is none, or its record is damaged."""
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints and not (output_dir / "unet.pth").is_file():
        return None
    try:
        settings = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
        if isinstance(settings, dict):
            return settings
    except (OSError, ValueError, RecursionError):
        pass
    warn(f"{output_dir / RUN_FILE} is missing or damaged; it is written anew")
    for folder in reversed(checkpoints):
        try:
            return read_progress(folder)["settings"]
        except UserError:
            continue
    return None


def claim_output_dir(args, accelerator: Accelerator) -> None:
    """Make output_dir this run's, or refuse: another program is at work there, or it holds another run's checkpoints or
    result. Every process must call this. Raises UserError, on all alike."""
    output_dir, problem = Path(args.output_dir), None
    if accelerator.is_main_process and output_dir.is_dir():
        try:
            hold(output_dir)
        except UserError as error:
            problem = str(error)
    raise_together(accelerator, problem)
    before = settings_of_run(output_dir)
    named = Path(args.resume_from_checkpoint or "")
    if args.seed is None and (named / PROGRESS).is_file():  # another run's checkpoint
        before_it = read_progress(named)["settings"].get("seed")
        args.seed = before_it if isinstance(before_it, int) else None
    if before is None:
        return
    if args.seed is None and isinstance(before.get("seed"), int):
        args.seed = before["seed"]  # drawn once, when the run began
    changes = changed_settings(before, run_settings(args, accelerator))
    if changes and not args.allow_changed_resume:
        raise UserError(f"{output_dir} holds a different run ({'; '.join(changes)}): choose another "
                        "--output_dir, or continue it changed with --allow_changed_resume")


def write_run_file(args, accelerator: Accelerator) -> None:
    """Create output_dir and its run.json, and hold it against other programs; every process must call this. Raises UserError, on all alike."""
    output_dir, problem = Path(args.output_dir), None
    if accelerator.is_main_process:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            hold(output_dir)
            if starts_anew(args.resume_from_checkpoint):
                set_aside(output_dir, [path for name in RUN_OUTPUTS for path in output_dir.glob(name)], "Starting anew")
            write_whole(output_dir / RUN_FILE, json.dumps(run_settings(args, accelerator), indent=1))
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot write to --output_dir {args.output_dir}: {error.strerror}"
    raise_together(accelerator, problem)


def set_aside(output_dir: Path, paths: list[Path], why: str) -> None:
    """Move what a run left into output_dir/replaced-N, so that it is neither lost nor taken for the new run's."""
    if not paths:
        return
    folder = next(folder for number in itertools.count(1) if not (folder := output_dir / f"replaced-{number}").exists())
    folder.mkdir()
    for path in paths:
        path.rename(folder / path.name)
    checkpoints = sum(path.name.startswith("checkpoint-") for path in paths)
    print(f"{why}: {checkpoints} checkpoint(s) and what belongs to them are now in {folder}", flush=True)


# --- saving and loading --------------------------------------------------------------------------------------------

def raise_together(accelerator: Accelerator, problem: str | None) -> None:
    """Raise UserError on every process when one had a problem, so that none waits for it. Every process must call this."""
    problems = [problem for problem in gather_object([problem]) if problem]
    if problems:
        raise UserError(problems[0])


def write_fault(error: Exception, folder: Path) -> str:
    """Why a file could not be written, in one line: torch names a full disk only as a failed write."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    if shutil.disk_usage(existing).free < 2**20 or "No space left" in str(error):
        return "No space left on device"
    return first_line(error)[:200]


@contextmanager
def writing(accelerator: Accelerator, what: str, output_dir: Path, flag: str = "--output_dir"):
    """Where a process cannot write, all raise UserError at the block's end. Collectives inside are for sharded runs."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = (f"cannot write {what}: {write_fault(error, output_dir)}. What was saved before it "
                   f"is intact: make room, or name another {flag}, then run the same command again")
    raise_together(accelerator, problem)


def sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def policy_state(accelerator: Accelerator, policy) -> dict[str, torch.Tensor]:
    """The policy's whole state dict in float32 on the CPU. A collective call where the policy is sharded."""
    state = accelerator.get_state_dict(policy)
    return {key.removeprefix("_orig_mod."): value.detach().to("cpu", torch.float32, copy=False).contiguous()
            for key, value in (state or {}).items()}


def lora_state(unet) -> dict[str, torch.Tensor]:
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))


def save_policy(accelerator: Accelerator, policy, folder: Path, lora: bool, weights_file: str = "unet.pth") -> None:
    """The weights file, or the LoRA weights, written by the main process; every process must call this."""
    if lora:
        if accelerator.is_main_process:
            StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=lora_state(accelerator.unwrap_model(policy)))
        return
    state = policy_state(accelerator, policy)
    if accelerator.is_main_process:
        torch.save(state, folder / weights_file)


def register_hooks(accelerator: Accelerator, lora: bool, weights_file: str = "unet.pth") -> None:
    """Have accelerate leave the policy to save_policy, so that its weights are stored once; not where it is sharded."""
    if sharded(accelerator):
        return

    def skip_weights(models, weights, folder):
        weights.clear()

    def load_weights(models, folder):
        unet = accelerator.unwrap_model(models.pop())
        if lora:
            state = {key.removeprefix("unet."): value for key, value in load_file(Path(folder) / LORA_FILE).items()}
            result = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(state))
            if result.unexpected_keys:
                raise UserError(f"{folder} does not fit this run's LoRA: {result.unexpected_keys[:3]}")
        else:
            load_strictly(unet, read_state_dict(Path(folder) / weights_file), folder)

    accelerator.register_save_state_pre_hook(skip_weights)
    accelerator.register_load_state_pre_hook(load_weights)


def save_checkpoint(accelerator: Accelerator, policy, lr_scheduler, step: int, args,
                    weights_file: str = "unet.pth", record: dict | None = None) -> Path:
    """Write OUTPUT_DIR/checkpoint-STEP; every process must call this. `record` goes into its progress.json.

    Older ones beyond the limit go once the new one was read back. Raises UserError on every process when one cannot
    write; the folder of checkpoints is then as it was.
    """
    output_dir = Path(args.output_dir)
    final, aside = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    with writing(accelerator, str(final), output_dir):
        if accelerator.is_main_process:
            remove_leftovers(output_dir)
            aside.mkdir(parents=True)
    try:
        with writing(accelerator, str(final), output_dir):
            accelerator.save_state(aside, safe_serialization=False)
            save_policy(accelerator, policy, aside, lora=args.lora_rank > 0, weights_file=weights_file)
        with writing(accelerator, str(final), output_dir):
            if accelerator.is_main_process:
                progress = {"step": step, "lr_scheduler": lr_scheduler.state_dict(), "record": record or {},
                            "settings": run_settings(args, accelerator)}
                write_whole(aside / PROGRESS, json.dumps(progress, default=str))
                write_manifest(aside)
                put_in_place(aside, final)
                if args.checkpoints_total_limit:
                    remove_older(final, step, args.checkpoints_total_limit)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
    return final


def put_in_place(aside: Path, final: Path) -> None:
    """Rename the finished folder; one of the same step, if it is there, makes way only then."""
    if final.exists():
        final.rename(final.with_name(f".{final.name}.old"))
    aside.rename(final)
    sync(final.parent)
    remove_leftovers(final.parent)


def remove_older(newest: Path, step: int, limit: int) -> None:
    """Keep `limit` checkpoints, the newest included, once its files have been read back as they were written."""
    problem = fault(newest)
    if problem:
        raise OSError(f"{newest} reads back damaged ({problem})")
    older = [path for path in list_checkpoints(newest.parent) if step_of(path) < step]
    for path in older[:max(len(older) - limit + 1, 0)]:
        path.rename(path.with_name(f".{path.name}.old"))  # so that no half-deleted folder looks like a checkpoint
    remove_leftovers(newest.parent)


def remove_leftovers(output_dir: Path) -> None:
    """What a killed process left of a checkpoint that it was writing or removing."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.old"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(args, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume: the named one, or the newest good one; None starts anew. Every process must call this,
    the main one looks. Raises UserError, on all alike."""
    found, problem = None, None
    if accelerator.is_main_process:
        try:
            output_dir = Path(args.output_dir)
            found = choose_checkpoint(args.resume_from_checkpoint, output_dir)
            steps = getattr(args, "max_train_steps", 0)
            if found and 0 < steps < read_progress(found)["step"]:
                raise UserError(f"{found} is beyond --max_train_steps {steps}: raise it, or name an earlier checkpoint "
                                "with --resume_from_checkpoint")
            if found and found.parent.resolve() == output_dir.resolve():  # later ones are of a branch that is left
                later = [path for path in list_checkpoints(output_dir) if step_of(path) > step_of(found)]
                named = (args.resume_from_checkpoint or "").strip() != "latest"
                set_aside(output_dir, later if named else [], f"Going on from {found.name}")
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot move the earlier checkpoints of {args.output_dir} aside: {error.strerror}"
    found, problem = broadcast_object_list([found, problem])
    if problem:
        raise UserError(problem)
    return found


def continuing(wanted: str | None) -> str:
    """How the run that has just been saved is continued."""
    again = (wanted or "").strip() == "latest"
    return "the same command continues from it" if again else "--resume_from_checkpoint latest continues from it"


def starts_anew(wanted: str | None) -> bool:
    return (wanted or "").strip().lower() in ("", "none")


def choose_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    if starts_anew(wanted):
        return None
    wanted = wanted.strip()
    if wanted != "latest":
        folder = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
        if not folder.is_dir():
            raise UserError(f"--resume_from_checkpoint {wanted}: no such folder, here or in {output_dir}")
        problem = fault(folder)
        if problem:
            raise UserError(f"--resume_from_checkpoint {folder} cannot be used: {problem}")
        return folder
    folders = list_checkpoints(output_dir)
    for folder in reversed(folders):
        problem = fault(folder)
        if problem is None:
            return folder
        warn(f"{folder} is passed over: {problem}")
    if folders:
        raise UserError(f"none of the {len(folders)} checkpoints in {output_dir} can be used: name another --output_dir, or "
                        "start anew with --resume_from_checkpoint none")
    return None


def refuse_pickles(folder: Path, accelerator: Accelerator, args) -> None:
    """Refuse what would run code when loaded. Raises UserError.

    accelerate unpickles the states of registered objects, and so do the sharded formats of torch and DeepSpeed: the
    former are tried without running anything, the latter are taken from the run's own folder alone. Random states it
    would pass over without a word when they cannot be loaded.
    """
    states = folder / f"random_states_{accelerator.process_index}.pkl"
    for path in [*sorted(folder.glob("custom_checkpoint_*.pkl")), *([states] if states.is_file() else [])]:
        try:
            load_plain(path, map_location="cpu")  # torch.load with weights_only, and what random states are made of
        except Exception:  # whatever a damaged file makes torch stumble over
            raise UserError(f"{path} is damaged or asks to run code when loaded: it was refused, nothing in it was "
                            "executed") from None
    if sharded(accelerator) and folder.resolve().parent != Path(args.output_dir).resolve():
        raise UserError(f"{folder} is a sharded checkpoint, a format that can run code when loaded: if you trust it, "
                        f"move it into --output_dir {args.output_dir}")


def load_checkpoint(accelerator: Accelerator, lr_scheduler, folder: Path, args) -> int:
    """Continue from `folder`: weights, optimizer, schedule and random states. Returns its step. Raises UserError.

    With --allow_changed_resume the optimizer keeps its moments and takes the new settings' rates.
    """
    progress = read_progress(folder)
    changes = changed_settings(progress["settings"], run_settings(args, accelerator))
    if changes and not args.allow_changed_resume:
        raise UserError(f"{folder} was made with other settings ({'; '.join(changes)}): go back to those, choose "
                        "another --output_dir, or add --allow_changed_resume")
    refuse_pickles(folder, accelerator, args)
    groups = lr_scheduler.optimizer.param_groups
    chosen = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    try:
        accelerator.load_state(folder)
        accelerator.step = 0  # micro-steps: checkpoints are between optimizer steps, whatever is accumulated from here on
        if not changes:
            own = lr_scheduler.state_dict()
            lr_scheduler.load_state_dict({name: value for name, value in progress["lr_scheduler"].items() if name in own})
        else:
            lr_scheduler.last_epoch = progress["lr_scheduler"]["last_epoch"]
            with warnings.catch_warnings():  # get_lr() is meant for step(), and says so
                warnings.simplefilter("ignore", UserWarning)
                rates = lr_scheduler.get_lr()
            for group, settings, lr in zip(lr_scheduler.optimizer.param_groups, chosen, rates):
                group.update(settings, lr=lr)
    except UserError:
        raise
    except Exception as error:  # torch, accelerate and the optimizers raise many kinds for a state that does not fit
        raise UserError(f"{folder} cannot be resumed: {type(error).__name__}: {first_line(error)[:300]}") from None
    return progress["step"]


# --- the end of a run ----------------------------------------------------------------------------------------------

def save_result(accelerator: Accelerator, policy, args: TrainArguments) -> None:
    """unet.pth and a full diffusers pipeline in output_dir (LoRA: merged, and the LoRA weights beside it). Every
    process must call this. Raises UserError on all alike."""
    output_dir = Path(args.output_dir)
    state = None if args.lora_rank else policy_state(accelerator, policy)
    with writing(accelerator, f"the result into {output_dir}", output_dir):
        if args.lora_rank and accelerator.is_main_process:
            layers = lora_state(accelerator.unwrap_model(policy))
            StableDiffusionPipeline.save_lora_weights(output_dir, unet_lora_layers=layers)
        if accelerator.is_main_process:
            unet = load_unet(args.pretrained_model_name_or_path, args.unet_init, revision=args.revision,
                             cache_dir=args.cache_dir)
            if args.lora_rank:  # into the base as it is on disk: the one in training has weights in the compute dtype
                merge_lora(unet, load_file(output_dir / LORA_FILE), output_dir / LORA_FILE)
            else:
                load_strictly(unet, state, "the trained policy")
            save_weights(output_dir / "unet.pth", unet.state_dict())
            save_pipeline(output_dir, unet, args)


def save_pipeline(folder: Path, unet: UNet2DConditionModel, args: TrainArguments) -> None:
    """The base pipeline with this UNet, so that from_pretrained(output_dir) opens it."""
    parts = {"unet": unet}
    if args.pretrained_vae_model_name_or_path:
        parts["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir)
    kind = StableDiffusionXLPipeline if args.sdxl else StableDiffusionPipeline
    pipeline = kind.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision,
                                    cache_dir=args.cache_dir, **parts)
    pipeline.save_pretrained(folder)
