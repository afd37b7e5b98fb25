"""Checkpoints are whole or absent, and the wrong one is never taken or deleted."""

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from training.checkpoints import (PROGRESS, choose_checkpoint, continuing, fault, put_in_place, remove_leftovers, remove_older,
                                  starts_over, write_manifest)


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
    assert "checkpoint-30 is skipped: unet.pth has 5 bytes instead of 100" in capsys.readouterr().err
    with pytest.raises(UserError, match="unet.pth has 5 bytes"):  # a named one is not replaced by another
        choose_checkpoint("checkpoint-30", tmp_path)
    assert choose_checkpoint("checkpoint-2", tmp_path) == choose_checkpoint(str(first), Path("elsewhere")) == first
    assert choose_checkpoint("none", tmp_path) is None
    with pytest.raises(UserError, match="no such folder"):
        choose_checkpoint("checkpoint-99", tmp_path)


def test_hours_of_work_are_not_started_over_in_silence(tmp_path):
    (make(tmp_path, 4) / "manifest.json").unlink()
    with pytest.raises(UserError, match="start over with --resume_from_checkpoint none"):
        choose_checkpoint("latest", tmp_path)
    assert choose_checkpoint("latest", tmp_path / "new") is None


def test_words_for_going_on():
    assert continuing("latest") == "the same command continues from it" != continuing("checkpoint-5")
    assert starts_over("none") and starts_over(" None ") and starts_over("") and starts_over(None) and not starts_over("latest")


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
