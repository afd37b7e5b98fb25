"""The published training scripts, two steps each on tiny pipelines and JPEG pairs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.runs import SMALL, equal, scalars, weights

ROOT = Path(__file__).parents[2]
SCALARS = {"train_loss", "implicit_acc_accumulated", "model_mse_unaccumulated", "ref_mse_unaccumulated",
           "avg_win_diff_loss", "avg_lose_diff_loss", "avg_lose_l_scale", "lr", "margin_mean", "margin_std",
           "grad_norm", "pairs_per_second", "peak_memory_gb"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("method", ["diffusion_dpo", "dspo", "dmpo"])
def test_the_published_scripts_train(model, method, tiny_sd15, tiny_sdxl, pairs_dir, tmp_path, run):
    pipeline = tiny_sd15 if model == "sd15" else tiny_sdxl
    output = tmp_path / "out"
    flags = ["--pretrained_model_name_or_path", pipeline, "--train_data_dir", pairs_dir, "--output_dir", output, *SMALL,
             "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", 2, "--seed", 0,
             "--learning_rate", 1e-6]
    if model == "sdxl":
        flags += ["--pretrained_vae_model_name_or_path", pipeline / "vae"]
    result = run(["bash", f"scripts/train/{model}_{method}.sh", *flags])
    assert "4 pairs a step = 1 device(s) x 2 x 2 accumulated" in result.stdout

    state, before = weights(output), load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert state.keys() == before.keys() and not equal(state, before), "the policy moved"
    reloaded = DiffusionPipeline.from_pretrained(output)
    assert equal(reloaded.unet.state_dict(), state)
    image = reloaded("a red circle", num_inference_steps=2, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3)

    logged = scalars(output)
    assert SCALARS <= logged.keys() and logged["train_loss"].keys() == {1, 2}
    if method == "diffusion_dpo":
        assert logged["train_loss"][1] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert logged["avg_win_diff_loss"][1] == 0 and logged["margin_mean"][1] == 0 and logged["margin_std"][1] == 0
    assert 0 < logged["avg_lose_l_scale"][1] < 1, "the preset's safeguard is on"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_on_a_script_saves_and_exits_with_0(processes, tiny_sd15, pairs_dir, tmp_path):
    """A terminal sends SIGINT to the whole foreground group: the script, and whatever shares its group."""
    output = tmp_path / "out"
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, "--output_dir", output, *SMALL,
             "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", 100_000, "--seed", 0]
    with open(tmp_path / "log", "w+") as log:
        script = subprocess.Popen(["bash", "scripts/train/sd15_diffusion_dpo.sh", *map(str, flags)], cwd=ROOT, stdout=log,
                                  stderr=log, env=os.environ | {"NUM_PROCESSES": str(processes)}, start_new_session=True)
        deadline = time.monotonic() + 180
        metrics = output / "metrics.jsonl"
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
            assert script.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        os.killpg(script.pid, signal.SIGINT)
        code = script.wait(timeout=60)
    printed = (tmp_path / "log").read_text()
    assert code == 0 and "Traceback" not in printed, printed
    assert "stopping after this step with a checkpoint" in printed
    assert list(output.glob("checkpoint-*")), "it saved before the script ended"
