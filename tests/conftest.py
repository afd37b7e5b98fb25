"""Small models and pairs that the tests share, built once a session."""

import functools
import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock

from tests import forge, warm_python
from tests.vocabulary import build_tiny_pipeline

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


def pytest_collection_modifyitems(items) -> None:
    """Each of xdist's workers starts on a stretch of the list: a share of the slow ones, then of the others, so that none of
    the slow ones is left to end alone."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    bounds = [len(rest) * place // workers for place in range(workers + 1)]
    items[:] = [item for place in range(workers) for item in slow[place::workers] + rest[bounds[place]:bounds[place + 1]]]


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through it for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def private_dataset_cache(tmp_path_factory):
    """Converted datasets go with the test session, not to the user's cache."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    """built_once(name, build) -> a folder that build(folder) fills in the first worker that asks, for all of them."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def built(name: str, build) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                build(folder)
                done.touch()
        return folder

    return built


@pytest.fixture(scope="session")
def tiny_sd15(built_once) -> Path:
    return built_once("sd15", build_tiny_pipeline)


@pytest.fixture(scope="session")
def tiny_sdxl(built_once) -> Path:
    return built_once("sdxl", lambda folder: build_tiny_pipeline(folder, "sdxl"))


@pytest.fixture(scope="session")
def pairs_dir(built_once) -> Path:
    from shapes.pairs import write_pairs
    return built_once("pairs", lambda folder: write_pairs(folder, 64, seed=0))


def run(command: list, expect: int | None = 0, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """Run a program from the project's root; assert its exit code and return it with its output as text."""
    result = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | environment)
    if expect is not None:
        assert result.returncode == expect, f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="session", name="run")
def run_fixture(python):
    """run(command, ...) with `python` as the scripts' PYTHON."""
    return functools.partial(run, PYTHON=python)


@pytest.fixture(scope="session")
def python(built_once) -> str:
    """A Python that starts in a moment, one for all workers: see tests/warm_python.py."""
    return str(built_once("python", warm_python.start) / "python")


@pytest.fixture(scope="session")
def forge_server(python):
    server = forge.Server(python)
    yield server
    server.close()


@pytest.fixture(scope="session")
def program(forge_server, tmp_path_factory):
    """program(module, flags, processes=1, expect=0, ends=False, prelude="", **environment): run a program, assert the exit
    code of all its processes (ends: of one, which the others' end follows) and return what they printed.

    What `accelerate launch` does, without the seconds that its own start and each process's imports take (tests/forge.py).
    """
    log = tmp_path_factory.mktemp("program") / "log"

    def program(module: str, flags: list, processes: int = 1, expect: int = 0, ends: bool = False,
                prelude: str = "", **environment: str) -> str:
        log.unlink(missing_ok=True)
        forge_server.start(forge.Launch([str(word) for word in flags], module, processes, str(log), prelude=prelude,
                                        environment=environment))
        codes, output = forge_server.wait(), log.read_text(errors="replace").replace("\r", "\n")
        assert codes and (expect in codes if ends else codes == [expect] * processes), f"{codes}\n{output[-4000:]}"
        return output

    return program


# --- training ------------------------------------------------------------------------------------------------------------

SHORT = ["--max_train_steps=3", "--train_batch_size=2", "--learning_rate=1e-4", "--lr_warmup_steps=0", "--beta_dpo=100",
         "--seed=0", "--checkpointing_steps=0", "--report_to=none"]


@pytest.fixture(scope="session")
def train(program):
    """train(flags, processes=1, ...): program() with train.py."""
    return functools.partial(program, "train")


@pytest.fixture
def train_tiny(forge_server, tiny_sd15, pairs_dir, tmp_path_factory) -> forge.TinyTraining:
    """train_tiny(output, *flags, processes=1, expect=0) runs train.py in processes of its own; see tests/forge.py."""
    return forge.TinyTraining(forge_server, tiny_sd15, pairs_dir, tmp_path_factory.mktemp("train_tiny"))


@pytest.fixture(scope="session")
def train_run(tmp_path_factory):
    """train_run(argv, *groups, watch=None): train.train() in the test's own process; the scalars of each optimizer step.

    Three steps unless argv says otherwise, in a folder of its own unless argv names one. groups: further groups of
    options. watch: as train() takes it.
    """
    from common.locks import release
    from common.train_checks import parse_options
    from train import train

    def run(argv: list, *groups: type, watch=None) -> list[dict[str, float]]:
        words = SHORT + [f"--output_dir={tmp_path_factory.mktemp('run')}"] + [str(word) for word in argv]
        options, logs = parse_options(words, *groups), []

        def keep(step, network, scalars):
            if scalars:
                logs.append(dict(scalars))
            if watch is not None:
                watch(step, network, scalars)

        reset_accelerate()
        try:
            train(options, keep)
        finally:
            reset_accelerate()
            release(options.run.output_dir)
        return logs

    return run


@pytest.fixture
def fresh_accelerate():
    """For a test that starts Accelerators of its own: accelerate keeps the first one's settings for the process."""
    reset_accelerate()
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
