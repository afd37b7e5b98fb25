"""Files that are whole or absent, folders, and the identity of what a file holds."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

SAMPLED_BLOCKS = 64
BLOCK_BYTES = 64 * 1024
MODEL_FILES = (".safetensors", ".bin", ".pth", ".pt", ".json", ".txt", ".model")


# --- writing -----------------------------------------------------------------------------------------------------------

@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to: renamed into place, synced, when the block ends; gone where it raises. So no
    reader ever sees half a file, and the file is as readable as any other."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o666 & ~_umask())
        sync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    with whole_file(path) as aside:
        aside.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, value: object) -> None:
    """JSON that every reader takes. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Force a file's, or a folder's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, flag: str) -> None:
    """Make the folder that `flag` names or needs, and those above it. Raises UserError when it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: the folder {folder} cannot be made ({error.strerror}): name another") from None


def make_room(file: str | os.PathLike, flag: str) -> None:
    """Make the folder of a file that will be written at the end. Raises UserError when there can be no such file."""
    make_folder(Path(file).parent, flag)
    if Path(file).is_dir():
        raise UserError(f"{flag}: {file} is a folder: name a file")


def make_readable(folder: Path) -> None:
    """Give the files below a folder the mode of any new file: safetensors makes its own private."""
    mode = 0o666 & ~_umask()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- reading -----------------------------------------------------------------------------------------------------------

def read_json(path: Path):
    """A JSON file's content; None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# --- identity ----------------------------------------------------------------------------------------------------------

def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's whole content."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def fingerprint(path: str | os.PathLike, only: Iterable[Path] | None = None) -> str:
    """Identity of a file's content, or of a model folder's files, that survives moving and costs no full read.

    A file: sha256 of its size and of 64 blocks of 64 KiB spread evenly over it (a file up to 4 MiB is read whole), so
    that a checkpoint of 5 GB takes milliseconds. A folder: the same of every weight and config file below it, or of
    those in `only`.
    """
    path = Path(path)
    sha = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*") if only is None else only):
            if file.is_file() and file.suffix in MODEL_FILES:
                sha.update(f"{file.relative_to(path).as_posix()} {fingerprint(file)}\n".encode())
        return sha.hexdigest()[:16]
    size = path.stat().st_size
    sha.update(str(size).encode())
    with open(path, "rb") as file:
        if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
            sha.update(file.read())
        else:
            for block in range(SAMPLED_BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                sha.update(file.read(BLOCK_BYTES))
    return sha.hexdigest()[:16]
