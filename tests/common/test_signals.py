"""A run outlasts the terminal or the pipe that shows it, and saves."""

import os
import pty
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, time
from common.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while stop.name is None:
        print("step", file=sys.stderr, flush=True)
        time.sleep(0.05)
    print("saving", flush=True)
    open(sys.argv[1], "w").write(stop.name)
print("done", flush=True)
"""


@pytest.mark.parametrize("reader", ["pipe", "terminal"])
def test_a_run_saves_though_nobody_reads_what_it_prints(reader, tmp_path):
    read, write = pty.openpty() if reader == "terminal" else os.pipe()
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "saved")], stdout=write, stderr=write,
                           start_new_session=True)
    os.close(write)
    assert b"ready" in os.read(read, 5)  # it has begun
    os.close(read)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=0.5)  # it goes on
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 0
    assert (tmp_path / "saved").read_text() == "SIGTERM"
