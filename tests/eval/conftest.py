"""Small metric models, runs and images that the evaluation's tests share."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.vocabulary import shorten

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STEM = "own_seed0_64x64_3s_7.5cfg"
PROMPTS = ["a red cat", "naïve café in 東京", "<img src=x onerror=alert(1)>", "a dog & a \"hat\"", "a house"]


@pytest.fixture(scope="session")
def metrics_config(built_once) -> Path:
    """metrics.yaml of small random models of every metric's class, which it does not call untrained."""
    def build(folder: Path) -> None:
        from shapes.tiny_metrics import write_tiny_metrics
        config = write_tiny_metrics(folder, image_size=64, patch_size=16)
        config.write_text(config.read_text().replace("  untrained: true\n", ""))
        shorten(folder)

    return built_once("metrics", build) / "metrics.yaml"


@pytest.fixture(scope="session")
def load_once(metrics_config):
    """load_metric that loads each of these models once a session."""
    from eval.metrics import load_metric, read_config
    ours, loaded = read_config(metrics_config), {}

    def load(name: str, device: str = "cpu", config: dict | Path | None = None):
        config = config if isinstance(config, dict) else read_config(config)
        if config.get(name) != ours.get(name):
            return load_metric(name, device, config)
        if name not in loaded:
            loaded[name] = load_metric(name, device, config)
        return loaded[name]

    return load


@pytest.fixture
def shared_metrics(load_once, monkeypatch):
    """Scoring takes its models from load_once."""
    monkeypatch.setattr("eval.scoring.load_metric", load_once)


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    """A prompt group named `own` of five prompts."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))
    return path


@pytest.fixture(scope="session")
def weights(tiny_sd15, tiny_sdxl, tmp_path_factory) -> dict[str, Path]:
    """unet.pth of each kind, as training leaves it."""
    from safetensors.torch import load_file
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for kind, base in (("sd15", tiny_sd15), ("sdxl", tiny_sdxl)):
        files[kind] = folder / f"{kind}.pth"
        torch.save(load_file(base / "unet" / "diffusion_pytorch_model.safetensors"), files[kind])
    return files


@pytest.fixture
def run_of(weights, tmp_path):
    """run_of(kind): unet.pth in the folder of a run."""
    def copy(kind: str) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        return Path(shutil.copy(weights[kind], folder / "unet.pth"))
    return copy


@pytest.fixture
def sd15_run(run_of) -> Path:
    return run_of("sd15")


@pytest.fixture
def sdxl_run(run_of) -> Path:
    return run_of("sdxl")


@pytest.fixture
def make_manifest(tmp_path):
    """make_manifest(name, prompts, seed=0) -> a manifest with random 64x64 images, in a folder of its own."""

    def make(name: str, prompts: list[str], seed: int = 0) -> Path:
        folder = tmp_path / name
        (folder / STEM).mkdir(parents=True)
        rng = np.random.default_rng(seed)
        entries = []
        for index, prompt in enumerate(prompts):
            path = Path(STEM) / f"{index}_64x64.png"
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / path)
            entries.append({"prompt": prompt, "gen_image_path": str(path), "raw_image_path": "", "metadata": {}})
        (folder / f"{STEM}.json").write_text(json.dumps(entries))
        return folder / f"{STEM}.json"

    return make


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        yield functools.partial(playwright.chromium.launch_persistent_context, executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="session")
def browser(chromium, tmp_path_factory):
    context = chromium(tmp_path_factory.mktemp("browser"), has_touch=True)
    yield context
    context.close()
