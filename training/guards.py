"""What keeps a long run alive or stops it cleanly: bad pairs, losses that are not finite, signals, and two warnings.

Nothing here waits for the device: what the loop decides on travels with the one reduction an optimizer step.
"""

import json
import math
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from training.options import TrainArguments
from common.errors import UserError, warn
from training.checkpoints import continuing, raise_together, write_whole
from data.pairs import PairDataset
from common.signals import StopSignal

BAD_DATA_FILE, NONFINITE_FILE = "bad_data.jsonl", "nonfinite.jsonl"


# --- pure rules ----------------------------------------------------------------------------------------------------

def allowed_bad_pairs(seen: int, fraction: float) -> float:
    """How many of `seen` pairs may be bad: the fraction of them, and three standard deviations of that count more, so
    that a run is not stopped by an unlucky beginning. 0 for a fraction of 0; every pair for a fraction of 1.
    """
    if fraction in (0.0, 1.0):
        return fraction * seen
    return max(1.0, fraction * seen + 3.0 * math.sqrt(fraction * seen))


def is_finite(accelerator: Accelerator, logs: dict[str, float]) -> bool:
    """Whether the optimizer may step, from the reduced scalars: the loss is finite, and so is the gradient's norm.

    In fp16 a gradient that overflows while the scale is above 1 is the scaler's business: it skips the step by itself
    and halves the scale, some seventeen times at the start of a run.
    """
    if not math.isfinite(logs["train_loss"]):
        return False
    return math.isfinite(logs["grad_norm"]) or accelerator.scaler is not None and accelerator.scaler.get_scale() > 1.0


class RunningMean:
    """Mean over about the last `span` values: exponential weights, unbiased from the first value on."""

    def __init__(self, span: int):
        self.decay, self.total, self.weight, self.count = 1.0 - 1.0 / span, 0.0, 0.0, 0

    def add(self, value: float) -> float:
        self.total = self.decay * self.total + (1.0 - self.decay) * value
        self.weight = self.decay * self.weight + (1.0 - self.decay)
        self.count += 1
        return self.total / self.weight


class Watch:
    """Warns of the papers' pathology, a winner's error above the reference's, and of margins that saturate.

    A warning is repeated when its value has doubled.
    """

    SPAN, FIRST = 50, 20  # optimizer steps that are averaged, and the first at which a warning may come

    def __init__(self, winner_rise: float, margin: float):
        self.rise_bound, self.margin_bound = winner_rise, margin
        self.winner, self.reference, self.margin_square = (RunningMean(self.SPAN) for _ in range(3))

    def __call__(self, step: int, logs: dict[str, float]) -> list[str]:
        """The warnings of an optimizer step, from its averaged scalars."""
        if "margin_std" not in logs or not all(map(math.isfinite, logs.values())):
            return []
        warnings = []
        rise = self.winner.add(logs.get("avg_win_diff_loss", 0.0))
        rise /= max(self.reference.add(logs.get("ref_mse_unaccumulated", 1.0)), 1e-12)
        margin = self.margin_square.add(logs["margin_mean"] ** 2 + logs["margin_std"] ** 2) ** 0.5
        if self.winner.count < self.FIRST:
            return []
        if rise > self.rise_bound:
            warnings.append(
                f"step {step}: the winners' denoising error is {rise:.1%} above the reference's (--watch_winner_rise "
                f"{self.rise_bound:g}): images get worse while the preference is learned. Try --use_winner_preserving "
                "with a larger --winner_preserving_mu, a lower --learning_rate, or an earlier checkpoint")
            self.rise_bound = 2 * rise
        if margin > self.margin_bound:
            warnings.append(
                f"step {step}: margins have a root mean square of {margin:.3g} logits (--watch_margin "
                f"{self.margin_bound:g}), where the sigmoid is flat: pairs that are ranked right teach nothing any more, "
                "the others pull with full force. Try a lower --learning_rate or --beta_dpo, or stop at an earlier "
                "checkpoint")
            self.margin_bound = 2 * margin
        return warnings


