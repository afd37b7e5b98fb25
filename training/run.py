"""A run: its devices, its folder, its seed; held by one program, continued only by the run that began it."""

import itertools
import json
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from common.errors import UserError, warn
from common.files import read_json, write_json
from common.locks import hold
from common.signals import StopSignal
from common.train_options import TrainOptions
from models.devices import COMPUTE_DTYPES, raising_together, start_accelerator
from training.checkpoints import PROGRESS, list_checkpoints, read_progress

RUN_FILE = "run.json"
RESULTS = ("unet.pth", "pytorch_lora_weights.safetensors")
# What a run leaves in output_dir, besides the pipeline around its network, which the next result replaces whole.
RUN_OUTPUTS = ("checkpoint-*", RUN_FILE, *RESULTS, "lora_comfyui.safetensors", "metrics.jsonl", "bad_data.jsonl",
               "nonfinite.jsonl", "validation", "logs", "step-aware_preference_model.bin", "accuracy.json", "train.log",
               "curves.png", "curves_compared.png")


@dataclass
class Run:
    """One training run as its tasks see it."""

    options: TrainOptions
    accelerator: Accelerator
    stop: StopSignal
    warnings: list[str] = field(default_factory=list)  # of the step that is under way

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """What ends the run with an error is kept in its log."""
        if self.main and isinstance(error, UserError):
            self._log(f"error: {error}")

    def say(self, text: str) -> None:
        """Print, and keep in OUTPUT_DIR/train.log; the main process alone."""
        if self.main:
            print(text, flush=True)
            self._log(text)

    def warn(self, text: str) -> None:
        """A warning, which metrics.jsonl keeps with its step too; from the main process alone."""
        if self.main:
            warn(text)
            self._log(f"warning: {text}")
            self.warnings.append(text)

    def _log(self, text: str) -> None:
        if self.output_dir.is_dir():
            with open(self.output_dir / "train.log", "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        return COMPUTE_DTYPES[self.options.memory.mixed_precision]

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def output_dir(self) -> Path:
        folder = Path(self.options.run.output_dir)
        return folder.with_name(f".{folder.name}.dry_run") if self.options.run.dry_run else folder

    @property
    def seed(self) -> int:
        return self.options.run.seed

    @property
    def pairs_per_step(self) -> int:
        optimizer = self.options.optimizer
        return self.accelerator.num_processes * optimizer.train_batch_size * optimizer.gradient_accumulation_steps

    @property
    def batch_in_words(self) -> str:
        optimizer, devices = self.options.optimizer, self.accelerator.num_processes
        return (f"{self.pairs_per_step} pairs per step = {devices} device(s) x {optimizer.train_batch_size} x "
                f"{optimizer.gradient_accumulation_steps} accumulated")

    def settings(self) -> dict:
        """What identifies the run: every option that matters, and how many processes share the batch; as JSON gives it."""
        settings = self.options.settings() | {"num_processes": self.accelerator.num_processes}
        return json.loads(json.dumps(settings, default=str))


# --- start -------------------------------------------------------------------------------------------------------------

def start_run(options: TrainOptions, stop: StopSignal) -> Run:
    """Devices, precision and trackers; the output folder claimed and the seed settled, alike on every process.

    Raises UserError for what this machine lacks, and for a folder that holds another run or is in use.
    """
    if options.run.dry_run:
        options.run.report_to = "none"
    run = Run(options, start_accelerator(options), stop)
    claim_output_dir(run)
    if options.run.seed is None:
        drawn = torch.tensor([secrets.randbelow(2**31)], device=run.device)
        options.run.seed = int(run.accelerator.reduce(drawn if run.main else torch.zeros_like(drawn), reduction="sum"))
    set_seed(options.run.seed)
    return run


# --- the folder --------------------------------------------------------------------------------------------------------

def changed_settings(before: dict, now: dict) -> list[str]:
    """What differs between the settings of a run and of its continuation. A setting that only one of them knows (of another
    version) counts as unchanged, and so does what an earlier version left open: the optimizer "auto", and the mu of a
    safeguard that is off."""
    known = before.keys() & now.keys()
    if before.get("optimizer") == "auto":
        known -= {"optimizer"}
    if not before.get("use_winner_preserving") and not now.get("use_winner_preserving"):
        known -= {"winner_preserving_mu"}
    return [f"{name} was {before[name]!r}, is {now[name]!r}" for name in sorted(known) if before[name] != now[name]]


def settings_of_run(output_dir: Path) -> dict | None:
    """The settings that the run in output_dir was made with; None where there is none, or its record is damaged."""
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints and not any((output_dir / name).is_file() for name in RESULTS):
        return None
    settings = read_json(output_dir / RUN_FILE)
    if isinstance(settings, dict):
        return settings
    warn(f"{output_dir / RUN_FILE} is missing or damaged; writing a new one")
    for folder in reversed(checkpoints):
        try:
            return read_progress(folder)["settings"]
        except UserError:
            continue
    return None


def claim_output_dir(run: Run) -> None:
    """Make output_dir this run's, or refuse: another program is at work there, or it holds another run's checkpoints or
    result. Every process must call this. Raises UserError, on all alike."""
    output_dir, options = run.output_dir, run.options.run
    with raising_together():
        if run.main and output_dir.is_dir():
            hold(output_dir)
    before = settings_of_run(output_dir)
    named = Path(options.resume_from_checkpoint or "")
    if options.seed is None and (named / PROGRESS).is_file():  # another run's checkpoint
        seed = read_progress(named)["settings"].get("seed")
        options.seed = seed if isinstance(seed, int) else None
    if before is None:
        return
    if options.seed is None and isinstance(before.get("seed"), int):
        options.seed = before["seed"]  # drawn once, when the run began
    changes = changed_settings(before, run.settings())
    if changes and not options.allow_changed_resume:
        raise UserError(f"{output_dir} holds a different run ({'; '.join(changes)}): choose another "
                        "--output_dir, or continue it changed with --allow_changed_resume")


def write_run_file(run: Run, starts_over: bool) -> None:
    """Create output_dir and its run.json, and hold it against other programs; what an earlier run left there is set aside
    where this one starts over. Every process must call this. Raises UserError, on all alike."""
    output_dir = run.output_dir
    with raising_together():
        if run.main:
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                hold(output_dir)
                if starts_over:
                    set_aside(output_dir, [path for name in RUN_OUTPUTS for path in output_dir.glob(name)], "Starting over")
                write_json(output_dir / RUN_FILE, run.settings())
            except OSError as error:
                raise UserError(f"cannot write to --output_dir {output_dir} ({error.strerror}): name another") from None


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
