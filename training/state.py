"""A run's state in a checkpoint folder: weights, optimizer, schedule, random states and what the task remembers."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils import load as load_plain
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load, load_file, save_file
from torch import nn

from common.errors import UserError, first_line
from common.files import make_readable, write_text
from models.devices import sharded, writing
from models.family import Family
from models.lora import LORA_FILE, facts_of, read_metadata
from models.policy import MovingReference
from models.weights import load_strictly, read_state_dict, unsharded
from training.checkpoints import (PROGRESS, choose_checkpoint, list_checkpoints, put_in_place, read_progress,
                                  remove_leftovers, remove_older, step_of, write_manifest)
from training.run import Run, changed_settings, set_aside

REFERENCE_FILE = "reference.pth"


# --- the trained weights -----------------------------------------------------------------------------------------------

@dataclass
class WholeWeights:
    """All weights, as a float32 state dict in one file."""

    name: str = "unet.pth"  # the family's weights_file

    def save(self, accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
        """Written by the main process; every process must call this."""
        state = whole_state(accelerator, model)
        if accelerator.is_main_process:
            if self.name.endswith(".safetensors"):
                save_file(state, folder / self.name)
                make_readable(folder)
            else:
                torch.save(state, folder / self.name)

    def load(self, network: nn.Module, folder: Path) -> None:
        load_strictly(network, read_state_dict(folder / self.name), folder)


@dataclass
class WeightsAndReference(WholeWeights):
    """All weights, and the reference where it moves."""

    reference: MovingReference | None = None

    def save(self, accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
        super().save(accelerator, model, folder)
        if accelerator.is_main_process:
            torch.save({name: value.cpu() for name, value in self.reference.average.items()}, folder / REFERENCE_FILE)

    def load(self, network: nn.Module, folder: Path) -> None:
        super().load(network, folder)
        self.reference.load(read_state_dict(folder / REFERENCE_FILE))


@dataclass
class LoraWeights:
    """The adapter alone, in diffusers' format. Its metadata holds its alpha, without which that would be read as the rank,
    and what it was trained on."""

    family: Family
    run: Run

    def save(self, accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
        """Written by the main process; every process must call this."""
        network, backbone, options = accelerator.unwrap_model(model), self.family.backbone, self.run.options
        layers = {name: unsharded(value) for name, value in get_peft_model_state_dict(network).items()}
        facts = facts_of(self.family, network, options.model, {
            "output_dir": self.run.output_dir.name, "method": options.objective.train_method, "seed": self.run.seed})
        if not accelerator.is_main_process:
            return
        if backbone == "unet":  # it renames a transformer's in part, and diffusers then reads some of them
            layers = convert_state_dict_to_diffusers(layers)
        self.family.pipeline.save_lora_weights(folder, **{f"{backbone}_lora_layers": layers},
                                               **_collate_lora_metadata({backbone: network}))
        file = folder / LORA_FILE
        save_file(load(file.read_bytes()), file, metadata=read_metadata(file) | facts)
        make_readable(folder)

    def load(self, network: nn.Module, folder: Path) -> None:
        prefix = f"{self.family.backbone}."
        state = {key.removeprefix(prefix): value for key, value in load_file(folder / LORA_FILE).items()}
        result = set_peft_model_state_dict(network, convert_unet_state_dict_to_peft(state))
        if result.unexpected_keys:
            raise UserError(f"{folder} does not fit this run's LoRA ({', '.join(result.unexpected_keys[:3])}): go back to "
                            "its --lora_targets, or start over with --resume_from_checkpoint none")


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's whole state dict in float32 on the CPU. A collective call where it is sharded."""
    state = accelerator.get_state_dict(model)
    return {key.removeprefix("_orig_mod."): value.detach().to("cpu", torch.float32, copy=False).contiguous()
            for key, value in (state or {}).items()}


def store_weights_once(accelerator: Accelerator, weights: WholeWeights | LoraWeights) -> None:
    """Have accelerate leave the trained weights to `weights`, so that they are stored once; not where they are sharded."""
    if sharded(accelerator):
        return

    def skip(models, states, folder):
        states.clear()

    def load(models, folder):
        weights.load(accelerator.unwrap_model(models.pop()), Path(folder))

    accelerator.register_save_state_pre_hook(skip)
    accelerator.register_load_state_pre_hook(load)


# --- saving ------------------------------------------------------------------------------------------------------------

