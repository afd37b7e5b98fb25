"""Two ways to train in a test: train_tiny runs the program in forked processes, train_run inside the test's own."""

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests import forge

SHORT = ["--max_train_steps=20", "--train_batch_size=2", "--learning_rate=1e-4", "--lr_warmup_steps=0", "--beta_dpo=100",
         "--seed=0", "--checkpointing_steps=0"]


@pytest.fixture
def train_tiny(forge_server, tiny_sd15, pairs_dir, tmp_path_factory) -> forge.TinyTraining:
    """train_tiny(output, *flags, processes=1, expect=0) runs train.py in processes of its own; see tests/forge.py."""
    return forge.TinyTraining(forge_server, tiny_sd15, pairs_dir, tmp_path_factory.mktemp("train_tiny"))


@pytest.fixture
def train_run(tmp_path_factory):
    """train_run(argv) -> the scalars of each optimizer step of a short run (20 steps unless argv says otherwise)."""
    import train
    from common.train_options import parse_arguments
    from training.run import start_accelerator
    from common.signals import StopSignal

    def run(argv: list) -> list[dict[str, float]]:
        words = SHORT + [f"--output_dir={tmp_path_factory.mktemp('run')}"] + [str(word) for word in argv]
        args = parse_arguments(words)
        accelerator = start_accelerator(args)
        logs = []
        accelerator.log = lambda values, step: logs.append(values)
        with StopSignal() as stop:
            train.train(args, accelerator, stop)
        return logs

    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
