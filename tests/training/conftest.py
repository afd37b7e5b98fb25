"""Two ways to train in a test: train_tiny runs the program in forked processes, train_run inside the test's own."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(0, str(Path(__file__).parents[1]))
import forge  # noqa: E402

TINY = ["--resolution=64", "--mixed_precision=no", "--seed=0", "--lr_warmup_steps=0", "--report_to=none"]
SHORT = ["--max_train_steps=20", "--train_batch_size=2", "--learning_rate=1e-3", "--lr_warmup_steps=0", "--beta_dpo=100",
         "--seed=0", "--checkpointing_steps=0"]


@pytest.fixture(scope="session")
def forge_server():
    server = forge.Server()
    yield server
    server.close()


class TrainTiny:
    """losses: the scalars of the last launch's output folder, by optimizer step."""

    def __init__(self, server: forge.Server, base: Path, pairs: Path, logs: Path):
        self.server, self.base, self.pairs, self.logs = server, base, pairs, logs
        self.losses: dict[int, dict[str, float]] = {}

    def __call__(self, output: Path, *flags: str, pairs: Path | None = None, processes: int = 1, expect: int = 0) -> str:
        """Train the tiny SD1.5 in `processes` processes; assert their exit codes and return what they said."""
        self.logs.mkdir(exist_ok=True)
        log, losses = self.logs / "log", self.logs / f"losses-{output.name}"
        log.unlink(missing_ok=True)
        argv = [f"--pretrained_model_name_or_path={self.base}", f"--train_data_dir={pairs or self.pairs}",
                f"--output_dir={output}", *TINY, *flags]
        codes = self.server.run(forge.Launch(argv, processes, str(log), str(losses)))
        said = log.read_text()
        assert codes == [expect] * processes, said[-4000:]
        lines = [json.loads(line) for line in losses.read_text().splitlines()] if losses.is_file() else []
        self.losses = {line.pop("step"): {name: float.fromhex(value) for name, value in line.items()} for line in lines}
        return said


@pytest.fixture
def train_tiny(forge_server, tiny_sd15, pairs_dir, tmp_path_factory) -> TrainTiny:
    return TrainTiny(forge_server, tiny_sd15, pairs_dir, tmp_path_factory.mktemp("train_tiny"))


@pytest.fixture
def train_run(tmp_path_factory):
    """train_run(argv) -> the scalars of each optimizer step of a short run (20 steps unless argv says otherwise)."""
    import train
    from training.arguments import parse_arguments
    from training.launch import start_accelerator
    from training.signals import StopSignal

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
