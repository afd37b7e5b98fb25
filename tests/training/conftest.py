"""A run that was not broken, for the tests of those that were."""

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Unbroken:
    """flags: without --output_dir. logs: the scalars of its steps. output: with checkpoints at steps 2, 4 and 6."""

    flags: list
    logs: list[dict]
    output: Path


@pytest.fixture(scope="session")
def unbroken(train_run, tiny_sd15, pairs_dir, tmp_path_factory) -> Unbroken:
    """6 steps of a whole network on one process, with two accumulated micro-batches and random crops."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, "--resolution", 64,
             "--mixed_precision", "no", "--max_train_steps", 6, "--gradient_accumulation_steps", 2, "--random_crop",
             "--checkpointing_steps", 2, "--beta_dpo", 5000, "--seed", 1]
    return Unbroken(flags, train_run([*flags, "--output_dir", output]), output)
