"""A run that was stopped and continued ends as one that never was; one that was changed is told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[2]

# Writes the position of every pair of every micro-batch to $POSITIONS.
KEEP_POSITIONS = """
import os
from training.guards import Guards
receive = Guards.receive
def keep(self, batch):
    with open(os.environ["POSITIONS"], "a") as file:
        file.write("".join(f"{position}\\n" for position in batch["position"].tolist()))
    return receive(self, batch)
Guards.receive = keep
"""


def weights(folder: Path) -> dict:
    return torch.load(folder / "unet.pth", weights_only=True)


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_a_signal_stops_with_a_checkpoint_and_workers_may_change(train_tiny, tmp_path):
    flags = ("--max_train_steps=16", "--gradient_accumulation_steps=2", "--checkpointing_steps=0", "--random_crop")
    train_tiny(tmp_path / "unbroken", *flags)
    losses = train_tiny.losses
    pids = train_tiny.start(tmp_path / "stopped", *flags, "--dataloader_num_workers=2")
    while len(train_tiny.losses_file.read_text().splitlines() if train_tiny.losses_file.is_file() else []) < 2:
        time.sleep(0.05)
    for process in [psutil.Process(pids[0]), *psutil.Process(pids[0]).children(recursive=True)]:
        process.send_signal(signal.SIGTERM)  # as some schedulers do: the data workers get it too
    output = train_tiny.wait(expect=0)
    stopped = [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")]
    assert "Stopped by SIGTERM" in output and len(stopped) == 1 and not (tmp_path / "stopped" / "unet.pth").exists()
    assert all(losses[step] | {"lr": 0} == scalars | {"lr": 0} or losses[step]["train_loss"] == scalars["train_loss"]
               for step, scalars in train_tiny.losses.items())
    train_tiny(tmp_path / "stopped", *flags)
    assert min(train_tiny.losses) == int(stopped[0].split("-")[1]) + 1
    assert all(losses[step]["train_loss"] == scalars["train_loss"] and losses[step]["grad_norm"] == scalars["grad_norm"]
               for step, scalars in train_tiny.losses.items())
    assert equal(weights(tmp_path / "unbroken"), weights(tmp_path / "stopped"))


@pytest.mark.slow
def test_changed_settings_are_named_and_with_leave_take_effect(train_tiny, tmp_path):
    positions = tmp_path / "positions"
    options = {"prelude": KEEP_POSITIONS, "POSITIONS": str(positions)}
    train_tiny(tmp_path / "run", "--max_train_steps=3", **options)
    changes = ("--max_train_steps=5", "--beta_dpo=2000", "--train_method=dmpo", "--dmpo_alpha=0.01")
    output = train_tiny(tmp_path / "run", *changes, expect=1)
    error = next(line for line in output.splitlines() if line.startswith("error:"))
    for change in ("beta_dpo was 5000.0, is 2000.0", "train_method was 'diffusion-dpo', is 'dmpo'", "dmpo_alpha was 0.0"):
        assert change in error
    output = train_tiny(tmp_path / "run", "--max_train_steps=5", processes=2, expect=1)
    assert "num_processes was 1, is 2" in output and output.count("error:") == 1

    # With leave: another batch and rate; no pair comes twice and none is left out.
    train_tiny(tmp_path / "run", "--max_train_steps=5", "--train_batch_size=3", "--learning_rate=3e-5",
               "--allow_changed_resume", **options)
    assert [int(line) for line in positions.read_text().split()] == list(range(6 + 6))
    assert train_tiny.losses[5]["lr"] == 3e-5
    progress = json.loads((tmp_path / "run" / "checkpoint-5" / "progress.json").read_text())
    assert progress["record"]["pairs_seen"] == 12


def test_another_accumulation_goes_on_learning_and_fewer_steps_are_refused(train_tiny, tmp_path):
    train_tiny(tmp_path, "--max_train_steps=1", "--gradient_accumulation_steps=3")
    train_tiny(tmp_path, "--max_train_steps=2", "--gradient_accumulation_steps=2", "--allow_changed_resume")
    assert not equal(weights(tmp_path), weights(tmp_path / "checkpoint-1"))
    output = train_tiny(tmp_path, "--max_train_steps=1", "--gradient_accumulation_steps=2", expect=1)
    assert "checkpoint-2 is beyond --max_train_steps 1" in output


def test_data_that_changed_under_the_same_name_is_told(train_tiny, tmp_path):
    from shapes.pairs import write_pairs

    write_pairs(tmp_path / "pairs", 20, seed=0)
    train_tiny(tmp_path / "run", "--max_train_steps=1", pairs=tmp_path / "pairs")
    write_pairs(tmp_path / "pairs", 20, seed=1)
    output = train_tiny(tmp_path / "run", "--max_train_steps=2", pairs=tmp_path / "pairs", expect=1)
    assert "has changed since the checkpoint was made" in output and "--allow_changed_resume" in output


@pytest.mark.slow
def test_torture_short_form():
    """scripts/torture.sh: SIGKILLs, signals, 20 damaged checkpoints and a full disk."""
    result = subprocess.run(["bash", "scripts/torture.sh", "--short", "--kills", "2"], cwd=ROOT, capture_output=True, text=True, timeout=500,
                            env=os.environ | {"PYTHON": sys.executable})
    assert result.returncode == 0 and re.search(r"PASSED: 2 SIGKILLs, (\d+) of \1 runs bit-equal", result.stdout), (
        result.stdout[-3000:] + result.stderr[-3000:])
    assert "20 of 20 corrupted checkpoints recognised, full disk survived" in result.stdout
