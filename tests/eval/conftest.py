"""Small metric models and runs that the evaluation's tests share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

STEM = "own_seed0_64x64_3s_7.5cfg"
PROMPTS = ["a red cat", "naïve café in 東京", "<img src=x onerror=alert(1)>", "a dog & a \"hat\"", "a house"]


@pytest.fixture(scope="session")
def metrics_config(tmp_path_factory) -> Path:
    """metrics.yaml of small random models of every metric's class."""
    from eval.metrics.tiny import write_tiny_metrics
    return write_tiny_metrics(tmp_path_factory.mktemp("metrics"), image_size=64, patch_size=16)


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    """A prompt group named `own` of five prompts."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))
    return path


@pytest.fixture
def sd15_run(tiny_sd15, tmp_path) -> Path:
    return write_run(tiny_sd15, tmp_path / "run")


@pytest.fixture
def sdxl_run(tiny_sdxl, tmp_path) -> Path:
    return write_run(tiny_sdxl, tmp_path / "run")


def write_run(pipeline: Path, folder: Path) -> Path:
    """unet.pth as training leaves it; returns its path."""
    folder.mkdir()
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    torch.save(unet.state_dict(), folder / "unet.pth")
    return folder / "unet.pth"


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
