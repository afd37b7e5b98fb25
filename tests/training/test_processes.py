"""Several processes: none waits for ever, one that fails ends all, and no collective belongs to the main one alone."""

import ast
import functools
import os
import signal
import time
from pathlib import Path

import pytest

from tests.runs import launch

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "models", "data", "training", "spo", "eval")
PROGRAM_FILES = [ROOT / "train.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))
                                      if path.name != "__init__.py")]
COLLECTIVES = {"wait_for_everyone", "reduce", "gather", "gather_for_metrics", "gather_object", "broadcast", "broadcast_object_list",
               "broadcast_object", "all_reduce", "all_gather", "all_gather_object", "barrier", "main_process_first",
               "local_main_process_first", "get_state_dict", "save_state", "load_state", "clip_grad_norm_", "backward",
               "prepare", "join_uneven_inputs", "end_training"}


def calls(node: ast.AST) -> set[str]:
    """Names of all that is called below a node."""
    found = set()
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            found.add(call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", ""))
    return found


# Methods whose names other classes share: PIL's save, torch's train, ...
SHARED_NAMES = {"train", "save", "load", "__init__", "__call__"}


@functools.cache  # it takes a second, and there is a test a file
def names_by_file() -> dict[Path, set[str]]:
    """For each file the names it knows that lead to a collective: collectives, its own and imported functions, and the
    methods of every class."""
    functions, methods, imports = {}, {}, {}
    for path in PROGRAM_FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions[path] = {node.name: calls(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        methods[path] = {node.name for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef)
                         for node in kind.body if isinstance(node, ast.FunctionDef)} - SHARED_NAMES
        imports[path] = {alias.asname or alias.name: (ROOT / (node.module or "").replace(".", "/")).with_suffix(".py")
                         for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    known = {path: set(COLLECTIVES) for path in PROGRAM_FILES}
    before = None
    while before != (before := sum(map(len, known.values()))):
        everywhere = {name for path in PROGRAM_FILES for name in methods[path] & known[path]}
        for path in PROGRAM_FILES:
            known[path] |= everywhere | {name for name, called in functions[path].items() if called & known[path]}
            known[path] |= {name for name, source in imports[path].items() if name in known.get(source, set())}
            known[path] -= {"train", "__init__", "__call__"} if path.name != "train.py" else set()
    return known


def names_main_process(test: ast.AST) -> bool:
    return any(getattr(node, "attr", getattr(node, "id", "")) in ("is_main_process", "is_local_main_process", "main")
               for node in ast.walk(test))


def test_the_calls_that_lead_to_a_collective_are_found():
    known = names_by_file()
    assert {"fit", "save_result", "start_run", "make_task"} <= known[ROOT / "train.py"]
    assert {"save_checkpoint", "gradient_norm", "agree", "settle", "settle_together"} <= known[ROOT / "training" / "fit.py"]
    assert "draw_all" not in known[ROOT / "training" / "validation.py"]


@pytest.mark.parametrize("path", PROGRAM_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_collective_runs_under_a_main_process_condition(path):
    collective = names_by_file()[path]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and names_main_process(node.test):
            branches = [node.body, node.orelse]
            below = set().union(*(calls(part) for branch in branches
                                  for part in (branch if isinstance(branch, list) else [branch])))
            assert not below & collective, f"{path.name}:{node.lineno} runs {below & collective} on one process alone"


@pytest.mark.slow
def test_every_collective_meets_its_like_through_checkpoints_validation_stop_and_result(train_tiny, tmp_path):
    """TORCH_DISTRIBUTED_DEBUG=DETAIL compares each collective with the other process's, and fails where they differ."""
    flags = ("--max_train_steps=6", "--checkpointing_steps=2", "--checkpoints_total_limit=1", "--validation_steps=3",
             "--validation_prompts", "a red circle", "--validation_inference_steps=2", "--gradient_accumulation_steps=2")
    train_tiny.start(tmp_path, *flags, processes=2, TORCH_DISTRIBUTED_DEBUG="DETAIL", RANK_TO_STOP="1", prelude="""
import os, signal
from training.preference import PreferenceTask
settle = PreferenceTask.settle
def stop_after_three(self, step, logs):
    if step == 3 and os.environ["RANK"] == os.environ["RANK_TO_STOP"]:
        signal.raise_signal(signal.SIGTERM)  # one process alone gets it
    return settle(self, step, logs)
PreferenceTask.settle = stop_after_three
""")
    output = train_tiny.wait()
    assert "Stopped by" in output and (tmp_path / "checkpoint-4").is_dir() and not (tmp_path / "unet.pth").exists()
    output = train_tiny(tmp_path, *flags, processes=2, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert "after step 4" in output and (tmp_path / "unet.pth").is_file()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_processes_that_disagree_do_not_hang(program, tmp_path):
    """One process's data ends a step early: the other waits as long as it was told, and says so."""
    begin = time.monotonic()
    output = program("tests.tasks", ["--output_dir", tmp_path, "--process_timeout=3"], processes=2, expect=1, ends=True, prelude="""
import os, time
from tests.tasks import FakeTask
batch = FakeTask.batch
def ends_early(self):
    if self.seen == 2 and os.environ["RANK"] == "1":
        time.sleep(3600)
    return batch(self)
FakeTask.batch = ends_early
""")
    assert time.monotonic() - begin < 100
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "--process_timeout" in errors[0] and "number of batches" in errors[0]
    assert "Traceback" not in output


@pytest.mark.slow
def test_one_rank_failing_ends_all_with_its_error_shown(train_tiny, tmp_path, run, python):
    """Through the real launcher: the second process meets a fault of its own, in a data worker."""
    program = tmp_path / "train_broken.py"
    program.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from common.errors import UserError, run_program
from data.pairs import PairDataset
read = PairDataset.read
def broken(self, index, draw):
    if os.environ["RANK"] == "1":
        raise UserError("this rank's shard is gone: fetch it again")
    return read(self, index, draw)
PairDataset.read = broken
run_program(train.main)
""")
    begin = time.monotonic()
    argv = [f"--pretrained_model_name_or_path={train_tiny.base}", f"--train_data_dir={train_tiny.pairs}",
            f"--output_dir={tmp_path / 'out'}", "--resolution=64", "--mixed_precision=no", "--max_train_steps=4",
            "--dataloader_num_workers=1", "--lr_warmup_steps=0", "--report_to=none"]
    result = run([*launch(python, 2)[:-1], program, *argv], expect=None)
    assert result.returncode != 0 and time.monotonic() - begin < 200
    cause, *others = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert cause == "error: this rank's shard is gone: fetch it again"
    assert all("lost the connection to another one, which has ended" in line for line in others)  # where the launcher is late
    report = result.stderr[result.stderr.index("Root Cause"):]
    assert "this rank's shard is gone" in report  # the launcher's own report names the cause too


def test_a_second_signal_ends_the_run_at_once(train_tiny, tmp_path):
    pids = train_tiny.start(tmp_path, "--max_train_steps=100000", "--checkpointing_steps=0")
    end = time.monotonic() + 120
    while not train_tiny.losses_file.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    # A step that lasts: the process is stopped, so that both signals wait for it, the second long after the first.
    os.kill(pids[0], signal.SIGINT)
    os.kill(pids[0], signal.SIGINT)  # what a launcher forwards in the same moment is the same request
    os.kill(pids[0], signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(pids[0], signal.SIGINT)
    os.kill(pids[0], signal.SIGCONT)
    codes = train_tiny.server.wait()
    assert codes in ([-signal.SIGINT], [0])  # 0: the step ended between the first two signals
