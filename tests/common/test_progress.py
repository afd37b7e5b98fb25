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


def test_durations_in_words():
    assert [progress.duration(seconds) for seconds in (3.4, 59.9, 119, 7500, 100_000, 400_000)] == [
        "3 s", "60 s", "1 min 59 s", "2 h 5 min", "27 h 46 min", "4 days 15 h"]


def test_a_file_gets_a_line_every_ten_seconds(monkeypatch):
    assert progress.IN_A_FILE == 10
    assert lines(monkeypatch, 10) == 2  # the first and the last
    assert lines(monkeypatch, 0.01) > 3
