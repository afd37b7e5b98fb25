"""Progress bars: often on a terminal, seldom in a file."""

import sys

from tqdm import tqdm

IN_A_FILE = 10.0  # seconds between two lines


def progress_bar(*values, **settings) -> tqdm:
    """tqdm, which prints every 10 seconds where stderr is a file, so that a log of hours stays readable."""
    terminal = sys.stderr.isatty()
    return tqdm(*values, mininterval=0.1 if terminal else IN_A_FILE, maxinterval=IN_A_FILE, dynamic_ncols=terminal,
                **settings)


def duration(seconds: float) -> str:
    """"3 days 4 h", "2 h 5 min", "3 min 20 s", "14 s"."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days >= 2:
        return f"{days} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.0f} s"
