"""Several processes: none waits for ever, one that fails ends all, and no collective belongs to the main one alone."""

import ast
import os
import signal
import time
from pathlib import Path

import pytest

from common.errors import lost_process

ROOT = Path(__file__).parents[2]
PROGRAM_FILES = [ROOT / "train.py", *(path for room in ("common", "models", "data", "training", "spo") for path in sorted((ROOT / room).rglob("*.py"))),
                 *sorted((ROOT / "eval").rglob("*.py"))]
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


def names_by_file() -> dict[Path, set[str]]:
    """For each file the names it knows that lead to a collective: its own functions, imported ones, collectives."""
    functions, imports = {}, {}
    for path in PROGRAM_FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions[path] = {node.name: calls(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        imports[path] = {alias.asname or alias.name: (ROOT / (node.module or "").replace(".", "/")).with_suffix(".py")
                         for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    known = {path: set(COLLECTIVES) for path in PROGRAM_FILES}
    changed = True
    while changed:
        changed = False
        for path in PROGRAM_FILES:
            new = {name for name, called in functions[path].items() if called & known[path]}
            new |= {name for name, source in imports[path].items() if name in known.get(source, set())}
            # train is a method of every module, too.
            changed |= not new - {"train"} <= known[path]
            known[path] |= new - {"train"}
    return known


def names_main_process(test: ast.AST) -> bool:
    return any(getattr(node, "attr", getattr(node, "id", "")) in ("is_main_process", "is_local_main_process", "main_process")
               for node in ast.walk(test))


@pytest.mark.parametrize("path", PROGRAM_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_collective_runs_under_a_main_process_condition(path):
    known = names_by_file()
    assert {"save_checkpoint", "save_result", "identify_run", "gradient_norm"} <= known[ROOT / "train.py"]
    collective = known[path]
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
             "--validation_prompts", "a red circle", "--gradient_accumulation_steps=2")
    train_tiny.start(tmp_path, *flags, processes=2, TORCH_DISTRIBUTED_DEBUG="DETAIL", RANK_TO_STOP="1", prelude="""
import os, signal
from training.guards import Guards
settle = Guards.settle_together
def stop_after_three(self, step, logs):
    if step == 3 and os.environ["RANK"] == os.environ["RANK_TO_STOP"]:
        os.kill(os.getpid(), signal.SIGTERM)  # one process alone gets it
    return settle(self, step, logs)
Guards.settle_together = stop_after_three
""")
    output = train_tiny.wait()
    assert "Stopped by" in output and (tmp_path / "checkpoint-4").is_dir() and not (tmp_path / "unet.pth").exists()
    output = train_tiny(tmp_path, *flags, processes=2, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert "after step 4" in output and (tmp_path / "unet.pth").is_file()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_processes_that_disagree_do_not_hang(train_tiny, tmp_path):
    """One process's data ends a step early: the other waits as long as it was told, and says so."""
    begin = time.monotonic()
    output = train_tiny(tmp_path, "--process_timeout=3", processes=2, expect=1, prelude="""
import os, time, train
original = train.make_loader
def ends_early(*args, **options):
    for number, batch in enumerate(original(*args, **options)):
        if number == 2 and os.environ["RANK"] == "1":
            time.sleep(3600)
        yield batch
train.make_loader = ends_early
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
    result = run([python, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2",
                  "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", program, *argv], expect=None)
    assert result.returncode != 0 and time.monotonic() - begin < 200
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: this rank's shard is gone: fetch it again"]
    report = result.stderr[result.stderr.index("Root Cause"):]
    assert "this rank's shard is gone" in report  # the launcher's own report names the cause too


def test_a_second_signal_ends_the_run_at_once(train_tiny, tmp_path):
    pids = train_tiny.start(tmp_path, "--max_train_steps=100000", "--checkpointing_steps=0")
    end = time.monotonic() + 120
    while not train_tiny.losses_file.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    # A step that lasts: the process is stopped, so that both signals wait for it, the second long after the first.
    os.kill(pids[0], signal.SIGINT)
    os.kill(pids[0], signal.SIGINT)  # what a launcher forwards in the same moment is the same request
    os.kill(pids[0], signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(pids[0], signal.SIGINT)
    os.kill(pids[0], signal.SIGCONT)
    codes = train_tiny.server.wait()
    assert codes in ([-signal.SIGINT], [0])  # 0: the step ended between the first two signals


@pytest.mark.parametrize("text,words", [
    ("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv", "--process_timeout"),
    ("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5", "lost the connection"),
    ("NCCL error in ProcessGroupNCCL.cpp, remote process exited", "lost the connection"),
    ("mat1 and mat2 shapes cannot be multiplied", None),
    ("DataLoader timed out after 10 seconds", None),
])
def test_a_lost_process_is_told_from_other_errors(text, words):
    told = lost_process(RuntimeError(text))
    assert told is None if words is None else words in told
