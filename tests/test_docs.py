"""What the documents say of the program is what the program says."""

import re
import subprocess
from pathlib import Path

import pytest

from scripts.options_table import table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_options_is_the_programs():
    assert table() in (ROOT / "docs" / "training.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_pages_that_are_named_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:scripts|configs|tests|docs|losses|models|data|spo|common|training|eval|benchmarks|shapes|prompts)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists() or "*" in path, f"{page.name} names {path}"


def test_every_script_parses():
    for script in ROOT.glob("scripts/**/*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
