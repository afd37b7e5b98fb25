"""A `python` whose programs start warm: a stand-in for PYTHON that has them forked from a process that has done the imports.

It takes what scripts ask of Python (-m MODULE, -c CODE, FILE), in their folder, environment and streams, passes signals on
and ends as the program does. Programs whose processes are looked for by their ids want the real one.
"""

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import common.signals  # noqa: E402

COLD = sys.executable
# What train.py and data.cache import once their options are good.
HEAVY = ("models.stable_diffusion", "training.run", "training.fit", "training.preference", "training.result", "data.encode")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
passed_on = [n for n in (1, 2, 10, 12, 15) if signal.getsignal(n) != signal.SIG_IGN]
request = {{"argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ), "signals": passed_on}}
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
pid = int(server.recv(32))
for number in passed_on:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(server.recv(32) or 1)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def start(folder: Path) -> None:
    """Write folder/python, the program to take for Python, and start what serves it, for as long as the tests run."""
    folder.mkdir()
    client, address = folder / "python", str(folder / "address")
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        subprocess.Popen([sys.executable, __file__, str(listener.fileno()), str(owner)], cwd=ROOT, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=[listener.fileno()],
                         env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)})


def import_heavy() -> None:
    """Once, for all that are forked from this process."""
    for module in HEAVY:
        importlib.import_module(module)


def serve(descriptor: int, owner: int) -> None:
    """Fork a program for every client of that socket, until the owner's process has ended."""
    import_heavy()
    gc.collect()
    gc.freeze()
    listener = socket.socket(fileno=descriptor)
    while os.path.exists(f"/proc/{owner}"):
        if not select.select([listener], [], [], 1.0)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _supervise(connection)
        connection.close()
        while _reap():
            pass


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def _supervise(connection: socket.socket) -> None:
    """Start the program, say its process id, and its exit code once it has ended; end it when the client has gone."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    program = os.fork()
    if program == 0:
        connection.close()
        _become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    connection.send(str(program).encode())
    ended = os.pidfd_open(program)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(program, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    try:
        connection.send(str(code).encode())
    finally:
        os._exit(0)


def _become(request: dict, streams: list[int]) -> None:
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ |= request["environment"]
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        kept = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, kept if number in request["signals"] else signal.SIG_IGN)
    sys.stdout.reconfigure(write_through="PYTHONUNBUFFERED" in os.environ)
    common.signals._run_has_ended = multiprocessing.RawValue("b", 0)  # shared memory: a program's own, not that of all
    code = 1
    try:
        _run(*request["argv"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code == 1 and end.code != 1:
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _run(executable: str, kind: str, *words: str) -> None:
    """What the interpreter does with its command line."""
    sys.executable = executable
    sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if kind == "-u":
        sys.stdout.reconfigure(write_through=True)
        kind, *words = words
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind.startswith("-"):
        os.execv(COLD, [COLD, kind, *words])  # what has no imports to save, such as -V
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = [kind, *words]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
