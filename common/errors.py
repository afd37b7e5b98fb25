"""Input errors are reported in one line; a traceback is kept for our own bugs."""

import errno
import json
import logging
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Callable, NoReturn


class UserError(Exception):
    """Something the user can put right. The message is one line: the cause, then the remedy; what it quotes of a file, such
    as a line break or a terminal's control character, is shown escaped."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` with line breaks, control characters and lone surrogates escaped: what a file holds cannot move a cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException, longest: int = 1000) -> str:
    """The first non-empty line of an error's message, up to a whole word, to quote another library's error inside ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], longest, placeholder=" ...") if lines else type(error).__name__


def quiet_libraries() -> None:
    """No progress bars but our own. Takes effect where the libraries are imported later, too."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):  # of torchao's parts, where it is
        logging.getLogger(name).setLevel(logging.ERROR)


def warn(message: str) -> None:
    """One line on stderr, from one process of the node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def write_fault(error: Exception, folder: Path) -> str:
    """Why a file could not be written, in one line: torch names a full disk only as a failed write."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    if shutil.disk_usage(existing).free < 2**20 or "No space left" in str(error):
        return "No space left on device"
    return first_line(error, 200)


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's main() and exit with its code (None counts as 0).

    A UserError ends in `error: ...` on stderr and exit code 1; a full disk and a lost process likewise; Ctrl-C exits
    130.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        fail(own_message(error), wait=0.0 if os.environ.get("LOCAL_RANK", "0") == "0" else 2.0)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if not package or list(Path(__file__).parents[1].glob(f"{package}*")):  # our own
            raise
        fail(f"the package {package} is not installed: pip install -r requirements.txt")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        fail(f"cannot write{where}: {error.strerror}. Free some space or choose another folder; what was finished is "
             "kept.")
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        fail(lost, wait=5.0)


def fail(message: str, wait: float = 0.0) -> NoReturn:
    """Report an error and exit with code 1.

    Of several processes the launcher ends the others once one has exited: those that only follow another one's error,
    or have the same, wait for that, so that the cause is reported, and once.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file and not wait >= 5.0:  # the launcher's report quotes it
        try:
            with open(error_file, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)
        except OSError:
            pass
    sys.stdout.flush()
    time.sleep(wait)
    new_line = "\n" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""  # another process's progress bar may stand there
    print(f"{new_line}error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


def own_message(error: UserError) -> str:
    """The message; torch wraps one that a data worker raised in that worker's traceback."""
    text = str(error)
    if text.startswith("Caught UserError in DataLoader worker"):
        return text.rpartition("UserError: ")[2].removesuffix("\\n")
    return text


def lost_process(error: RuntimeError) -> str | None:
    """What to report when a collective failed because another process is gone or late; None for any other error."""
    text, rank = str(error), os.environ.get("RANK", "0")
    if "gloo" not in text and "NCCL" not in text and all(kind.__name__ != "DistError" for kind in type(error).__mro__):
        return None
    if "timed out" in text.lower() or "timeout" in text.lower():
        return (f"process {rank} waited for another one for longer than --process_timeout, and gave up: one is stuck, "
                f"or they disagree on the number of batches ({first_line(error, 160)})")
    return f"process {rank} lost the connection to another one, which has ended ({first_line(error, 160)})"
