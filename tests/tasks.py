"""Runs and tasks for tests that call them directly: the real one on tiny models, and one that learns a line in no time.

As a program it trains that line, for tests of several processes: python -m tests.tasks --output_dir DIR [train.py's flags]
"""

from pathlib import Path

import torch
from torch import nn

from common.locks import release
from common.signals import StopSignal
from common.train_checks import parse_options
from models.family import open_family
from tests.stub_family import stub_family
from training.defaults import settle_defaults
from training.fit import Outcome, StepLoss, fit
from training.run import Run, start_run
from training.state import WholeWeights

FAKE = ["--pretrained_model_name_or_path=none", "--train_data_dir=none", "--learning_rate=0.1", "--lr_warmup_steps=0",
        "--mixed_precision=no", "--report_to=none", "--seed=1", "--max_train_steps=4", "--optimizer=adamw"]


class FakeTask:
    """Learns to add four numbers up; which batch a step has follows from the count of those that were seen.

    nan_from, nan_to: the first and the last step whose loss is not finite. problem_at: the step after which settle()
    finds something wrong. busy: steps after which the run cannot be saved.
    """

    name = "fake"

    def __init__(self, run: Run, nan_from: int = 10**9, nan_to: int = 10**9, problem_at: int = 10**9, busy: set[int] = frozenset(),
                 empty: set[int] = frozenset()):
        torch.manual_seed(0)
        self.run, self.trained, self.weights = run, nn.Linear(4, 1), WholeWeights()
        self.max_steps = run.options.optimizer.max_train_steps
        self.nan_from, self.nan_to, self.problem_at, self.busy, self.empty = nan_from, nan_to, problem_at, busy, empty
        self.now, self.seen, self.validated, self.settled, self.named = 0, 0, [], [], []

    def summary(self) -> dict[str, str]:
        return {"method": "fake"}

    def restore(self, record: dict, first_step: int) -> None:
        self.now, self.seen = first_step, record.get("seen", 0)

    def record(self, steps_back: int = 0) -> dict:
        return {"seen": self.seen - steps_back * self.run.options.optimizer.gradient_accumulation_steps}

    def batches(self, first_step: int):
        for step in range(first_step + 1, self.max_steps + 1):
            if step in self.empty:
                yield 0, ()
            count = self.run.options.optimizer.gradient_accumulation_steps
            yield count, [self.batch() for _ in range(count)]

    def batch(self) -> torch.Tensor:
        self.seen += 1
        rank, world = self.run.accelerator.process_index, self.run.accelerator.num_processes
        rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.seen))
        return rows[rank * 8 // world:(rank + 1) * 8 // world]

    def loss(self, model: nn.Module, batch: torch.Tensor) -> StepLoss:
        loss = (model(batch)[:, 0] - batch.sum(1)).square().mean()
        if self.nan_from <= self.now + 1 <= self.nan_to:
            loss = loss * float("nan")
        return StepLoss(loss, {"train_loss": loss.detach()})

    def samples(self, logs: dict) -> list[dict]:
        self.named.append(self.now + 1)
        return [{"seen": self.seen}]

    def flags(self) -> dict[str, float]:
        return {"rank": float(self.run.accelerator.process_index)}

    def stepped(self) -> None:
        pass

    def settle(self, step: int, logs: dict) -> str | None:
        self.now = step
        self.settled.append(step)
        logs["seen"] = float(self.seen)
        return "the well is dry" if step == self.problem_at else None

    @property
    def resumable(self) -> bool:
        return self.now not in self.busy

    def validate(self, step: int) -> None:
        self.validated.append(step)


def fit_fake(output: Path | str, *flags, watch=None, **faults) -> tuple[Outcome, FakeTask]:
    """fit() with a FakeTask in this process, in a folder; the folder is free again afterwards."""
    options = parse_options([*FAKE, f"--output_dir={output}", *map(str, flags)])
    settle_defaults(options, stub_family("sd15"))
    try:
        with StopSignal() as stop:
            task = FakeTask(start_run(options, stop), **faults)
            return fit(task, task.run, watch), task
    finally:
        release(options.run.output_dir)


def preference_task(base: Path, pairs: Path, *flags, run_class: type = Run):
    """train.py's own task, as train() makes it, without the output folder."""
    from training.preference import make_task

    options = parse_options([f"--pretrained_model_name_or_path={base}", f"--train_data_dir={pairs}", "--resolution=64",
                             "--mixed_precision=no", "--report_to=none", "--seed=0", "--train_batch_size=2", *map(str, flags)])
    family = open_family(options.model)
    settle_defaults(options, family)
    from models.devices import start_accelerator
    return make_task(run_class(options, start_accelerator(options), StopSignal()), family)


def first_batch(task) -> dict[str, torch.Tensor]:
    """The first micro-batch of a preference task, on its device."""
    task.restore({}, 0)
    _, micro_batches = next(task.batches(0))
    return next(iter(micro_batches))


def main() -> int:
    import sys

    fit_fake("unnamed", *sys.argv[1:])
    return 0
