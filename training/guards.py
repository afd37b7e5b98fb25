"""What keeps a long run alive or stops it cleanly: bad pairs, losses that are not finite, signals, and two warnings.

Nothing here waits for the device: what the loop decides on travels with the one reduction per optimizer step.
"""

import math
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import gather_object

from common.errors import UserError
from data.bad_pairs import allowed_bad_pairs
from data.pairs import PairDataset
from models.devices import writing
from training.records import EventLog
from training.run import Run

BAD_DATA_FILE, NONFINITE_FILE = "bad_data.jsonl", "nonfinite.jsonl"


# --- rules ----------------------------------------------------------------------------------------------------

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


class DriftWatch:
    """Warns of the papers' pathology, a winner's error above the reference's, of margins that saturate, of a safeguard that
    never acts, and of one that leaves little but fine-tuning on winners.

    The first two are repeated when their value has doubled.
    """

    LOSS_OF_TUNING = 2 * math.log(2.0)  # the first step's twice: pairs are ranked wrong, by large margins
    SPAN, FIRST = 50, 20  # optimizer steps that are averaged, and the first at which a warning may come

    def __init__(self, winner_rise: float, margin: float, safeguarded: bool = False):
        self.rise_bound, self.margin_bound = self.rise_asked, self.margin_asked = winner_rise, margin
        self.idle = 0 if safeguarded else None  # steps since the start in which lambda was 1; None: it acted, or is off
        self.tuning_told = False
        self.winner, self.loser, self.reference, self.margin_square, self.loss = (RunningMean(self.SPAN) for _ in range(5))

    def __call__(self, step: int, logs: dict[str, float]) -> list[str]:
        """The warnings of an optimizer step, from its averaged scalars."""
        if "margin_std" not in logs or not all(map(math.isfinite, logs.values())):
            return []
        warnings = []
        winner, loser = (mean.add(logs.get(name, 0.0)) for mean, name in (
            (self.winner, "avg_win_diff_loss"), (self.loser, "avg_lose_diff_loss")))
        loss = self.loss.add(logs.get("train_loss", 0.0))
        rise = winner / max(self.reference.add(logs.get("ref_mse_unaccumulated", 1.0)), 1e-12)
        margin = self.margin_square.add(logs["margin_mean"] ** 2 + logs["margin_std"] ** 2) ** 0.5
        if self.idle is not None:
            self.idle = self.idle + 1 if logs["avg_lose_l_scale"] == 1.0 else None
            if self.idle == self.SPAN:
                warnings.append(
                    f"step {step}: lambda was 1 in all of the {self.SPAN} steps so far: the safeguard has changed nothing. "
                    "A larger --winner_preserving_mu acts earlier (published: 0.9, SDXL 0.6)")
        if self.winner.count < self.FIRST:
            return warnings
        if rise > self.rise_bound:
            warnings.append(
                f"step {step}: the winners' denoising error is {rise:.1%} above the reference's (--watch_winner_rise "
                f"{self.rise_asked:g}): images get worse while the preference is learned. Try --use_winner_preserving "
                "with a larger --winner_preserving_mu, a lower --learning_rate, or an earlier checkpoint")
            self.rise_bound = 2 * rise
        if (not self.tuning_told and logs.get("avg_lose_l_scale", 1.0) < 1.0 and loss > self.LOSS_OF_TUNING
                and loser < 0.5 * winner < 0.0):
            warnings.append(
                f"step {step}: the loss is {loss:.3g}, far above the first step's, and the losers' error falls with the "
                f"winners' ({loser:+.3g}, {winner:+.3g}): the safeguard leaves little but fine-tuning on the winners, as "
                "where pairs are far from what the base draws. Train on the winners first (--train_method sft), then from "
                "that result (--unet_init); or try a lower --beta_dpo or --learning_rate")
            self.tuning_told = True
        if margin > self.margin_bound:
            warnings.append(
                f"step {step}: margins have a root mean square of {margin:.3g} logits (--watch_margin "
                f"{self.margin_asked:g}), where the sigmoid is flat: pairs that are ranked right teach nothing any more, "
                "the others pull with full force. Try a lower --learning_rate or --beta_dpo, or stop at an earlier "
                "checkpoint")
            self.margin_bound = 2 * margin
        return warnings


# --- the loop's guard ---------------------------------------------------------------------------------------------------

