"""Small models and pairs that the tests share, built once a session."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def private_dataset_cache(tmp_path_factory):
    """Converted datasets go with the test session, not to the user's cache."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory) -> Path:
    from shapes.pipeline import build_pipeline
    return build_pipeline(tmp_path_factory.mktemp("pipelines") / "sd15", "sd15")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    from shapes.pipeline import build_pipeline
    return build_pipeline(tmp_path_factory.mktemp("pipelines") / "sdxl", "sdxl")


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory) -> Path:
    from shapes.pairs import write_pairs
    return write_pairs(tmp_path_factory.mktemp("pairs"), 64, seed=0)


def run(command: list, expect: int | None = 0, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """Run a program from the project's root; assert its exit code and return it with its output as text."""
    result = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | environment)
    if expect is not None:
        assert result.returncode == expect, f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="session", name="run")
def run_fixture():
    return run


@pytest.fixture(scope="session")
def python() -> str:
    return sys.executable
