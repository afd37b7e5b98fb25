"""Time by part, without making the device wait; and the device's own matrix rate."""

import time
from collections import defaultdict
from contextlib import contextmanager

import torch
from torch import nn


class Parts:
    """Milliseconds of named parts of a step. On a GPU from events in its stream, which nothing waits for until the end;
    on a CPU the process's CPU time, which other programs on the machine do not lengthen."""

    def __init__(self, device: torch.device):
        self.device, self.spans = device, defaultdict(list)

    def mark(self):
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        """Milliseconds between two marks."""
        if self.device.type != "cuda":
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)

    @contextmanager
    def part(self, name: str):
        start = self.mark()
        yield
        self.spans[name].append((start, self.mark()))

    def watch(self, module: nn.Module, name: str) -> None:
        """Count every forward of a module as a part."""
        starts = []
        module.register_forward_pre_hook(lambda *_: starts.append(self.mark()))
        module.register_forward_hook(lambda *_: self.spans[name].append((starts.pop(), self.mark())))

    def milliseconds(self) -> dict[str, float]:
        """The sum over all spans of each part."""
        return {name: sum(self.between(*span) for span in spans) for name, spans in self.spans.items()}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on random numbers, the best of five."""
    size, repeats = (8192, 10) if device.type == "cuda" else (768, 4)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    parts, best = Parts(device), float("inf")
    for _ in range(6):
        start = parts.mark()
        for _ in range(repeats):
            a @ b
        best = min(best, parts.between(start, parts.mark()))
    return repeats * 2 * size**3 / (best / 1000)
