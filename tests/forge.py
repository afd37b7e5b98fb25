"""Launches of train.py and the other programs that cost a second instead of ten: processes forked from one that has done the imports.

Each rank is a process of its own session with the environment that torchrun gives it, and runs the program's own main().
As a program this is a server for tests: a JSON object a line on stdin, its process ids and then its exit codes on stdout.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Launch:
    """argv: the program's flags; program: its module, run by its main(). log: where its output goes; losses: where every step's scalars are kept, if anywhere.
    prelude: code that is run before main(), to break something. environment: added to it."""

    argv: list[str]
    program: str = "train"
    processes: int = 1
    log: str = os.devnull
    losses: str | None = None
    prelude: str = ""
    environment: dict[str, str] = field(default_factory=dict)


exit_codes: dict[int, int] = {}  # of the last launch's processes that have ended


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(launch: Launch) -> list[int]:
    """Fork the ranks of a launch; returns their process ids."""
    sys.stdout.flush()
    exit_codes.clear()
    port, pids = free_port(), []
    for rank in range(launch.processes):
        pid = os.fork()
        if pid == 0:
            _become_rank(launch, rank, port)
        pids.append(pid)
    return pids


def _become_rank(launch: Launch, rank: int, port: int) -> None:
    code = 1
    try:
        os.setsid()
        log = os.open(launch.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ |= {"ACCELERATE_USE_CPU": "true"} | launch.environment
        if launch.processes > 1:
            world = str(launch.processes)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from accelerate import Accelerator

        from common.errors import run_program

        def keep(accelerator, values, step=None, **_):
            if accelerator.is_main_process and "train_loss" in values:
                with open(launch.losses, "a") as file:
                    file.write(json.dumps({"step": step} | {name: value.hex() for name, value in values.items()}) + "\n")

        if launch.losses:
            Accelerator.log = keep
        exec(launch.prelude, {"__name__": "prelude"})
        sys.argv = [launch.program, *launch.argv]
        run_program(importlib.import_module(launch.program).main)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int], seconds: float = 300.0, end_others: bool = False) -> list[int] | None:
    """Exit codes (negative: the signal), or None when a process still runs after that time.

    end_others: when one fails, end the others, as launchers do: SIGTERM, and SIGKILL after a while (here 5 s).
    """
    end, failed_at = time.monotonic() + seconds, None
    while running := [pid for pid in pids if pid not in exit_codes]:
        for pid in running:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                exit_codes[pid] = os.waitstatus_to_exitcode(status)
                if end_others and exit_codes[pid] and failed_at is None:
                    failed_at = time.monotonic()
                    for other in running:
                        if other not in exit_codes:
                            os.kill(other, signal.SIGTERM)
        if failed_at and time.monotonic() > failed_at + 5.0:
            kill([pid for pid in running if pid not in exit_codes])
        if time.monotonic() > end:
            return None
        time.sleep(0.005)
    return [exit_codes[pid] for pid in pids]


def kill(pids: list[int]) -> None:
    """SIGKILL to processes and their data workers."""
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if pid not in exit_codes:
            exit_codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Server:
    """A forge in a process of its own, for tests: their process has threads, which do not survive a fork. python: a warm one,
    which has done the imports."""

    def __init__(self, python: str):
        self.process = subprocess.Popen([python, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        start_new_session=True)

    def start(self, launch: Launch, seconds: float = 200.0) -> list[int]:
        self.process.stdin.write(json.dumps(vars(launch) | {"seconds": seconds}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self) -> list[int] | None:
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.process.wait(timeout=60)


class TinyTraining:
    """train.py with the tiny pipeline's settings; `output` and `losses` (by step) tell what the last launch did."""

    def __init__(self, server: Server, base: Path, pairs: Path, folder: Path):
        self.server, self.base, self.pairs = server, base, pairs
        self.log, self.losses_file = folder / "log", folder / "losses"
        self.output, self.losses = "", {}

    def start(self, output: Path, *flags: str, processes: int = 1, pairs: Path | None = None, prelude: str = "",
              **environment: str) -> list[int]:
        """Process ids of a launch with these flags; `prelude` is code that is run before it, to break something."""
        argv = [f"--pretrained_model_name_or_path={self.base}", f"--train_data_dir={pairs or self.pairs}",
                f"--output_dir={output}", "--resolution=64", "--mixed_precision=no", "--learning_rate=1e-4", "--seed=1",
                "--lr_warmup_steps=0", "--max_train_steps=4", "--train_batch_size=2", "--report_to=none", *flags]
        for path in (self.log, self.losses_file):
            path.unlink(missing_ok=True)
        environment = {"HF_DATASETS_CACHE": os.environ["HF_DATASETS_CACHE"]} | environment
        return self.server.start(Launch(argv, "train", processes, str(self.log), str(self.losses_file), prelude, environment))

    def wait(self, expect: int = 0) -> str:
        """Wait for the launch's end, assert its exit code and return what it printed."""
        codes = self.server.wait()
        self.output = self.log.read_text(errors="replace").replace("\r", "\n") if self.log.is_file() else ""
        lines = self.losses_file.read_text().splitlines() if self.losses_file.is_file() else []
        self.losses = {step.pop("step"): {name: float.fromhex(value) for name, value in step.items()}
                       for step in map(json.loads, lines)}
        assert codes is not None and (expect in codes if expect else not any(codes)), f"{codes}\n{self.output[-4000:]}"
        return self.output

    def __call__(self, *args, expect: int = 0, **options) -> str:
        self.start(*args, **options)
        return self.wait(expect)


def serve() -> None:
    while (line := sys.stdin.readline()).strip():  # an empty one ends it: data workers of the tests may hold the pipe open
        request = json.loads(line)
        seconds = request.pop("seconds")
        pids = start(Launch(**request))
        print(json.dumps(pids), flush=True)
        codes = wait(pids, seconds, end_others=True)
        if codes is None:
            kill(pids)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
