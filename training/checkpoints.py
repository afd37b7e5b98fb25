"""Checkpoints that are whole or absent: written aside, synced, digested, renamed; the newest good one is resumed.

    OUTPUT_DIR/checkpoint-STEP/
        unet.pth                            float32 state dict of the policy (or pytorch_lora_weights.safetensors)
        optimizer.bin, random_states_N.pkl  what resuming needs, as accelerate writes it (FSDP, DeepSpeed: their shards)
        progress.json                       step, learning-rate schedule, and the settings the run was made with
        manifest.json                       size and SHA-256 of every file above
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from training.arguments import TrainArguments, warn
from training.errors import UserError, first_line
from training.weights import LORA_FILE, load_strictly, read_state_dict

MANIFEST, PROGRESS, RUN_FILE = "manifest.json", "progress.json", "run.json"

# Settings that may change between a run and its continuation without changing what is learned from which pair.
FREE_SETTINGS = {
    "cache_dir", "dataloader_num_workers", "max_train_steps", "num_train_epochs", "output_dir", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "allow_changed_resume", "hard_skip_resume", "logging_dir",
    "report_to", "tracker_project_name", "validation_prompts", "validation_steps", "push_to_hub", "hub_model_id",
    "local_rank", "gradient_checkpointing", "metrics_config", "max_bad_fraction", "max_nonfinite_steps",
    "watch_winner_rise", "watch_margin", "process_timeout",
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
    entries = {}
    for path in files:
        sync(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    write_whole(folder / MANIFEST, json.dumps(entries, indent=1))
    sync(folder)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file of its manifest is there with its digest."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if digest(path) != entry["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({first_line(error)})"
    return None if PROGRESS in entries else f"{PROGRESS} is missing"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-STEP folders, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*")
             if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(found)]


# --- settings of a run ---------------------------------------------------------------------------------------------

def run_settings(args, accelerator: Accelerator) -> dict:
    """What identifies a run: every option that matters, and how many processes share the batch."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    return settings | {"num_processes": accelerator.num_processes}


def changed_settings(before: dict, now: dict) -> list[str]:
    return [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)]


