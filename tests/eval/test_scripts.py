"""scripts/eval as a user runs them: from unet.pth to tables, files and the page, offline, from another folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval import generate

SCRIPTS = Path(__file__).parents[2] / "scripts" / "eval"


def script(name: str, *arguments, folder: Path, expect: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(["bash", str(SCRIPTS / name), *map(str, arguments)], cwd=folder, capture_output=True,
                            text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert result.returncode == expect, f"{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result


@pytest.mark.slow
def test_from_checkpoints_to_win_rates(tiny_sd15, sd15_run, prompt_file, metrics_config, tmp_path):
    other = tmp_path / "other" / "unet.pth"
    other.parent.mkdir()
    torch.manual_seed(0)
    state = torch.load(sd15_run, weights_only=True)
    torch.save({key: value + 0.02 * torch.randn_like(value) for key, value in state.items()}, other)
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--metrics_config", metrics_config, "--prompts",
             prompt_file, "--height", 64, "--width", 64, "--num_inference_steps", 3, "--limit", 4]
    shutil.copy(sd15_run, tmp_path / "unet.pth")
    result = script("test_sd15.sh", "unet.pth", *flags, "--score_batch_size", 3, folder=tmp_path)  # a relative path
    assert "+ " in result.stdout and "eval.generate" in result.stdout and "no GPU here" in result.stdout
    log = (tmp_path / "joint_test_64.log").read_text()
    for label in ("PickScore", "HPSv2", "AesScore", "CLIPScore", "ImageReward"):
        assert f"FinalResults {label} for own : " in log
    stem = "own_seed0_64x64_3s_7.5cfg"
    assert {f"{stem}.json", f"{stem}_scores.json", f"{stem}.zip", stem} <= {path.name for path in tmp_path.iterdir()}

    generate.main([str(word) for word in ("--unet_path", other, *flags[:2], *flags[4:])])
    result = script("test_vs.sh", "--json_a", f"{stem}.json", "--json_b", other.parent / f"{stem}.json", "--label_a", "A",
                    "--label_b", "B", "--device", "cpu", "--batch_size", 64, "--outdir", "vs", "--metrics_config",
                    metrics_config, "--metrics", "clip", "aesthetics", folder=tmp_path)
    folder, = (tmp_path / "vs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"pair_clip.json", "pair_aesthetics.json", "summary.json", "report.html"}
    assert [row["total_pairs"] for row in json.loads((folder / "summary.json").read_text())["metrics"]] == [4, 4]
    assert "CLIPScore" in result.stdout


@pytest.mark.slow
def test_sdxl_and_exit_codes(tiny_sdxl, sdxl_run, prompt_file, metrics_config, tmp_path):
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--pretrained_vae_model_name_or_path", tiny_sdxl, "--prompts",
             prompt_file, "--height", 64, "--width", 64, "--num_inference_steps", 2, "--limit", 2, "--metrics",
             "aesthetics", "hpsv2", "--metrics_config"]
    broken = tmp_path / "metrics.yaml"
    broken.write_text(f"aesthetics: {{model: {metrics_config.parent}/aesthetics/clip, head: {metrics_config.parent}/"
                      "aesthetics, image_size: 64}\nhpsv2: {checkpoint: /no/such/file}\n")
    result = script("test_sdxl.sh", sdxl_run, *flags, broken, folder=tmp_path, expect=1)
    assert "error: hpsv2 was not scored" in result.stderr
    assert "FinalResults AesScore for own" in (sdxl_run.parent / "joint_test_64.log").read_text()
    assert "usage" in script("test_sdxl.sh", folder=tmp_path, expect=2).stderr


@pytest.mark.slow
def test_spo_settings(tiny_sd15, prompt_file, tmp_path):
    script("generate_spo.sh", "sd15", tiny_sd15, "--pretrained_model_name_or_path", tiny_sd15, "--prompts", prompt_file,
           "--height", 64, "--width", 64, "--num_inference_steps", 2, "--limit", 1, "--mixed_precision", "no",
           "--output_dir", tmp_path / "spo", folder=tmp_path)
    metadata = json.loads((tmp_path / "spo" / "own_seed42_64x64_2s_7.5cfg.json").read_text())[0]["metadata"]
    assert (metadata["cfg_convention"], metadata["guidance_scale_diffusers"], metadata["scheduler"],
            metadata["empty_prompt"]) == ("diffusers", 7.5, "default", "pipeline")
    assert "usage" in script("generate_spo.sh", folder=tmp_path, expect=2).stderr


@pytest.fixture
def project(tmp_path) -> Path:
    """The project without the published prompt groups."""
    root = tmp_path / "project"
    (root / "scripts").mkdir(parents=True)
    shutil.copytree(SCRIPTS, root / "scripts" / "eval")
    shutil.copy(SCRIPTS.parent / "common.sh", root / "scripts")
    for name in ("prompts", "training", "eval"):
        shutil.copytree(SCRIPTS.parents[1] / name, root / name,
                        ignore=shutil.ignore_patterns("papv2.json", "hpsv2.json", "partiprompts.json", "__pycache__"))
    return root


def test_a_missing_group_is_built_or_told(project):
    command = ["bash", str(project / "scripts/eval/generate.sh"), "--unet_path", "x", "--prompts", "papv2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120,
                            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHON": sys.executable})
    assert result.returncode == 1
    assert "prompts/papv2.json is missing: building it" in result.stdout and "--source" in result.stderr


@pytest.mark.parametrize("words, built", [
    (["--prompts=own"], []), (["--prompts=papv2", "--limit", "2"], ["papv2"]),
    (["--prompts", "own", "hpsv2"], ["hpsv2"]), ([], ["papv2", "hpsv2", "partiprompts"]),
])
def test_only_the_groups_asked_for_are_built(words, built, project, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    told = subprocess.run(["bash", str(project / "scripts/eval/generate.sh"), "--unet_path", "x", *words], text=True,
                          capture_output=True, timeout=60, env=os.environ | {"PYTHON": str(python)}).stdout
    assert [line.split()[-1] for line in told.splitlines() if "-m prompts.build" in line] == built
