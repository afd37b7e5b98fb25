"""Progress bars: seldom in a file."""

import io
import time

from common import progress


def lines(monkeypatch, seconds: float) -> int:
    """What a bar of 50 turns leaves in a file when it prints every `seconds`."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "IN_A_FILE", seconds)
    monkeypatch.setattr(progress.sys, "stderr", file)
    for _ in progress.progress_bar(range(50), file=file):
        time.sleep(0.002)
    return file.getvalue().count("\r")


def test_a_file_gets_a_line_every_ten_seconds(monkeypatch):
    assert progress.IN_A_FILE == 10
    assert lines(monkeypatch, 10) == 2  # the first and the last
    assert lines(monkeypatch, 0.01) > 3
