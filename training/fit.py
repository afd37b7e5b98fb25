"""The one training loop: offline preference pairs, SPO and SPO's preference model all run in it, as tasks."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from common.errors import UserError
from common.progress import duration, progress_bar
from models.devices import agree
from models.speed import flushed_denormals
from training.checkpoints import continuing, read_progress, starts_over
from training.curves import draw_curves
from training.guards import NonfiniteGuard
from training.optimizers import (effective_learning_rate, gradient_norm, make_optimizer, make_schedule, take_step,
                                 warn_of_tiny_rate)
from training.records import EventLog, StepScalars, Throughput, peak_memory_gb, read_metrics
from training.run import Run, write_run_file
from training.state import LoraWeights, WholeWeights, find_checkpoint, load_checkpoint, save_checkpoint, store_weights_once

LONG_STEP = 60.0  # seconds after which a word is due
DRAWN_FROM = 10  # steps, of which there is something to see in curves.png
# watch(step, network, scalars): called before the first step, with no scalars, and after each one; after a step of 0
# micro-batches, with no scalars
Watch = Callable[[int, nn.Module, dict[str, float]], None]


@dataclass
class StepLoss:
    """loss: scalar, to be minimised. logs: scalars on the device, detached; train_loss is among them. weight: of this
    micro-batch in its step, whose weights average 1."""

    loss: Tensor
    logs: dict[str, Tensor]
    weight: float = 1.0


class Task(Protocol):
    """What is learned from what. Everything that has to be alike on every process is: every method is called on all."""

    name: str  # in the progress bar
    trained: nn.Module
    weights: WholeWeights | LoraWeights  # how checkpoints keep them
    max_steps: int  # 0: batches() knows when to end

    def summary(self) -> dict[str, str]:
        """What the start of a run prints, line by line."""

    def restore(self, record: dict, first_step: int) -> None:
        """Take up where a checkpoint with this record() ended; {} and 0 begin. Raises UserError for another run's."""

    def record(self, steps_back: int = 0) -> dict:
        """What the checkpoint of this step, or of one that many steps ago, keeps besides weights, as JSON."""

    def batches(self, first_step: int) -> Iterator[tuple[int, Iterable[Any]]]:
        """An optimizer step each: how many micro-batches, and these. A step of 0 micro-batches learns nothing."""

    def loss(self, model: nn.Module, batch: Any) -> StepLoss:
        """model: the trained module as accelerate wraps it."""

    def samples(self, logs: dict[str, float]) -> list[dict]:
        """This process's samples of a step that was not finite, as nonfinite.jsonl names them; logs: reduced."""

    def flags(self) -> dict[str, float]:
        """Numbers of this process that go with the step's scalars through their one reduction, a mean."""

    def settle(self, step: int, logs: dict[str, float]) -> str | None:
        """After the reduction: count, warn, add to `logs`; what is wrong, where the run has to end after saving."""

    def stepped(self) -> None:
        """The optimizer has stepped."""

    @property
    def resumable(self) -> bool:
        """Whether a checkpoint of now could be continued exactly."""

    def validate(self, step: int) -> None:
        """Every --validation_steps steps, and at the end."""


@dataclass
class Outcome:
    """step: the last one taken. finished: whether the run came to its end, or was stopped by a signal."""

    step: int
    finished: bool


@dataclass
class _Progress:
    step: int
    saved: int
    validated: int
    started: float = field(default_factory=time.time)

    def due(self, every: int, last: int) -> bool:
        return every > 0 and self.step // every > last // every


