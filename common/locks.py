"""One run at a time in a folder: a lock that ends with its process, however that ends."""

import os
from pathlib import Path

from common.errors import UserError, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
_held: dict[Path, object] = {}  # folder -> open file: closing it gives the lock up


def hold(folder: str | os.PathLike, flag: str = "--output_dir") -> None:
    """Hold `folder` until release(folder) or this process's end; a folder that cannot be written is left alone. Raises
    UserError where another process holds it.

    The lock is POSIX's (lockf), which data workers do not inherit, since they may outlive a killed run by seconds; flock,
    and the filelock package with it, would keep the folder from the run that continues it.
    """
    path = Path(folder).resolve()
    if fcntl is None or path in _held:
        return
    try:
        file = open(path / LOCK_FILE, "a", encoding="utf-8")
    except OSError:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"another program is at work in {folder}: wait until it ends, or choose another {flag}") from None
    except OSError as error:  # a file system without locks
        warn(f"{folder} cannot be locked ({error.strerror}): make sure that no second program works there")
    _held[path] = file


def release(folder: str | os.PathLike) -> None:
    """Let other programs have `folder`."""
    file = _held.pop(Path(folder).resolve(), None)
    if file is not None:
        file.close()