class EventLog:
    """A file of JSON lines in output_dir, written by the main process, that a resumed run takes up where it resumes."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, key: str, end: int) -> None:
        """Forget the events whose `key` is not below `end`: they come again."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)[key] < end:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a line that a killed process did not finish
        write_whole(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, events: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)


# --- one object for the loop ---------------------------------------------------------------------------------------

class Guards:
    """The loop's guard; it counts what a checkpoint has to remember, and says when to stop.

    Every method that is named `..._together` is a collective: every process must call it.
    """

    def __init__(self, accelerator: Accelerator, args: TrainArguments, dataset: PairDataset, stop: StopSignal,
                 pairs_per_step: int, first_step: int, record: dict):
        """record: what `record()` gave the checkpoint that the run continues, or {}. Raises UserError when the data is
        not what it was."""
        self.data = dataset.pairs.digest()  # once: it reads every caption
        if record.get("data", self.data) != self.data and not args.allow_changed_resume:
            raise UserError(f"{args.data_source} has changed since the checkpoint was made (other pairs, or other labels): "
                            "go back to it, choose another --output_dir, or add --allow_changed_resume")
        self.accelerator, self.args, self.dataset, self.pairs_per_step = accelerator, args, dataset, pairs_per_step
        self.signal = stop
        self.watch = Watch(args.watch_winner_rise, args.watch_margin)
        counts = {"pairs_seen": first_step * pairs_per_step, "bad_pairs": 0, "skipped_steps": 0} | {
            name: value for name, value in record.items() if name != "data"}
        if any(not isinstance(value, int) or value < 0 for value in counts.values()):
            raise UserError(f"the counts of the checkpoint's progress.json are damaged ({counts}): name an earlier one with "
                            "--resume_from_checkpoint")
        self.pairs_seen, self.bad_pairs, self.skipped_steps = (
            counts[name] for name in ("pairs_seen", "bad_pairs", "skipped_steps"))
        self.skipped_in_a_row = 0
        self.replaced: list[dict] = []  # this step's, on this process
        self.places: list[list[tuple[int, int, int]]] = []  # of each micro-batch: position, index, passed over
        self.results: list[tuple[Tensor, Tensor, Tensor | None]] = []  # timesteps, loss, margin; on the device
        self.stop_agreed = False
        self.bad_data = EventLog(Path(args.output_dir, BAD_DATA_FILE))
        self.nonfinite = EventLog(Path(args.output_dir, NONFINITE_FILE))
        if accelerator.is_main_process:
            self.bad_data.rewind("position", self.pairs_seen)
            self.nonfinite.rewind("step", first_step + 1)


    def record(self, steps_back: int = 0) -> dict:
        """What the checkpoint of this step, or of one that many steps ago, keeps of this."""
        return {"pairs_seen": self.pairs_seen - steps_back * self.pairs_per_step, "bad_pairs": self.bad_pairs,
                "skipped_steps": self.skipped_steps - steps_back, "data": self.data}

    def receive(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A micro-batch as the loader gave it, moved to the device; notes which of its pairs were replaced, and why."""
        place = zip(*(batch.pop(name).tolist() for name in ("position", "index", "passed_over")))
        self.places.append(list(place))
        for position, index, passed_over in self.places[-1]:
            if passed_over:
                self.replaced += self.dataset.faults(position, index, passed_over)
        return {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}

    def note(self, timesteps: Tensor, result) -> None:
        """Keep what locates a loss that is not finite: timesteps (N,) and the PreferenceLoss of the last micro-batch."""
        self.results.append((timesteps, result.loss.detach(), result.margin))

    def flags(self) -> dict[str, float]:
        """What the processes have to agree on; goes with the step's scalars through their one reduction."""
        replaced = len({fault["position"] for fault in self.replaced})
        return {"stop_share": float(self.signal.name is not None), "bad_pairs": float(replaced)}

    def settle_together(self, step: int, logs: dict[str, float]) -> bool:
        """From the reduced scalars, alike on every process: whether the optimizer may step.

        Removes the flags from `logs`; writes down replaced pairs and what was not finite.
        """
        self.stop_agreed = logs.pop("stop_share") > 0
        replaced = round(logs.pop("bad_pairs") * self.accelerator.num_processes)
        self.pairs_seen += self.pairs_per_step
        self.bad_pairs += replaced
        if replaced:
            self._write_together(self.bad_data, self.replaced)
        finite = is_finite(self.accelerator, logs)
        if finite:
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            self._write_together(self.nonfinite, [self._locate(step, logs)])
            if self.accelerator.is_main_process:
                warn(f"step {step} is skipped: loss {logs['train_loss']:g}, gradient norm {logs['grad_norm']:g} "
                     f"({self.skipped_in_a_row} in a row, {self.skipped_steps} in all; {self.nonfinite.path} has the pairs)")
        self.replaced, self.places, self.results = [], [], []
        if self.accelerator.is_main_process:
            for warning in self.watch(step, logs):
                warn(warning)
        logs |= {"bad_pairs": float(self.bad_pairs), "skipped_steps": float(self.skipped_steps)}
        return finite

    def _locate(self, step: int, logs: dict[str, float]) -> dict:
        """This process's pairs of the step: those whose margin is not finite; else those of micro-batches whose loss is
        not; else all of them."""
        everything, bad_batches, bad_pairs = [], [], []
        for places, (timesteps, loss, margins) in zip(self.places, self.results):
            margins = [None] * len(places) if margins is None else margins.tolist()
            for (position, index, passed_over), timestep, margin in zip(places, timesteps.tolist(), margins):
                pair = {"position": position, "row": self.dataset.row(index + passed_over), "timestep": timestep,
                        "loss": str(float(loss)), "margin": str(margin)}
                everything.append(pair)
                if not loss.isfinite():
                    bad_batches.append(pair)
                    if margin is not None and not math.isfinite(margin):
                        bad_pairs.append(pair)
        if not math.isfinite(logs["train_loss"]):
            everything = []  # then another process has the pair
        return {"step": step, "process": self.accelerator.process_index, "train_loss": str(logs["train_loss"]),
                "grad_norm": str(logs["grad_norm"]), "pairs": bad_pairs or bad_batches or everything}

    def _write_together(self, log: EventLog, events: list[dict]) -> None:
        events, problem = gather_object(events), None
        if self.accelerator.is_main_process:
            try:
                log.write(events)
            except OSError as error:
                problem = f"cannot write {log.path}: {error.strerror}"
        raise_together(self.accelerator, problem)

    def too_many_nonfinite(self) -> bool:
        return self.skipped_in_a_row >= self.args.max_nonfinite_steps

    def too_many_bad_pairs(self) -> bool:
        return self.bad_pairs > allowed_bad_pairs(self.pairs_seen, self.args.max_bad_fraction)

    def stop_after(self, done: int) -> int | None:
        """The step whose checkpoint the run has to stop with, after step `done`, or None; the same on every process.

        Steps that were skipped changed neither model nor optimizer, so that these are still those of the last good one.
        """
        if self.too_many_nonfinite():
            return done - self.skipped_in_a_row
        return done if self.too_many_bad_pairs() or self.stop_agreed else None

    def end_run(self, checkpoint: Path) -> None:
        """The last word of a run that stops at `checkpoint`. Raises UserError unless a signal asked for it."""
        if self.too_many_nonfinite():
            raise UserError(
                f"neither loss nor gradient was finite in {self.skipped_in_a_row} steps in a row: {checkpoint} holds the "
                f"model from before, {self.nonfinite.path} the pairs and timesteps. Lower --learning_rate or "
                "--beta_dpo, or train in bf16, and continue with --allow_changed_resume")
        if self.too_many_bad_pairs():
            raise UserError(
                f"{self.bad_pairs} of {self.pairs_seen} pairs could not be used, more than --max_bad_fraction "
                f"{self.args.max_bad_fraction:g}: {self.bad_data.path} names row, column and reason, {checkpoint} is "
                "saved. python -m data.check looks through all the data; raise the bound to train on regardless")
        if self.accelerator.is_main_process:
            print(f"Stopped by {self.signal.name or 'a signal'}: {checkpoint} is saved, "
                  f"{continuing(self.args.resume_from_checkpoint)}", flush=True)
