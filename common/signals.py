"""SIGTERM (preemption) and SIGINT (Ctrl-C) ask a run to stop at its next step; one more ends it at once."""

import atexit
import errno
import multiprocessing
import os
import signal
import sys
import time

SAME_REQUEST_SECONDS = 1.0  # Ctrl-C reaches a process twice, from the terminal and from its launcher


class LastingStream:
    """A standard stream that falls silent when its terminal is closed or its pipe's reader ends, so that the run goes on
    to save."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call, *args) -> None:
        try:
            call(*args)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self.stream.fileno())
            os.close(silence)


class StopSignal:
    """Use as a context, in which standard streams outlast their readers. `name` is None until a signal came, then
    "SIGTERM" or "SIGINT"."""

    def __init__(self):
        self.name: str | None = None
        self.received_at = 0.0
        self.previous = {}

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
        return self

    def __exit__(self, *exception) -> None:
        sys.stdout, sys.stderr = self.streams
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.name is None:
            self.name, self.received_at = signal.Signals(number).name, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                message = f"\n{self.name}: stopping after this step with a checkpoint; once more ends the run at once\n"
                try:
                    os.write(2, message.encode())
                except OSError:  # nobody reads it
                    pass
        elif time.monotonic() - self.received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_run_has_ended = multiprocessing.RawValue("b", 0)  # shared with data workers
atexit.register(lambda: setattr(_run_has_ended, "value", 1))


def outlive_signals(worker: int) -> None:
    """For data workers: they serve until the run stops, though a scheduler or a terminal sends them its signal too.

    They leave the run's process group, ignore SIGINT, and obey SIGTERM once their parent is ending, which is how
    multiprocessing then ends them.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if _run_has_ended.value else None)
