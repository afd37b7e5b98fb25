"""A folder has one program at a time, and a killed one's is free at once."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from common.errors import UserError
from common.locks import hold, release

ASKER = """
import sys
from common.errors import UserError
from common.locks import hold
try:
    hold(sys.argv[1])
except UserError:
    sys.exit(7)
"""
HOLDER = """
import os, sys, time
from common.locks import hold
hold(sys.argv[1])
if os.fork() == 0:  # as a data worker, which outlives its killed parent for a while
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def test_another_program_is_refused_until_the_holder_is_gone(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match="another program is at work"):
            hold(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # the worker lives
        hold(tmp_path)
        hold(tmp_path)  # one's own is no hindrance
        assert subprocess.run([sys.executable, "-c", ASKER, str(tmp_path)]).returncode == 7
        release(tmp_path)
        assert subprocess.run([sys.executable, "-c", ASKER, str(tmp_path)]).returncode == 0
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    hold(tmp_path)
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
