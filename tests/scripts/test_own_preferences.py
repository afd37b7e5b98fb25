"""From nothing but prompts to a better model: the commands of the README's "Your own preferences", word for word."""

import json
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands_of_the_readme() -> str:
    section = (ROOT / "README.md").read_text().split("\n## Your own preferences\n")[1].split("\n## ")[0]
    return textwrap.dedent(re.search(r"(?:^    .*\n)+", section, re.MULTILINE)[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 77 seconds of one core, more where cores are shared
def test_from_prompts_to_a_model_that_wins(tmp_path, run, python):
    """The settings are chosen so that little training shows a win: without guidance the base draws badly (0.69) and
    differently each time, so a prompt's best and worst of four lie far apart, and there is much to gain."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "output":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "output").mkdir()
    script = tmp_path / "own.sh"
    script.write_text(f"set -e\ncd {tmp_path}\nexport PATH={Path(python).parent}:$PATH PYTHONPATH={tmp_path}\n" + commands_of_the_readme())
    told = run(["bash", script], timeout=1500).stdout
    assert "of 32 prompts gave a pair" in told
    pairs = json.loads((tmp_path / "output" / "pairs" / "pairs.json").read_text())
    assert pairs["prompts"] == 32 and pairs["pairs"] == pairs["prompts_with_a_pair"] > 24
    [summary] = (tmp_path / "output" / "compare").glob("*/summary.json")
    oracle, _ = json.loads(summary.read_text())["metrics"]
    assert oracle["total_pairs"] == 64 and oracle["win_rate_a_over_b"] > 0.55 and oracle["mean_a"] > oracle["mean_b"], oracle
    assert (summary.parent / "report.html").is_file()
