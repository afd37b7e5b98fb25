"""Errors are one line: the user's own, a full disk's, a lost process's."""

import shutil
from types import SimpleNamespace

import pytest

from common.errors import UserError, lost_process, own_message, run_program, write_fault


def test_what_a_message_quotes_cannot_move_a_cursor():
    assert str(UserError("no \x1b[2J\n such\ud800")) == r"no \x1b[2J\n such\ud800"


def test_a_data_workers_error_is_told_without_its_traceback():
    wrapped = UserError("Caught UserError in DataLoader worker process 0.\nTraceback ...\ncommon.errors.UserError: gone\n")
    assert own_message(wrapped) == "gone" and own_message(UserError("gone")) == "gone"


@pytest.mark.parametrize("raised, code, said", [
    (UserError("no such thing"), 1, "error: no such thing\n"),
    (OSError(28, "No space left on device", "out.bin"), 1, "error: cannot write (out.bin): No space left on device"),
    (ModuleNotFoundError("No module named 'diffusers'", name="diffusers.models"), 1, "error: the package diffusers is not installed"),
    (KeyboardInterrupt(), 130, ""),
])
def test_a_program_ends_with_one_line_and_a_code(raised, code, said, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as end:
        run_program(main)
    assert end.value.code == code and capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("bug", [OSError(5, "Input/output error"), ModuleNotFoundError("no", name="training.gone"),
                                 ModuleNotFoundError("no", name="train")])
def test_our_own_bugs_keep_their_traceback(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        run_program(main)
    for result, code in ((None, 0), (3, 3)):
        with pytest.raises(SystemExit) as end:
            run_program(lambda: result)
        assert end.value.code == code


def test_a_full_disk_is_named_whoever_tells_of_it(tmp_path, monkeypatch):
    assert write_fault(OSError(28, "No space left on device"), tmp_path) == "No space left on device"
    torchs = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")
    assert "enforce fail" in write_fault(torchs, tmp_path / "not" / "there")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert write_fault(torchs, tmp_path) == "No space left on device"


@pytest.mark.parametrize("text, words", [
    ("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv", "--process_timeout"),
    ("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5", "lost the connection"),
    ("NCCL error in ProcessGroupNCCL.cpp, remote process exited", "lost the connection"),
    ("mat1 and mat2 shapes cannot be multiplied", None),
    ("DataLoader timed out after 10 seconds", None),
])
def test_a_lost_process_is_told_from_other_errors(text, words):
    told = lost_process(RuntimeError(text))
    assert told is None if words is None else words in told
