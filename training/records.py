"""What a run writes down: scalars of an optimizer step, metrics.jsonl, events; and how fast it is."""

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


class MetricsFile:
    """OUTPUT_DIR/metrics.jsonl: one line of JSON an optimizer step, for plots and tables without a tracker.

    A resumed run continues after `first_step`: lines that an interrupted one wrote beyond it are dropped.
    """

    def __init__(self, output_dir: str | os.PathLike, first_step: int):
        self.path, self.first_step, self.file = Path(output_dir) / "metrics.jsonl", first_step, None

    def append(self, step: int, logs: dict[str, float]) -> None:
        if self.file is None:
            kept = [line for line in read_metrics(self.path) if line["step"] <= self.first_step]
            self.file = open(self.path, "w", encoding="utf-8", buffering=1)
            self.file.writelines(json.dumps(line) + "\n" for line in kept)
        self.file.write(json.dumps({"step": step, **logs}) + "\n")


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl, without one that was cut short; [] where there is none."""
    lines = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines


class EventLog:
    """A file of JSON lines in output_dir, written by the main process, that a resumed run continues from where it resumes."""

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
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, events: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)


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
