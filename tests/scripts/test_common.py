"""Which Python the scripts take: any from 3.10 on, a newer one than the tests know with a warning."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAKE = """#!/usr/bin/env bash
case "$1" in
  --version) echo "Python {version}" ;;
  -c) exec python3 -c "import sys, collections
sys.version_info = collections.namedtuple('V', 'major minor micro')({digits}, 0)
$2" ;;
  -m) mkdir -p "$3/bin" && printf '#!/bin/sh\\nexit 0\\n' > "$3/bin/python" && chmod +x "$3/bin/python" ;;
esac
"""


@pytest.mark.parametrize("version, code, words", [
    ("3.9", 1, "no Python from 3.10 on found"), ("3.10", 0, ""), ("3.14", 0, "warning: Python 3.14 is newer than 3.13")])
def test_any_python_from_3_10_on_is_tried(tmp_path, version, code, words):
    root, path = tmp_path / "project", tmp_path / "bin"
    (root / "scripts").mkdir(parents=True)
    path.mkdir()
    (root / "scripts" / "common.sh").write_text((ROOT / "scripts" / "common.sh").read_text())
    (root / "requirements.txt").write_text("")
    fake = path / "python-fake"
    fake.write_text(FAKE.format(version=version, digits=version.replace(".", ", ")))
    fake.chmod(0o755)
    script = f'source {root}/scripts/common.sh; python3() {{ return 1; }}; make_venv requirements.txt'
    for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3.10", "python"):
        (path / name).write_text("#!/bin/sh\nexit 1\n")
        (path / name).chmod(0o755)
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True,
                            env=os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "PYTHON_BASE": str(fake), "PYTHON": ""})
    assert result.returncode == code and words in result.stderr, result.stderr


@pytest.mark.parametrize("words, told", [
    ([], True), (["--limit", "2", "--metrics_config", "m.yaml"], True), (["--seed", "0", "--help"], False), (["-h"], False),
    (["--metrics", "clip"], False), (["--metrics=clip"], False)])
def test_what_a_first_start_downloads_is_told_where_something_starts(words, told):
    script = f'source {ROOT}/scripts/common.sh; first_start "the five metrics (14 GB)" "$@"'
    printed = subprocess.run(["bash", "-ec", script, "x", *words], capture_output=True, text=True, check=True).stdout
    assert ("the five metrics (14 GB)" in printed) == told and len(printed.splitlines()) == told


def test_the_tests_own_python_takes_every_flag(python, run):
    assert run([python, "-V"]).stdout.startswith("Python 3.")
    assert run([python, "-I", "-c", "print(6 * 7)"]).stdout == "42\n"
