"""Progress bars: often on a terminal, seldom in a file."""

import sys

from tqdm import tqdm

IN_A_FILE = 10.0  # seconds between two lines


def progress_bar(*values, **settings) -> tqdm:
    """tqdm, which prints every 10 seconds where stderr is a file, so that a log of hours stays readable."""
    terminal = sys.stderr.isatty()
    return tqdm(*values, mininterval=0.1 if terminal else IN_A_FILE, maxinterval=IN_A_FILE, dynamic_ncols=terminal,
                **settings)