@flushed_denormals()
def fit(task: Task, run: Run, watch: Watch | None = None) -> Outcome:
    """Train task.trained from the start, or from the checkpoint that --resume_from_checkpoint names, to the end.

    Checkpoints are left in the run's folder, a last one included. Where it finished, the trackers and the connection of the
    processes are left open for the result: accelerator.end_training() closes them. Raises UserError for a checkpoint that
    does not fit, for too many steps without a finite loss and gradient, and for what the task finds wrong; what was learned
    is saved first.
    """
    accelerator, options = run.accelerator, run.options

    # 1. Optimizer and schedule.
    trainable = [parameter for parameter in task.trained.parameters() if parameter.requires_grad]
    lr = effective_learning_rate(options.optimizer, accelerator.num_processes)
    optimizer = make_optimizer(trainable, options.optimizer, lr)
    if run.main:
        warn_of_tiny_rate(trainable, options.optimizer.optimizer, lr, task.max_steps)
    schedule = make_schedule(optimizer, options.optimizer, task.max_steps)
    model, optimizer = accelerator.prepare(task.trained, optimizer)

    # 2. Continue where a checkpoint ended, or start.
    write_run_file(run, starts_over(options.run.resume_from_checkpoint))
    store_weights_once(accelerator, task.weights)
    checkpoint = find_checkpoint(run)
    record = read_progress(checkpoint)["record"] if checkpoint else {}
    first_step = load_checkpoint(run, schedule, checkpoint) if checkpoint else 0
    task.restore(record, first_step)
    guard = NonfiniteGuard(run, first_step, record)
    if run.main:
        accelerator.init_trackers(options.run.tracker_project_name, tracker_config(options.flat()))
        lines = task.summary() | ({"resuming": f"{checkpoint}, after step {first_step}"} if checkpoint else {})
        run.say("\n".join(["Training", *(f"  {name:<10} {text}" for name, text in lines.items())]))

    def save(step: int) -> Path:
        now.saved = step
        if run.main and now.step >= DRAWN_FROM:
            with suppress(OSError):  # the checkpoint itself reports a full disk
                draw_curves({run.output_dir.name: read_metrics(metrics.path)}, run.output_dir / "curves.png")
        back = now.step - step
        return save_checkpoint(run, task.weights, model, schedule, step, guard.record(back) | task.record(back))

    # 3. The loop: one optimizer step a turn.
    now = _Progress(first_step, saved=first_step if checkpoint else -1, validated=first_step)
    metrics, scalars = EventLog(run.output_dir / "metrics.jsonl"), StepScalars()
    if run.main:
        metrics.rewind("step", first_step + 1)
    throughput = Throughput(run.pairs_per_step)
    bar = progress_bar(initial=first_step, total=task.max_steps or None, desc=task.name, unit="step",
                       disable=not accelerator.is_local_main_process)
    if watch:
        watch(first_step, task.trained, {})
    for count, micro_batches in task.batches(first_step):
        finite, problem, stop_asked = True, None, run.stop.name is not None
        if count:
            accelerator.gradient_accumulation_steps, accelerator.step = count, 0
            begun = time.monotonic()
            for number, batch in enumerate(micro_batches):
                with accelerator.accumulate(model):
                    result = task.loss(model, batch)
                    accelerator.backward(result.loss * result.weight)
                scalars.add(result.logs, result.weight)
                if number == 0 and now.step == first_step:
                    say_how_long(run, count * (time.monotonic() - begun), count)
            now.step += 1
            norm = gradient_norm(accelerator, model, options.optimizer)
            logs = scalars.reduce(accelerator, grad_norm=norm, stop_share=float(run.stop.name is not None), **task.flags())
            stop_asked = logs.pop("stop_share") > 0
            finite = guard.settle_together(now.step, logs, task.samples)
            problem = task.settle(now.step, logs)
            rate = schedule.get_last_lr()[0]  # this step's; the schedule moves on with it
            take_step(accelerator, optimizer, schedule, finite)
            if finite:
                task.stepped()

            logs |= {"skipped_steps": float(guard.skipped_steps), "lr": rate,
                     "pairs_per_second": throughput(), "peak_memory_gb": peak_memory_gb(run.device)}
            accelerator.log(logs, step=now.step)
            if run.main:
                warnings = {"warnings": run.warnings} if run.warnings else {}
                metrics.write([{"step": now.step} | logs | {"time": time.time() - now.started} | warnings])
                run.warnings = []
            bar.update()
            bar.set_postfix(shown_in_bar(logs), refresh=False)
            if watch:
                watch(now.step, task.trained, logs)
        else:
            stop_asked = agree(stop_asked)
            if watch:
                watch(now.step, task.trained, {})

        ended = 0 < task.max_steps <= now.step
        if task.resumable and now.due(options.run.checkpointing_steps, max(now.saved, 0)):
            save(now.step)
            throughput.restart()
        if guard.too_many or (problem or stop_asked and task.resumable) and not ended:
            good = now.step - guard.in_a_row if guard.too_many else now.step  # skipped steps left the model as it was
            if now.saved != good:
                save(good)
            accelerator.end_training()
            kept = f"{run.output_dir / f'checkpoint-{good}'} is saved"
            if guard.too_many:
                raise UserError(guard.message(kept))
            if problem:
                raise UserError(f"{problem} ({kept})")
            run.say(f"Stopped by {run.stop.name or 'a signal'}: {kept}, {continuing(options.run.resume_from_checkpoint)}")
            return Outcome(now.step, finished=False)
        if now.due(options.run.validation_steps, now.validated):
            now.validated = now.step
            task.validate(now.step)
            throughput.restart()
    bar.close()

    # 4. The end: a last checkpoint.
    if now.validated < now.step:
        task.validate(now.step)
    if max(now.saved, 0) < now.step:
        save(now.step)
    return Outcome(now.step, finished=True)


def say_how_long(run: Run, seconds: float, micro_steps: int) -> None:
    """Before the first step has ended, where that will be long: nothing else is said until then."""
    if seconds > LONG_STEP and micro_steps > 1:
        run.say(f"a step of {micro_steps} micro-steps takes about {duration(seconds)} here, and a signal waits for its end; "
                "fewer pairs per step (--gradient_accumulation_steps) are faster")


def tracker_config(options: dict[str, Any]) -> dict[str, int | float | str | bool]:
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in options.items()}


def shown_in_bar(logs: dict[str, float]) -> dict[str, str]:
    names = {"train_loss": "loss", "implicit_acc_accumulated": "acc", "accuracy": "acc", "avg_lose_l_scale": "lambda",
             "spo/epoch": "epoch", "spo/kept_share": "kept", "pairs_per_second": "pairs/s"}
    return {short: f"{logs[name]:.4g}" for name, short in names.items() if name in logs}
