"""The training scripts: what they launch, and that their presets train."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.runs import SMALL, equal, scalars, weights

ROOT = Path(__file__).parents[2]
PUBLISHED = ("diffusion_dpo", "dspo", "dmpo")
COMMON = {"train_loss", "model_mse_unaccumulated", "lr", "grad_norm", "pairs_per_second", "peak_memory_gb"}
SCALARS = {"implicit_acc_accumulated", "ref_mse_unaccumulated", "avg_win_diff_loss", "avg_lose_diff_loss", "avg_lose_l_scale",
           "margin_mean", "margin_std"}


@pytest.fixture
def recorder(tmp_path):
    """A PYTHON that writes down what the script asks of it last: the command that it launches."""
    record, program = tmp_path / "command", tmp_path / "python"
    program.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" > '{record}'\n")
    program.chmod(0o755)

    def launched(script: str, *flags, **environment) -> list[str]:
        ended = subprocess.run(["bash", script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                               env=os.environ | {"PYTHON": str(program)} | environment)
        assert ended.returncode == 0, ended.stderr
        command = record.read_text().split("\0")[:-1]
        return command[command.index(str(program)) + 1:] if str(program) in command else command

    return launched


PRESETS = sorted(path.stem for path in (ROOT / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_script_that_launches_it(preset, recorder):
    command = recorder(f"scripts/train/{preset}.sh", "--seed", 0, "--output_dir", "a folder")
    program = ["-m", "spo.preference_model.train"] if preset.startswith("spm_") else [str(ROOT / "train.py")]
    place = command.index(program[0], 2)
    assert command[:2] == ["-m", "accelerate.commands.launch"] and command[place:place + len(program)] == program
    words = command[place + len(program):]
    assert words[:2] == ["--config", f"{ROOT}/configs/train/{preset}.yaml"] and words[-4:] == ["--seed", "0", "--output_dir", "a folder"]


@pytest.mark.parametrize("processes, accumulation", [(1, "256"), (8, "32"), (300, "1")])
def test_the_published_batch_is_kept_on_any_number_of_processes(processes, accumulation, recorder, tmp_path):
    def flag(*flags, preset="sd15_dmpo", name="--gradient_accumulation_steps"):
        command = recorder(f"scripts/train/{preset}.sh", *flags, NUM_PROCESSES=str(processes))
        assert command[command.index("--num_processes") + 1] == str(processes)
        return command[command.index(name) + 1] if name in command else None

    assert flag() == accumulation
    assert flag("--gradient_accumulation_steps", 4) == "4" and flag(preset="sd15_spo") is None
    (tmp_path / "own.yaml").write_text("gradient_accumulation_steps: 2\n")
    assert flag(f"--config={tmp_path / 'own.yaml'}") is None


def test_the_cache_names_every_preset_of_stored_pairs(recorder):
    def told(*words):
        return subprocess.run(["bash", "scripts/prepare/cache.sh", *words], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"PYTHON": sys.executable})

    named = told().stderr.partition("PRESET one of ")[2].split()
    assert named == [preset for preset in PRESETS if not preset.startswith("spm_") and not preset.endswith("_spo")]
    usage, help = (text.strip() for text in told("--help").stdout.split("\n", 1))
    assert usage.split("PRESET one of ")[1].split() == named and help.startswith("usage: python -m data.cache")


def test_several_machines_and_a_cache(recorder):
    command = recorder("scripts/train/sd15_dspo.sh", NUM_PROCESSES="2", NUM_MACHINES="3", MACHINE_RANK="1", MAIN_ADDRESS="ten",
                       MAIN_PORT="99")
    pairs = dict(zip(command, command[1:]))
    assert (pairs["--num_processes"], pairs["--num_machines"], pairs["--machine_rank"]) == ("6", "3", "1")
    assert (pairs["--main_process_ip"], pairs["--main_process_port"]) == ("ten", "99")
    command = recorder("scripts/prepare/cache.sh", "sd15_dmpo", "a cache", "--resolution", 64)
    assert command[-8:] == ["-m", "data.cache", "--config", f"{ROOT}/configs/train/sd15_dmpo.yaml", "--cached_dataset", "a cache",
                            "--resolution", "64"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith(("sd15_", "sdxl_")) and not name.endswith("_spo")])
def test_a_preset_trains_saves_and_draws(preset, request, pairs_dir, tmp_path, train_run):
    """Two steps with the published options, small models and pairs."""
    pipeline, output = request.getfixturevalue(f"tiny_{preset.split('_')[0]}"), tmp_path / "out"
    train_run(["--config", f"configs/train/{preset}.yaml", "--pretrained_model_name_or_path", pipeline, "--train_data_dir", pairs_dir,
               "--output_dir", output, *SMALL, "--gradient_accumulation_steps", 2, "--max_train_steps", 2, "--learning_rate", 1e-6,
               "--train_batch_size", 2, "--report_to", "tensorboard", "--pretrained_vae_model_name_or_path", pipeline / "vae", *own_values(preset)])
    state, before = weights(output), load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert state.keys() == before.keys() and not equal(state, before), "the policy moved"
    reloaded = DiffusionPipeline.from_pretrained(output)
    assert equal(reloaded.unet.state_dict(), state)
    image = reloaded("a red circle", num_inference_steps=2, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3)

    logged = scalars(output)
    assert COMMON <= logged.keys() and logged["train_loss"].keys() == {1, 2} and math.isfinite(logged["train_loss"][2])
    if not preset.endswith(PUBLISHED):
        return
    assert SCALARS <= logged.keys()
    if preset.endswith("diffusion_dpo"):
        assert logged["train_loss"][1] == pytest.approx(math.log(2), abs=1e-7)
    assert logged["avg_win_diff_loss"][1] == 0 and logged["margin_mean"][1] == 0 and logged["margin_std"][1] == 0
    assert 0 < logged["avg_lose_l_scale"][1] < 1, "the preset's safeguard is on"


def own_values(preset: str) -> list:
    """The preset's beta, for train_run has one of its own; and AdamW for 8-bit AdamW, which needs a library of its own."""
    values = yaml.safe_load((ROOT / "configs" / "train" / f"{preset}.yaml").read_text())
    eight_bit = ["--optimizer", "adamw"] if values.get("optimizer") == "adamw8bit" else []
    return ["--beta_dpo", values.get("beta_dpo", 5000), *eight_bit]


