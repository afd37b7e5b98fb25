"""One run at a time in a folder: a lock that ends with its process, however that ends."""

import os
from pathlib import Path

from training.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
_held = []  # open files: closing one would give its lock up


def hold(folder: str | os.PathLike, flag: str = "--output_dir") -> None:
    """Hold `folder` until this process ends. Raises UserError where another process holds it, OSError where no file can be
    written there.

    The lock is POSIX's, which data workers do not inherit: they may outlive a killed run by seconds.
    """
    if fcntl is None:
        return
    file = open(Path(folder, LOCK_FILE), "a", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"another program is at work in {folder}: wait until it ends, or choose another {flag}") from None
    except OSError:
        pass  # a file system without locks
    _held.append(file)
