"""scripts/eval: once as a user runs them, offline and from another folder; else which commands they make of their flags."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from eval import generate

SCRIPTS = Path(__file__).parents[2] / "scripts" / "eval"
STEM = "own_seed0_64x64_3s_7.5cfg"
STUB = """#!/usr/bin/env bash
# Stands for Python: writes down what it is asked to run, and leaves a list of manifests where one is asked for.
IFS=$'\\x1f'; printf '%s\\n' "$*" >> "$CALLS"
[ "$2" = "${FAILING:-}" ] && exit 1
while [ $# -gt 0 ]; do [ "$1" = --manifest_list ] && echo "run/own_seed0_1024x1024_50s_7.5cfg.json" > "$2"; shift; done
exit 0
"""


def script(path: Path, *arguments, folder: Path, expect: int = 0, **environment) -> subprocess.CompletedProcess:
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(["bash", str(path), *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300,
                            env=os.environ | environment)
    assert result.returncode == expect, f"{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result


@pytest.mark.slow
def test_from_checkpoints_to_win_rates(tiny_sd15, sd15_run, prompt_file, metrics_config, tmp_path, python):
    other = tmp_path / "other" / "unet.pth"
    other.parent.mkdir()
    torch.manual_seed(0)
    state = torch.load(sd15_run, weights_only=True)
    torch.save({key: value + 0.02 * torch.randn_like(value) for key, value in state.items()}, other)
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--metrics_config", metrics_config, "--prompts",
             prompt_file, "--height", 64, "--width", 64, "--num_inference_steps", 3, "--limit", 4]
    shutil.copy(sd15_run, tmp_path / "unet.pth")
    result = script(SCRIPTS / "test_sd15.sh", "unet.pth", *flags, "--score_batch_size", 3, folder=tmp_path, PYTHON=python)  # a relative path
    assert "+ " in result.stdout and "eval.generate" in result.stdout and "no GPU here" in result.stdout
    log = (tmp_path / "joint_test_64.log").read_text()
    for label in ("PickScore", "HPSv2", "AesScore", "CLIPScore", "ImageReward"):
        assert f"FinalResults {label} for own : " in log
    assert {f"{STEM}.json", f"{STEM}_scores.json", f"{STEM}.zip", STEM} <= {path.name for path in tmp_path.iterdir()}

    generate.main([str(word) for word in ("--unet_path", other, *flags[:2], *flags[4:])])
    result = script(SCRIPTS / "test_vs.sh", "--json_a", f"{STEM}.json", "--json_b", other.parent / f"{STEM}.json",
                    "--label_a", "A", "--label_b", "B", "--device", "cpu", "--batch_size", 64, "--outdir", "vs",
                    "--metrics_config", metrics_config, "--metrics", "clip", "aesthetics", folder=tmp_path, PYTHON=python)
    folder, = (tmp_path / "vs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"pair_clip.json", "pair_aesthetics.json", "summary.json", "report.html"}
    assert [row["total_pairs"] for row in json.loads((folder / "summary.json").read_text())["metrics"]] == [4, 4]
    assert "CLIPScore" in result.stdout


@pytest.fixture
def commands(tmp_path):
    """commands(name, *words, expect=0, ...): the -m commands that scripts/eval/NAME runs, in a project without the published
    prompt groups; and what it prints."""
    root, python, calls = tmp_path / "project", tmp_path / "python", tmp_path / "calls"
    shutil.copytree(SCRIPTS, root / "scripts" / "eval")
    shutil.copy(SCRIPTS.parent / "common.sh", root / "scripts")
    (root / "prompts").mkdir()
    python.write_text(STUB)
    python.chmod(0o755)

    def run(name: str, *words, expect: int = 0, **environment) -> tuple[list[list[str]], subprocess.CompletedProcess]:
        calls.write_text("")
        result = script(root / "scripts" / "eval" / name, *words, folder=tmp_path, expect=expect, PYTHON=str(python),
                        CALLS=str(calls), **environment)
        asked = [line.split("\x1f") for line in calls.read_text().splitlines()]
        return [words[1:] for words in asked if words[0] == "-m"], result

    return run


def test_each_flag_goes_to_its_program(commands):
    made, result = commands("test_sdxl.sh", "a run/unet.pth", "--metrics", "clip", "hpsv2", "--limit", 2, "--prompts", "my own",
                            "--metrics_config=m.yaml", "--score_batch_size", 3, "--batch_size", 5, "--skip_missing")
    [generated, scored] = made
    assert generated[:-1] == ["eval.generate", "--unet_path", "a run/unet.pth", "--prompts", "papv2", "hpsv2", "partiprompts",
                              "--sdxl", "--limit", "2", "--prompts", "my own", "--batch_size", "5", "--manifest_list"]
    assert scored == ["eval.score", "--manifests", "run/own_seed0_1024x1024_50s_7.5cfg.json", "--log_file",
                      "run/joint_test_1024.log", "--metrics", "clip", "hpsv2", "--metrics_config=m.yaml", "--batch_size", "3",
                      "--skip_missing"]
    assert "+ " in result.stdout and "my\\ own" in result.stdout  # as it could be typed


def test_a_program_that_fails_ends_the_script(commands):
    made, _ = commands("test_sd15.sh", "unet.pth", "--prompts", "own", FAILING="eval.score", expect=1)
    assert [words[0] for words in made] == ["eval.generate", "eval.score"]
    made, _ = commands("test_sd15.sh", "unet.pth", "--prompts", "own", FAILING="eval.generate", expect=1)
    assert [words[0] for words in made] == ["eval.generate"]
    made, result = commands("generate.sh", "--unet_path", "x", "--prompts", "papv2", FAILING="prompts.build", expect=1)
    assert made == [["prompts.build", "papv2"]] and "prompts/papv2.json is missing: building it" in result.stdout


def test_usage(commands):
    for words in (["test_sdxl.sh"], ["test_sd15.sh", "--limit", 2], ["generate_spo.sh"]):
        made, result = commands(*words, expect=2)
        assert not made and "usage" in result.stderr


def test_spos_settings(commands):
    [made], _ = commands("generate_spo.sh", "sdxl", "my/unet", "--limit", 1)
    words = " ".join(made)
    assert words.startswith("eval.generate --unet_path my/unet --prompts own") and words.endswith("--sdxl --limit 1")
    for setting in ("--cfg_convention diffusers", "--scheduler default", "--empty_prompt pipeline", "--seed 42", "--cfg 5.0"):
        assert setting in words
    [made], _ = commands("generate_spo.sh", "sd15", "--limit", 1)
    assert "--unet_path SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep" in " ".join(made)


def test_a_process_a_gpu(commands):
    [made], _ = commands("generate.sh", "--unet_path", "x", "--prompts", "own", NUM_PROCESSES="2")
    assert made[0] == "accelerate.commands.launch" and made[made.index("--num_processes") + 1] == "2"
    assert made[made.index("-m"):] == ["-m", "eval.generate", "--unet_path", "x", "--prompts", "own"]


@pytest.mark.parametrize("words, built", [
    (["--prompts=own"], []), (["--prompts=papv2", "--limit", "2"], ["papv2"]),
    (["--prompts", "own", "hpsv2"], ["hpsv2"]), ([], ["papv2", "hpsv2", "partiprompts"]),
])
def test_only_the_groups_asked_for_are_built(words, built, commands):
    made, _ = commands("generate.sh", "--unet_path", "x", *words)
    assert [words[1] for words in made if words[0] == "prompts.build"] == built