def interrupt(script: str, flags: list, output: Path, **environment: str) -> str:
    """Ctrl-C on a script after two steps, which must end it with 0: a terminal sends SIGINT to the whole foreground group,
    the script and whatever shares its group. Returns what it printed."""
    log, metrics = output.with_suffix(".log"), output / "metrics.jsonl"
    with open(log, "w") as file:
        started = subprocess.Popen(["bash", script, *map(str, flags), "--output_dir", output], cwd=ROOT, stdout=file, stderr=file,
                                   env=os.environ | {"PYTHON": sys.executable} | environment, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
        assert started.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGINT)
    code, printed = started.wait(timeout=200), log.read_text()
    assert code == 0 and "Traceback" not in printed, printed
    assert list(output.glob("checkpoint-*")), "it saved before the script ended"
    return printed


@pytest.mark.slow
def test_a_published_script_trains_and_ctrl_c_on_it_saves_and_exits_with_0(tiny_sdxl, pairs_dir, tmp_path):
    output = tmp_path / "out"
    printed = interrupt("scripts/train/sdxl_diffusion_dpo.sh", [
        "--pretrained_model_name_or_path", tiny_sdxl, "--train_data_dir", pairs_dir, *SMALL, "--train_batch_size", 2,
        "--gradient_accumulation_steps", 2, "--max_train_steps", 100_000, "--seed", 0,
        "--pretrained_vae_model_name_or_path", tiny_sdxl / "vae"], output, NUM_PROCESSES="1")
    assert "4 pairs per step = 1 device(s) x 2 x 2 accumulated" in printed and scalars(output)["train_loss"].keys() >= {1, 2}
    assert "stopping after this step with a checkpoint" in printed


TRAINING = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: Path(output, "checkpoint-" + os.environ["RANK"]).touch() or sys.exit(0))
output = Path(sys.argv[sys.argv.index("--output_dir") + 1])
output.mkdir(exist_ok=True)
with open(output / "metrics.jsonl", "a") as metrics:
    print(file=metrics)
time.sleep(180)
"""


@pytest.mark.slow
def test_ctrl_c_reaches_every_process_of_a_launcher(tmp_path):
    """The real launcher of two processes that stand for train.py's: each hears of it once, and the launcher waits for both."""
    training, python = tmp_path / "training.py", tmp_path / "python"
    training.write_text(TRAINING)
    python.write_text(f"""#!/usr/bin/env bash
words=()
for word in "$@"; do [ "$word" = "{ROOT}/train.py" ] && [ "$2" = accelerate.commands.launch ] && word="{training}"; words+=("$word"); done
exec {sys.executable} "${{words[@]}}"
""")
    python.chmod(0o755)
    interrupt("scripts/train/sd15_diffusion_dpo.sh", [], tmp_path / "out", NUM_PROCESSES="2", PYTHON=str(python))
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-1"}
