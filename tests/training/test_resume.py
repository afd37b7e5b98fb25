"""A run that was stopped and continued ends as one that never was; one that was changed is told."""

import json
import re
import signal
import time

import psutil
import pytest

from common.errors import UserError
from shapes.pairs import write_pairs
from tests.runs import continue_from, equal, weights


def scalars(logs: list[dict]) -> list[tuple]:
    return [(step["train_loss"], step["grad_norm"], step["margin_mean"], step["lr"], step["pairs_seen"]) for step in logs]


def test_a_resumed_run_ends_as_the_unbroken_one(unbroken, train_run, tmp_path):
    continue_from(unbroken.output, tmp_path / "run", "checkpoint-4", "checkpoint-6")
    logs = train_run([*unbroken.flags, "--output_dir", tmp_path / "run"])
    assert len(logs) == 4 and scalars(logs) == scalars(unbroken.logs[2:])
    assert equal(weights(tmp_path / "run"), weights(unbroken.output))
    for step in (4, 6):
        assert equal(weights(tmp_path / "run" / f"checkpoint-{step}"), weights(unbroken.output / f"checkpoint-{step}"))


def test_a_signal_stops_with_a_checkpoint_and_workers_may_change(unbroken, train_run, train_tiny, tmp_path):
    flags = [*map(str, unbroken.flags), "--max_train_steps=16", "--checkpointing_steps=0"]
    pids = train_tiny.start(tmp_path / "stopped", *flags, "--dataloader_num_workers=2")
    while len(train_tiny.losses_file.read_text().splitlines() if train_tiny.losses_file.is_file() else []) < 2:
        time.sleep(0.05)
    for process in [psutil.Process(pids[0]), *psutil.Process(pids[0]).children(recursive=True)]:
        process.send_signal(signal.SIGTERM)  # as some schedulers do: the data workers get it too
    output = train_tiny.wait(expect=0)
    [stopped] = (tmp_path / "stopped").glob("checkpoint-*")
    assert "Stopped by SIGTERM" in output and not (tmp_path / "stopped" / "unet.pth").exists()
    before = train_tiny.losses
    after = train_run([*flags, "--output_dir", tmp_path / "stopped"])
    whole = train_run([*flags, "--output_dir", tmp_path / "whole"])
    assert max(before) == int(stopped.name.split("-")[1]) == 16 - len(after)
    assert [before[step]["train_loss"] for step in sorted(before)] == [step["train_loss"] for step in whole[:len(before)]]
    assert scalars(after) == scalars(whole[len(before):])
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


def test_changed_settings_are_named_and_with_leave_take_effect(unbroken, train_run, tmp_path):
    continue_from(unbroken.output, tmp_path / "run", "checkpoint-4", "checkpoint-6")
    same = [*unbroken.flags, "--output_dir", tmp_path / "run"]
    with pytest.raises(UserError) as error:
        train_run([*same, "--beta_dpo", 2000, "--train_method", "dmpo", "--dmpo_alpha", 0.01])
    for change in ("beta_dpo was 5000.0, is 2000.0", "train_method was 'diffusion-dpo', is 'dmpo'", "dmpo_alpha was 0.0"):
        assert change in str(error.value)

    # With leave: another batch, accumulation and rate; no pair comes twice and none is left out.
    from training.guards import BadPairs
    positions, receive = [], BadPairs.receive

    def keep(self, batch):
        positions.extend(batch["position"].tolist())
        return receive(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BadPairs, "receive", keep)
        logs = train_run([*same, "--max_train_steps", 4, "--train_batch_size", 3, "--gradient_accumulation_steps", 3,
                          "--learning_rate", 3e-5, "--allow_changed_resume"])
    assert positions == list(range(8, 8 + 2 * 9)) and logs[-1]["lr"] == 3e-5
    progress = json.loads((tmp_path / "run" / "checkpoint-4" / "progress.json").read_text())
    assert progress["record"]["pairs_seen"] == 8 + 18
    assert not equal(weights(tmp_path / "run"), weights(tmp_path / "run" / "checkpoint-2"))


def test_another_number_of_processes_is_told_once(unbroken, train_tiny, tmp_path):
    continue_from(unbroken.output, tmp_path / "run", "checkpoint-4", "checkpoint-6")
    output = train_tiny(tmp_path / "run", "--gradient_accumulation_steps=2", "--random_crop", "--beta_dpo=5000", processes=2, expect=1)
    assert "num_processes was 1, is 2" in output and output.count("error:") == 1


def test_data_that_changed_under_the_same_name_is_told(train_run, tiny_sd15, tmp_path):
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", tmp_path / "pairs", "--resolution", 64,
             "--mixed_precision", "no", "--output_dir", tmp_path / "run"]
    write_pairs(tmp_path / "pairs", 20, seed=0)
    train_run([*flags, "--max_train_steps", 1])
    write_pairs(tmp_path / "pairs", 20, seed=1)
    with pytest.raises(UserError, match="has changed since the checkpoint was made.*--allow_changed_resume"):
        train_run([*flags, "--max_train_steps", 2])
    assert len(train_run([*flags, "--max_train_steps", 2, "--allow_changed_resume"])) == 1


@pytest.mark.slow
def test_torture_short_form(run):
    """scripts/torture.sh: SIGKILLs, signals, 20 damaged checkpoints and a full disk."""
    result = run(["bash", "scripts/torture.sh", "--short", "--kills", "2"], timeout=500)
    assert re.search(r"PASSED: 2 SIGKILLs, (\d+) of \1 runs bit-equal", result.stdout), (
        result.stdout[-3000:] + result.stderr[-3000:])
    assert "20 of 20 corrupted checkpoints recognised, full disk survived" in result.stdout