class NonfiniteGuard:
    """Skips steps without a finite loss and gradient, writes down which samples they had, and stops after too many."""

    def __init__(self, run: Run, first_step: int, record: dict):
        """record: what record() gave the checkpoint that the run continues, or {}."""
        self.run = run
        self.skipped_steps = count_in(record, "skipped_steps")
        self.in_a_row = 0
        self.log = EventLog(run.output_dir / NONFINITE_FILE)
        if run.main:
            self.log.rewind("step", first_step + 1)

    def record(self, steps_back: int = 0) -> dict:
        """What the checkpoint of this step, or of one that many steps ago, keeps of this."""
        return {"skipped_steps": self.skipped_steps - steps_back}

    def settle_together(self, step: int, logs: dict[str, float], samples: Callable[[dict], list[dict]]) -> bool:
        """From the reduced scalars, alike on every process: whether the optimizer may step. samples: the
        task's, called where it may not. Every process must call this."""
        if is_finite(self.run.accelerator, logs):
            self.in_a_row = 0
            return True
        self.skipped_steps += 1
        self.in_a_row += 1
        write_together(self.run, self.log, [{
            "step": step, "process": self.run.accelerator.process_index, "train_loss": str(logs["train_loss"]),
            "grad_norm": str(logs["grad_norm"]), "pairs": samples(logs)}])
        self.run.warn(f"step {step} is skipped: loss {logs['train_loss']:g}, gradient norm {logs['grad_norm']:g} "
                      f"({self.in_a_row} in a row, {self.skipped_steps} in all; {self.log.path} has the pairs)")
        return False

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= self.run.options.run.max_nonfinite_steps

    def message(self, kept: str) -> str:
        return (f"neither loss nor gradient was finite in {self.in_a_row} steps in a row: {kept}, {self.log.path} has the "
                "pairs and timesteps. Lower --learning_rate or the objective's beta, or train in bf16, and "
                "continue with --allow_changed_resume")


class BadPairs:
    """Counts the pairs that could not be used and were replaced, writes down why, and says when they are too many."""

    def __init__(self, run: Run, dataset: PairDataset, record: dict, pairs_seen: int):
        """record: what record() gave the checkpoint that the run continues, or {}. pairs_seen: by the steps before."""
        self.run, self.dataset = run, dataset
        self.pairs_seen = count_in(record, "pairs_seen", pairs_seen)
        self.bad_pairs = count_in(record, "bad_pairs")
        self.replaced: list[dict] = []  # this step's, on this process
        self.places: list[list[tuple[int, int, int]]] = []  # of each micro-batch: position, index, how many were skipped
        self.log = EventLog(run.output_dir / BAD_DATA_FILE)
        if run.main:
            self.log.rewind("position", self.pairs_seen)

    def record(self, steps_back: int = 0) -> dict:
        return {"pairs_seen": self.pairs_seen - steps_back * self.run.pairs_per_step, "bad_pairs": self.bad_pairs}

    def receive(self, batch: dict) -> dict:
        """A micro-batch as the loader gave it, without what locates its pairs; notes which of them were replaced."""
        place = zip(*(batch.pop(name).tolist() for name in ("position", "index", "passed_over")))
        self.places.append(list(place))
        for position, index, passed_over in self.places[-1]:
            if passed_over:
                self.replaced += self.dataset.faults(position, index, passed_over)
        return batch

    def flags(self) -> dict[str, float]:
        """What goes with the step's scalars through their one reduction, which averages over the processes."""
        return {"bad_pairs": float(len({fault["position"] for fault in self.replaced}))}

    def settle_together(self, logs: dict[str, float]) -> None:
        """Count the step's pairs; its bad_pairs in `logs` become the run's. Every process must call this."""
        replaced = round(logs["bad_pairs"] * self.run.accelerator.num_processes)
        self.pairs_seen += self.run.pairs_per_step
        self.bad_pairs += replaced
        if replaced:
            write_together(self.run, self.log, self.replaced)
        self.replaced, self.places = [], []
        logs["bad_pairs"] = float(self.bad_pairs)

    @property
    def too_many(self) -> bool:
        return self.bad_pairs > allowed_bad_pairs(self.pairs_seen, self.run.options.data.max_bad_fraction)

    def message(self) -> str:
        return (f"{self.bad_pairs} of {self.pairs_seen} pairs could not be used, more than --max_bad_fraction "
                f"{self.run.options.data.max_bad_fraction:g}: {self.log.path} names row, column and reason. "
                "python -m data.check looks through all the data; raise the bound to train on regardless")


def count_in(record: dict, name: str, default: int = 0) -> int:
    """A count of a checkpoint's record. Raises UserError where it is damaged."""
    value = record.get(name, default)
    if not isinstance(value, int) or value < 0:
        raise UserError(f"the counts of the checkpoint's progress.json are damaged ({name} {value!r}): name an earlier one "
                        "with --resume_from_checkpoint")
    return value


def write_together(run: Run, log: EventLog, events: list[dict]) -> None:
    """Have the main process write every process's events. Every process must call this."""
    events = gather_object(events)
    with writing(str(log.path), run.output_dir):
        if run.main:
            log.write(events)
