"""A folder belongs to the run that began it: another is refused, and one begun anew loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.locks import release
from common.signals import StopSignal
from common.train_checks import parse_options
from tests.tasks import FAKE
from tests.training.test_checkpoints import make, names
from training.checkpoints import choose_checkpoint
from training.run import Run, changed_settings, settings_of_run, start_run, write_run_file
from training.state import find_checkpoint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def started(tmp_path):
    """started(*flags): a run in tmp_path, which is free again afterwards."""
    yield lambda *flags: start_run(parse_options([*FAKE, f"--output_dir={tmp_path}", *flags]), StopSignal())
    release(tmp_path)


def test_a_run_begun_anew_loses_nothing_of_the_earlier_one_and_takes_nothing_for_its_own(started, tmp_path, capsys):
    for step in (5, 10):
        make(tmp_path, step)
    for name in ("metrics.jsonl", "unet.pth", "mine.txt"):
        (tmp_path / name).write_text(name)
    write_run_file(started("--allow_changed_resume"), starts_over=True)
    assert names(tmp_path) == [".lock", "mine.txt", "replaced-1", "run.json"]
    assert names(tmp_path / "replaced-1") == ["checkpoint-10", "checkpoint-5", "metrics.jsonl", "unet.pth"]
    assert choose_checkpoint("latest", tmp_path) is None
    assert "Starting over: 2 checkpoint(s)" in capsys.readouterr().out
    (tmp_path / "run.json").write_text("{}")
    write_run_file(started(), starts_over=True)
    assert names(tmp_path / "replaced-2") == ["run.json"] and (tmp_path / "replaced-2" / "run.json").read_text() == "{}"


def test_a_run_that_goes_back_leaves_the_later_checkpoints_aside(started, tmp_path, capsys):
    for step in (5, 10, 20):
        make(tmp_path, step)
    assert find_checkpoint(started("--allow_changed_resume", "--max_train_steps=30")).name == "checkpoint-20"
    back = started("--allow_changed_resume", "--max_train_steps=30", "--resume_from_checkpoint=checkpoint-5")
    assert find_checkpoint(back).name == "checkpoint-5"
    assert names(tmp_path) == [".lock", "checkpoint-5", "replaced-1"]
    assert names(tmp_path / "replaced-1") == ["checkpoint-10", "checkpoint-20"]
    assert "Going on from checkpoint-5: 2 checkpoint(s)" in capsys.readouterr().out


def test_settings_are_found_without_run_json(started, tmp_path, capsys):
    assert settings_of_run(tmp_path) is None
    make(tmp_path, 5)
    assert settings_of_run(tmp_path) == {"beta_dpo": 5.0} and "run.json is missing or damaged" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"beta_dpo": 7.0')
    assert settings_of_run(tmp_path) == {"beta_dpo": 5.0}
    (tmp_path / "run.json").write_text('{"beta_dpo": 7.0, "num_processes": 1}')
    with pytest.raises(UserError, match=r"holds a different run \(beta_dpo was 7.0, is 2.0\)"):
        started("--beta_dpo=2")
    assert isinstance(started("--beta_dpo=2", "--allow_changed_resume"), Run)


def test_a_setting_that_only_one_version_knows_counts_as_unchanged():
    assert changed_settings({"beta_dpo": 5.0, "old": 1}, {"beta_dpo": 5.0, "new": 2}) == []
    assert changed_settings({"beta_dpo": 5.0, "a": 1}, {"beta_dpo": 2.0, "a": 1}) == ["beta_dpo was 5.0, is 2.0"]


def test_a_drawn_seed_is_the_runs_for_good(started, tmp_path):
    without = [flag for flag in FAKE if not flag.startswith("--seed")]
    first = start_run(parse_options([*without, f"--output_dir={tmp_path}"]), StopSignal())
    make(tmp_path, 5), write_run_file(first, starts_over=False)
    second = start_run(parse_options([*without, f"--output_dir={tmp_path}"]), StopSignal())
    assert second.seed == first.seed != start_run(parse_options([*without, f"--output_dir={tmp_path}/new"]), StopSignal()).seed


def test_a_folder_in_use_is_refused(started, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; from common.locks import hold; hold(sys.argv[1]); "
                               "print('held', flush=True); time.sleep(60)", str(tmp_path)], stdout=subprocess.PIPE, text=True,
                              cwd=Path(__file__).parents[2])
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another program is at work in"):
            started()
    finally:
        holder.kill()
        holder.wait()


def test_an_output_dir_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    run = start_run(parse_options([*FAKE, f"--output_dir={tmp_path / 'file' / 'run'}"]), StopSignal())
    with pytest.raises(UserError, match="cannot write to --output_dir"):
        write_run_file(run, starts_over=False)


def test_what_this_machine_lacks_is_told(tmp_path):
    for flags, said in ((["--report_to=nosuch"], "--report_to"), (["--mixed_precision=fp16"], "fp16")):
        if "fp16" in said and os.path.exists("/dev/nvidia0"):
            continue
        with pytest.raises(UserError, match=said):
            start_run(parse_options([*FAKE, f"--output_dir={tmp_path}", *flags]), StopSignal())


def test_run_json_holds_what_identifies_the_run(started, tmp_path):
    write_run_file(started("--beta_dpo=7"), starts_over=False)
    settings = json.loads((tmp_path / "run.json").read_text())
    assert settings["beta_dpo"] == 7.0 and settings["num_processes"] == 1 and "output_dir" not in settings
