"""Faults of the input are told in one line; a traceback is kept for our own bugs."""

import errno
import sys
from typing import Callable


class UserError(Exception):
    """Something the user can mend. The message is one line: the cause, then the remedy."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, for quoting another library's error inside ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's main() and exit with its code (None counts as 0).

    A UserError ends in `error: ...` on stderr and exit code 1; a full disk likewise; Ctrl-C exits 130.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: cannot write{where}: {error.strerror}. Free some space or choose another folder; "
              "what was finished is kept.", file=sys.stderr, flush=True)
        sys.exit(1)
