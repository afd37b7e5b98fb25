"""What a run writes down: scalars of an optimizer step, lines of JSON; and how fast it is."""

import json
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from common.files import write_text


class StepScalars:
    """Sums each micro-step's logs on the device; one reduction and one host synchronisation an optimizer step."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, logs: dict[str, Tensor], weight: float = 1.0) -> None:
        """weight: of this micro-batch; a step's weights average 1."""
        for name, value in logs.items():
            value = value if weight == 1.0 else value * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def reduce(self, accelerator: Accelerator, **extra: float | Tensor) -> dict[str, float]:
        """Means over micro-batches and processes, emptied for the next step; `extra` are averaged over processes only.

        Every process must call this, with the same names.
        """
        values = [value.float() / self.count for value in self.sums.values()]
        values += [torch.as_tensor(value, dtype=torch.float32, device=accelerator.device) for value in extra.values()]
        means = accelerator.reduce(torch.stack(values), reduction="mean").tolist()
        scalars = dict(zip([*self.sums, *extra], means))
        self.sums, self.count = {}, 0
        if "margin_square" in scalars:
            variance = scalars.pop("margin_square") - scalars["margin_mean"] ** 2
            scalars["margin_std"] = max(variance, 0.0) ** 0.5
        return scalars


class EventLog:
    """A file of JSON lines in output_dir, written by the main process, which a resumed run continues where it resumes."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, key: str, end: int) -> None:
        """Forget the events whose `key` is not below `end`: they come again."""
        if self.path.is_file():
            kept = [event for event in read_events(self.path, key) if event[key] < end]
            write_text(self.path, "".join(json.dumps(event) + "\n" for event in kept))

    def write(self, events: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)


def read_events(path: str | os.PathLike, key: str) -> list[dict]:
    """The lines that have a whole number under `key`: without one that a killed process did not finish. [] where there is no
    such file."""
    events = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get(key), int):
            events.append(event)
    return events


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a run's metrics.jsonl, one an optimizer step."""
    return read_events(path, "step")


class Throughput:
    """Pairs a second of all processes since the last call, or since restart()."""

    def __init__(self, pairs_per_step: int):
        self.pairs_per_step = pairs_per_step
        self.restart()

    def restart(self) -> None:
        """Leave out what the time since the last call went into."""
        self.last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        rate, self.last = self.pairs_per_step / max(now - self.last, 1e-9), now
        return rate


def peak_memory_gb(device: torch.device) -> float:
    """Peak device memory (CUDA) or resident memory of the process (CPU) in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