def claim_output_dir(args, accelerator: Accelerator) -> None:
    """Make output_dir this run's, or refuse: it holds another run's checkpoints or result. Raises UserError."""
    output_dir = Path(args.output_dir)
    run_file = output_dir / RUN_FILE
    settings = run_settings(args, accelerator)
    if run_file.is_file() and (list_checkpoints(output_dir) or (output_dir / "unet.pth").is_file()):
        try:
            before = json.loads(run_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
            warn(f"{run_file} is damaged; it is written anew")
        if isinstance(before, dict) and not args.allow_changed_resume:
            # The seed of a run started without --seed is drawn once and stays with it.
            changes = [c for c in changed_settings(before, settings) if args.seed is not None or not c.startswith("seed ")]
            if changes:
                raise UserError(f"{output_dir} holds a different run ({'; '.join(changes)}): choose another "
                                "--output_dir, or continue it changed with --allow_changed_resume")
        if args.seed is None and isinstance(before, dict):
            args.seed = before.get("seed")


def write_run_file(args, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        try:
            output_dir = Path(args.output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            write_whole(output_dir / RUN_FILE, json.dumps(run_settings(args, accelerator), indent=1, default=str))
        except OSError as error:
            raise UserError(f"cannot write to --output_dir {args.output_dir}: {error.strerror}") from None
    accelerator.wait_for_everyone()


# --- saving and loading --------------------------------------------------------------------------------------------

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
            result = set_peft_model_state_dict(unet, state)
            if result.unexpected_keys:
                raise UserError(f"{folder} does not fit this run's LoRA: {result.unexpected_keys[:3]}")
        else:
            load_strictly(unet, read_state_dict(Path(folder) / weights_file), folder)

    accelerator.register_save_state_pre_hook(skip_weights)
    accelerator.register_load_state_pre_hook(load_weights)


def save_checkpoint(accelerator: Accelerator, policy, lr_scheduler, step: int, args,
                    weights_file: str = "unet.pth") -> Path:
    """Write OUTPUT_DIR/checkpoint-STEP; every process must call this. Older ones beyond the limit go afterwards."""
    output_dir = Path(args.output_dir)
    final, aside = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(aside, safe_serialization=False)
    save_policy(accelerator, policy, aside, lora=getattr(args, "lora_rank", 0) > 0, weights_file=weights_file)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress = {"step": step, "lr_scheduler": lr_scheduler.state_dict(), "settings": run_settings(args, accelerator)}
        write_whole(aside / PROGRESS, json.dumps(progress, default=str))
        write_manifest(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        sync(output_dir)
        if args.checkpoints_total_limit and fault(final) is None:
            for old in list_checkpoints(output_dir)[:-args.checkpoints_total_limit]:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(args, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume: the named one, or the newest good one; None starts anew. Raises UserError."""
    wanted = (args.resume_from_checkpoint or "none").strip()
    if wanted.lower() in ("none", ""):
        return None
    if wanted != "latest":
        folder = Path(wanted) if Path(wanted).is_dir() else Path(args.output_dir) / wanted
        if not folder.is_dir():
            raise UserError(f"--resume_from_checkpoint {wanted}: no such folder, here or in {args.output_dir}")
        problem = fault(folder)
        if problem:
            raise UserError(f"--resume_from_checkpoint {folder} cannot be used: {problem}")
        return folder
    for folder in reversed(list_checkpoints(Path(args.output_dir))):
        problem = fault(folder)
        if problem is None:
            return folder
        if accelerator.is_main_process:
            warn(f"{folder} is passed over: {problem}")
    return None


def load_checkpoint(accelerator: Accelerator, lr_scheduler, folder: Path, args) -> int:
    """Continue from `folder`: weights, optimizer, schedule and random states. Returns its step. Raises UserError."""
    progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    changes = changed_settings(progress["settings"], json.loads(json.dumps(run_settings(args, accelerator), default=str)))
    if changes and not args.allow_changed_resume:
        raise UserError(f"{folder} was made with other settings ({'; '.join(changes)}): go back to those, choose "
                        "another --output_dir, or add --allow_changed_resume")
    try:
        accelerator.load_state(folder)
    except UserError:
        raise
    except Exception as error:  # torch, accelerate and the optimizers raise many kinds for a state that does not fit
        raise UserError(f"{folder} cannot be resumed: {type(error).__name__}: {first_line(error)[:300]}") from None
    lr_scheduler.load_state_dict(progress["lr_scheduler"])
    return progress["step"]


# --- the end of a run ----------------------------------------------------------------------------------------------

def save_result(accelerator: Accelerator, policy, args: TrainArguments) -> None:
    """unet.pth and a full diffusers pipeline in output_dir (LoRA: merged, and the LoRA weights beside it)."""
    output_dir = Path(args.output_dir)
    if args.lora_rank and accelerator.is_main_process:
        unet = accelerator.unwrap_model(policy)
        StableDiffusionPipeline.save_lora_weights(output_dir, unet_lora_layers=lora_state(unet))
        unet.float().fuse_lora()
        unet.unload_lora()
        state = {key: value.detach().cpu().contiguous() for key, value in unet.state_dict().items()}
    elif not args.lora_rank:
        state = policy_state(accelerator, policy)
    if accelerator.is_main_process:
        save_weights(output_dir / "unet.pth", state)
        save_pipeline(output_dir, state, args)
    accelerator.wait_for_everyone()


def save_pipeline(folder: Path, state: dict[str, torch.Tensor], args: TrainArguments) -> None:
    """The base pipeline with this UNet, so that from_pretrained(output_dir) opens it."""
    from training.weights import load_unet

    unet = load_unet(args.pretrained_model_name_or_path, None, revision=args.revision, cache_dir=args.cache_dir)
    load_strictly(unet, state, "the trained policy")
    parts = {"unet": unet}
    if args.pretrained_vae_model_name_or_path:
        from diffusers import AutoencoderKL
        parts["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir)
    kind = StableDiffusionXLPipeline if args.sdxl else StableDiffusionPipeline
    pipeline = kind.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision,
                                    cache_dir=args.cache_dir, **parts)
    pipeline.save_pretrained(folder)
