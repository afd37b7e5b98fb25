"""What tasks that learn from stored pairs have in common: the stream of micro-batches, its place, and its bad pairs."""

import math
from collections.abc import Iterable, Iterator

from torch import Tensor

from common.errors import UserError
from data.pairs import PairDataset, make_loader
from training.guards import BadPairs
from training.run import Run


class StoredPairs:
    """A part of a Task (training/fit.py): loss() is left to it, which adds to `results`."""

    resumable = True

    def __init__(self, run: Run, dataset: PairDataset, max_steps: int):
        self.run, self.dataset, self.max_steps = run, dataset, max_steps
        self.digest = dataset.pairs.digest()  # once: it reads every caption
        self.results: list[tuple[Tensor, Tensor, Tensor | None]] = []  # of a step's micro-batches: times, loss, margin

    # --- what a checkpoint keeps -----------------------------------------------------------------------------------------

    def restore(self, record: dict, first_step: int) -> None:
        if record.get("data", self.digest) != self.digest and not self.run.options.run.allow_changed_resume:
            raise UserError(f"{self.run.options.data.source} has changed since the checkpoint was made (other pairs, or "
                            "other labels): go back to it, choose another --output_dir, or add --allow_changed_resume")
        self.bad = BadPairs(self.run, self.dataset, record, first_step * self.run.pairs_per_step)

    def record(self, steps_back: int = 0) -> dict:
        return self.bad.record(steps_back) | {"data": self.digest}

    # --- a step ----------------------------------------------------------------------------------------------------------

    def batches(self, first_step: int) -> Iterator[tuple[int, Iterable[dict]]]:
        optimizer, accelerator = self.run.options.optimizer, self.run.accelerator
        count, steps = optimizer.gradient_accumulation_steps, self.max_steps - first_step
        loader = iter(make_loader(self.dataset, optimizer.train_batch_size, accelerator.process_index,
                                  accelerator.num_processes, self.bad.pairs_seen, steps * count,
                                  pin_memory=self.run.device.type == "cuda"))
        for _ in range(steps):
            yield count, (self.to_device(self.bad.receive(next(loader))) for _ in range(count))

    def to_device(self, batch: dict) -> dict:
        return {name: value.to(self.run.device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()}

    def stepped(self) -> None:
        pass

    # --- after a step ----------------------------------------------------------------------------------------------------

    def flags(self) -> dict[str, float]:
        return self.bad.flags()

    def settle(self, step: int, logs: dict[str, float]) -> str | None:
        self.results = []
        self.bad.settle_together(logs)
        logs |= {"pairs_seen": float(self.bad.pairs_seen), "epoch": self.bad.pairs_seen / len(self.dataset)}
        return self.bad.message() if self.bad.too_many else None

    def samples(self, logs: dict[str, float]) -> list[dict]:
        """Pairs whose margin is not finite; else those of micro-batches whose loss is not; else all of them, if every
        process's loss is finite and the gradient is not."""
        everything, bad_batches, bad_pairs = [], [], []
        for places, (times, loss, margins) in zip(self.bad.places, self.results):
            margins = [None] * len(places) if margins is None else margins.tolist()
            for (position, index, passed_over), time, margin in zip(places, times.tolist(), margins):
                pair = {"position": position, "row": self.dataset.row(index + passed_over), "timestep": time,
                        "loss": str(float(loss)), "margin": str(margin)}
                everything.append(pair)
                if not loss.isfinite():
                    bad_batches.append(pair)
                    if margin is not None and not math.isfinite(margin):
                        bad_pairs.append(pair)
        if not math.isfinite(logs["train_loss"]):
            everything = []  # then another process has the pair
        return bad_pairs or bad_batches or everything