def save_checkpoint(run: Run, weights: WholeWeights | LoraWeights, model: nn.Module, schedule, step: int,
                    record: dict) -> Path:
    """Write OUTPUT_DIR/checkpoint-STEP; every process must call this. `record` goes into its progress.json.

    Older ones beyond the limit go once the new one was read back. Raises UserError on every process when one cannot
    write; the folder of checkpoints is then as it was.
    """
    final, aside = run.output_dir / f"checkpoint-{step}", run.output_dir / f".checkpoint-{step}.partial"
    with writing(str(final), run.output_dir):
        if run.main:
            remove_leftovers(run.output_dir)
            aside.mkdir(parents=True)
    try:
        with writing(str(final), run.output_dir):
            run.accelerator.save_state(aside, safe_serialization=False)
            weights.save(run.accelerator, model, aside)
        with writing(str(final), run.output_dir):
            if run.main:
                progress = {"step": step, "lr_scheduler": schedule.state_dict(), "record": record,
                            "settings": run.settings()}
                write_text(aside / PROGRESS, json.dumps(progress, default=str))
                write_manifest(aside)
                put_in_place(aside, final)
                if run.options.run.checkpoints_total_limit:
                    remove_older(final, step, run.options.run.checkpoints_total_limit)
    finally:
        if run.main:
            shutil.rmtree(aside, ignore_errors=True)
    return final


# --- loading -----------------------------------------------------------------------------------------------------------

def find_checkpoint(run: Run) -> Path | None:
    """The checkpoint to resume: the named one, or the newest good one; None starts over. Every process must call this,
    the main one looks. Raises UserError, on all alike."""
    found, problem, wanted = None, None, run.options.run.resume_from_checkpoint
    if run.main:
        try:
            found = choose_checkpoint(wanted, run.output_dir)
            steps = run.options.optimizer.max_train_steps
            if found and 0 < steps < read_progress(found)["step"]:
                raise UserError(f"{found} is beyond --max_train_steps {steps}: raise it, or name an earlier checkpoint "
                                "with --resume_from_checkpoint")
            if found and found.parent.resolve() == run.output_dir.resolve():  # later ones are of a branch that is left
                later = [path for path in list_checkpoints(run.output_dir) if step_of(path) > step_of(found)]
                named = (wanted or "").strip() != "latest"
                set_aside(run.output_dir, later if named else [], f"Going on from {found.name}")
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot move the earlier checkpoints of {run.output_dir} aside: {error.strerror}"
    found, problem = broadcast_object_list([found, problem])
    if problem:
        raise UserError(problem)
    return found


def load_checkpoint(run: Run, schedule, folder: Path) -> int:
    """Continue from `folder`: weights, optimizer, schedule and random states. Returns its step. Raises UserError.

    With --allow_changed_resume the optimizer keeps its moments and takes the new settings' rates.
    """
    accelerator, progress = run.accelerator, read_progress(folder)
    changes = changed_settings(progress["settings"], run.settings())
    if changes and not run.options.run.allow_changed_resume:
        raise UserError(f"{folder} was made with other settings ({'; '.join(changes)}): go back to those, choose "
                        "another --output_dir, or add --allow_changed_resume")
    refuse_pickles(run, folder)
    groups = schedule.optimizer.param_groups
    chosen = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    try:
        accelerator.load_state(folder)
        if not changes:
            own = schedule.state_dict()
            schedule.load_state_dict({name: value for name, value in progress["lr_scheduler"].items() if name in own})
        else:
            schedule.last_epoch = progress["lr_scheduler"]["last_epoch"]
            with warnings.catch_warnings():  # get_lr() is meant for step(), and says so
                warnings.simplefilter("ignore", UserWarning)
                rates = schedule.get_lr()
            for group, settings, lr in zip(schedule.optimizer.param_groups, chosen, rates):
                group.update(settings, lr=lr)
    except UserError:
        raise
    except Exception as error:  # torch, accelerate and the optimizers raise many kinds for a state that does not fit
        raise UserError(f"{folder} cannot be resumed ({type(error).__name__}: {first_line(error, 300)}): name an earlier "
                        "one, or none, with --resume_from_checkpoint") from None
    return progress["step"]


def refuse_pickles(run: Run, folder: Path) -> None:
    """Refuse what would run code when loaded. Raises UserError.

    The sharded formats of torch and DeepSpeed are unpickled: they are taken from the run's own folder alone. accelerate
    would skip random states without a word when they cannot be loaded, and unpickle registered objects, which no run has.
    """
    if any(folder.glob("custom_checkpoint_*.pkl")):
        raise UserError(f"{folder} is of an earlier version of SPO here, whose progress is not read any more: finish it "
                        "with that version, or start over with --resume_from_checkpoint none")
    states = folder / f"random_states_{run.accelerator.process_index}.pkl"
    if states.is_file():
        try:
            load_plain(states, map_location="cpu")  # torch.load with weights_only, and what random states are made of
        except Exception:  # whatever a damaged file makes torch stumble over
            raise UserError(f"{states} is damaged or asks to run code when loaded: it was refused, nothing in it was "
                            "executed; name an earlier checkpoint with --resume_from_checkpoint") from None
    if sharded(run.accelerator) and folder.resolve().parent != run.output_dir.resolve():
        raise UserError(f"{folder} is a sharded checkpoint, a format that can run code when loaded: if you trust it, "
                        f"move it into --output_dir {run.output_dir}")
