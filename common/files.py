"""Files that are either whole or absent, and the identity of what a file holds."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError

SAMPLED_BLOCKS = 64
BLOCK_BYTES = 64 * 1024
MODEL_FILES = (".safetensors", ".bin", ".pth", ".pt", ".json", ".txt", ".model")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` aside, flush it to the disk and rename it into place: no reader ever sees half a file."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


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


def write_json(path: Path, value: object) -> None:
    """JSON that every reader takes. Raises ValueError for NaN and infinities."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path):
    """A JSON file's content; None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fingerprint(path: str | os.PathLike, only: Iterable[Path] | None = None) -> str:
    """Identity of a file's content, or of a model folder's files, that survives moving and costs no full read.

    A file: sha256 of its size and of 64 blocks of 64 KiB spread evenly over it (a file up to 4 MiB is read whole), so
    that a checkpoint of 5 GB takes milliseconds. A folder: the same of every weight and config file below it, or of
    those in `only`.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*") if only is None else only):
            if file.is_file() and file.suffix in MODEL_FILES:
                digest.update(f"{file.relative_to(path).as_posix()} {fingerprint(file)}\n".encode())
        return digest.hexdigest()[:16]
    size = path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
        else:
            for block in range(SAMPLED_BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]
