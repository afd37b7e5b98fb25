"""Checkpoints are whole or absent, and the wrong one is never taken or deleted."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from training.checkpoints import (PROGRESS, choose_checkpoint, claim_output_dir, continuing, fault, find_checkpoint,
                                  list_checkpoints, put_in_place, remove_leftovers, remove_older, settings_of_run,
                                  write_fault, write_manifest, write_run_file)
from common.errors import UserError


def make(output: Path, step: int, name: str | None = None) -> Path:
    folder = output / (name or f"checkpoint-{step}")
    folder.mkdir(parents=True)
    (folder / "unet.pth").write_bytes(os.urandom(100))
    progress = {"step": step, "lr_scheduler": {}, "settings": {"beta_dpo": 5.0}, "record": {}}
    (folder / PROGRESS).write_text(json.dumps(progress))
    write_manifest(folder)
    return folder


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def test_the_newest_good_one_is_taken(tmp_path, capsys):
    first, second, third = (make(tmp_path, step) for step in (2, 10, 30))
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / ".checkpoint-40.partial").mkdir()
    assert choose_checkpoint("latest", tmp_path) == third
    (third / "unet.pth").write_bytes(b"short")
    assert choose_checkpoint("latest", tmp_path) == second
    assert "checkpoint-30 is passed over: unet.pth has 5 bytes instead of 100" in capsys.readouterr().err
    with pytest.raises(UserError, match="unet.pth has 5 bytes"):  # a named one is not replaced by another
        choose_checkpoint("checkpoint-30", tmp_path)
    assert choose_checkpoint("checkpoint-2", tmp_path) == choose_checkpoint(str(first), Path("elsewhere")) == first
    assert choose_checkpoint("none", tmp_path) is None
    with pytest.raises(UserError, match="no such folder"):
        choose_checkpoint("checkpoint-99", tmp_path)


def test_hours_of_work_are_not_started_anew_in_silence(tmp_path):
    (make(tmp_path, 4) / "manifest.json").unlink()
    with pytest.raises(UserError, match="start anew with --resume_from_checkpoint none"):
        choose_checkpoint("latest", tmp_path)
    assert choose_checkpoint("latest", tmp_path / "new") is None


def in_folder(tmp_path, wanted, steps=0):
    return SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=wanted, max_train_steps=steps)


def test_a_run_begun_anew_loses_nothing_of_the_earlier_one_and_takes_nothing_for_its_own(tmp_path, capsys):
    for step in (5, 10):
        make(tmp_path, step)
    for name in ("run.json", "metrics.jsonl", "unet.pth", "mine.txt"):
        (tmp_path / name).write_text(name)
    write_run_file(in_folder(tmp_path, "none"), Accelerator(cpu=True))
    assert names(tmp_path) == [".lock", "mine.txt", "replaced-1", "run.json"]
    assert names(tmp_path / "replaced-1") == ["checkpoint-10", "checkpoint-5", "metrics.jsonl", "run.json", "unet.pth"]
    assert (tmp_path / "replaced-1" / "run.json").read_text() == "run.json" != (tmp_path / "run.json").read_text()
    assert choose_checkpoint("latest", tmp_path) is None
    assert "Starting anew: 2 checkpoint(s)" in capsys.readouterr().out
    write_run_file(in_folder(tmp_path, "none"), Accelerator(cpu=True))
    assert names(tmp_path / "replaced-2") == ["run.json"]


def test_a_run_that_goes_back_leaves_the_later_checkpoints_aside(tmp_path, capsys):
    for step in (5, 10, 20):
        make(tmp_path, step)
    assert find_checkpoint(in_folder(tmp_path, "latest"), Accelerator(cpu=True)).name == "checkpoint-20"
    assert find_checkpoint(in_folder(tmp_path, "checkpoint-5"), Accelerator(cpu=True)).name == "checkpoint-5"
    assert names(tmp_path) == ["checkpoint-5", "replaced-1"]
    assert names(tmp_path / "replaced-1") == ["checkpoint-10", "checkpoint-20"]
    assert "Going on from checkpoint-5: 2 checkpoint(s)" in capsys.readouterr().out
    assert continuing("latest") == "the same command continues from it" != continuing("checkpoint-5")


def test_pruning_spares_the_newest_and_what_is_ahead(tmp_path):
    """A run that resumed before a damaged checkpoint-30 reaches 20: 30 is no reason to delete 20."""
    for step in (5, 10, 20, 30):
        make(tmp_path, step)
    (tmp_path / "checkpoint-30" / "unet.pth").unlink()
    remove_older(tmp_path / "checkpoint-20", 20, limit=1)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30"]


def test_nothing_is_deleted_for_a_checkpoint_that_reads_back_damaged(tmp_path):
    make(tmp_path, 5), make(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "unet.pth").write_bytes(os.urandom(100))
    with pytest.raises(OSError, match="reads back damaged"):
        remove_older(tmp_path / "checkpoint-10", 10, limit=1)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-5"]


def test_a_checkpoint_of_the_same_step_makes_way(tmp_path):
    old = make(tmp_path, 5)
    (old / "unet.pth").unlink()
    put_in_place(make(tmp_path, 5, ".checkpoint-5.partial"), old)
    assert fault(old) is None and names(tmp_path) == ["checkpoint-5"]


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path):
    make(tmp_path, 5), make(tmp_path, 6, ".checkpoint-6.partial"), make(tmp_path, 4, ".checkpoint-4.old")
    (tmp_path / ".hidden").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "checkpoint-5"]


def test_settings_are_found_without_run_json(tmp_path):
    assert settings_of_run(tmp_path) is None
    make(tmp_path, 5)
    assert settings_of_run(tmp_path) == {"beta_dpo": 5.0}
    (tmp_path / "run.json").write_text('{"beta_dpo": 7.0')
    assert settings_of_run(tmp_path) == {"beta_dpo": 5.0}
    (tmp_path / "run.json").write_text('{"beta_dpo": 7.0, "num_processes": 1}')
    args = SimpleNamespace(output_dir=str(tmp_path), seed=None, allow_changed_resume=False, beta_dpo=2.0,
                           resume_from_checkpoint="none")
    with pytest.raises(UserError, match=r"beta_dpo was 7.0, is 2.0"):
        claim_output_dir(args, SimpleNamespace(num_processes=1, is_main_process=True))


def test_a_full_disk_is_named_whoever_tells_of_it(tmp_path, monkeypatch):
    assert write_fault(OSError(28, "No space left on device"), tmp_path) == "No space left on device"
    torchs = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")
    assert "enforce fail" in write_fault(torchs, tmp_path / "not" / "there")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert write_fault(torchs, tmp_path) == "No space left on device"


def test_an_output_dir_that_cannot_be_written_is_told_before_training(train_tiny, tmp_path):
    (tmp_path / "file").write_text("")
    output = train_tiny(tmp_path / "file" / "run", expect=1)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "cannot write to --output_dir" in errors[0] and "step/s" not in output


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.slow
def test_a_pickle_in_a_checkpoint_is_refused_and_does_not_run(train_tiny, tmp_path):
    """The manifest is made anew, as an attacker would, so that the digests fit."""
    mark = tmp_path / "payload-ran"
    train_tiny(tmp_path / "run", "--max_train_steps=1")
    for file in ("unet.pth", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        output = tmp_path / "copy"
        shutil.copytree(tmp_path / "run" / "checkpoint-1", output / "checkpoint-1")
        checkpoint = list_checkpoints(output)[0]
        torch.save({"state": Payload(mark)}, checkpoint / file)
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
        assert fault(checkpoint) is None
        said = train_tiny(output, "--max_train_steps=2", expect=1)
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and "Traceback" not in said, said
        assert not mark.exists()
        shutil.rmtree(output)
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # it does run where it is let
