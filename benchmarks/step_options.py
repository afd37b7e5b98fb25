"""The options of benchmarks/train_step.py, which its measurement reads too."""

from dataclasses import dataclass
from typing import Literal

from common.options import option

VARIANTS = ("baseline", "uncached", "cached", "compact", "compiled")


@dataclass
class StepOptions:
    model: Literal["tiny", "sd15", "sdxl"] = option("tiny", "whose sizes")
    variants: list[Literal["baseline", "uncached", "cached", "compact", "compiled"]] = option(
        [], "which", default_text="all; on a CPU all but compiled")
    baseline: bool = option(False, "the baseline alone")
    batch: int = option(8, "pairs in a micro-step", at_least=1)
    accumulation: int = option(4, "micro-steps in an optimizer step (published: 32)", at_least=1)
    steps: int = option(5, "optimizer steps measured, after one that is not", at_least=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "of the step", default_text="bf16, on a CPU no")
    num_workers: int | None = option(None, "data workers", at_least=0, default_text="8, on a CPU 0")
    train_flags: list[str] = option([], "more of train.py, as --train_flags=--FLAG")
    json: str | None = option(None, "write the figures here too")
