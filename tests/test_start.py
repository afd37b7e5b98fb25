"""--help, a typo and a wrong path cost a moment: nothing heavy is imported before the options are known to be good."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "scipy", "diffusers", "transformers", "datasets", "accelerate", "open_clip"}
CPU_SECONDS = 1.5

# Runs a program as python FILE or python -m MODULE would, and writes down what it imported and how much time it took.
DRIVER = """
import json, resource, runpy, sys
report, heavy, name, sys.argv = sys.argv[1], sys.argv[2].split(","), sys.argv[3], sys.argv[3:]
code = 0
try:
    (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__", **({} if name.endswith(".py") else {"alter_sys": True}))
except SystemExit as end:
    code = end.code or 0
used = resource.getrusage(resource.RUSAGE_SELF)
json.dump([code, used.ru_utime + used.ru_stime, [module for module in heavy if module in sys.modules]], open(report, "w"))
"""

# The program, and a wrong path that it is told only by looking for it.
PROGRAMS = {
    "train.py": ["--pretrained_model_name_or_path", "/no/such/base", "--train_data_dir", "pairs"],
    "data.cache": ["--pretrained_model_name_or_path", "/no/such/base", "--train_data_dir", "pairs", "--cached_dataset", "cache"],
    "data.check": ["/no/such/pairs.parquet", "--pretrained_model_name_or_path", "/no/such/base"],
    "spo.preference_model.train": ["--config", "/no/such.yaml"],
    "eval.generate": ["--config", "/no/such.yaml"],
    "eval.score": ["--config", "/no/such.yaml"],
    "eval.compare": ["--config", "/no/such.yaml"],
    "eval.report": ["--config", "/no/such.yaml"],
}
BENCHMARKS = ("train_step", "memory", "generation", "safeguard", "data_path", "communication", "scoring", "objectives")
CASES = ([(program, flags) for program in PROGRAMS for flags in (["--help"], ["--no_such_option=1"], [])]
         + list(PROGRAMS.items())
         + [(f"benchmarks.{name}", ["--no_such_option=1"]) for name in BENCHMARKS]
         + [("train.py", ["--config", "/no/such.yaml"]), ("train.py", ["--train_batch_size", "0"]),
            ("train.py", ["--pretrained_model_name_or_path", str(ROOT / "docs"), "--train_data_dir", "pairs"])])


@pytest.mark.parametrize("program, flags", CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value) or "none")
def test_a_start_that_goes_no_further_is_cheap_and_one_line(program, flags, tmp_path):
    report = tmp_path / "report.json"
    ended = subprocess.run([sys.executable, "-c", DRIVER, report, ",".join(sorted(HEAVY)), program, *flags], cwd=ROOT,
                           capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert report.is_file(), ended.stderr
    code, seconds, imported = json.loads(report.read_text())
    if flags == ["--help"]:
        assert code == 0 and re.search(r"^usage: ", ended.stdout) and "default: None" not in ended.stdout and ended.stderr == ""
    else:
        errors = [line for line in ended.stderr.splitlines() if "error:" in line]
        assert code in (1, 2) and len(errors) == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert imported == []
    assert seconds <= CPU_SECONDS
