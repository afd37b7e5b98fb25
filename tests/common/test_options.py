"""Options declared once: the parser, the file of options, the help and the table in the docs all follow."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from common.errors import UserError
from common.options import option, options_table, parse, warn_of_ignored

ROOT = Path(__file__).parents[2]


@dataclass
class Paint:
    title = "paint"

    colour: Literal["no", "red", "blue"] = option("red", "the colour")
    layers: int = option(1, "how many", at_least=1)
    gloss: float | None = option(None, "how shiny", above=0, at_most=1, default_text="by the colour")
    words: list[str] = option([], "written on it", needs="signed")
    signed: bool = option(False, "with a name", methods=("oil",))


def paint(*words: str) -> Paint:
    [found], _ = parse([Paint], list(words), program="paint", configurable=True)
    return found


def test_words_become_values_of_their_types():
    assert paint() == Paint("red", 1, None, [], False)
    assert paint("--colour=blue", "--layers", "3", "--gloss", "1e-1", "--words", "a", "b", "--signed") == Paint(
        "blue", 3, 0.1, ["a", "b"], True)
    assert paint("--signed", "no").signed is False and paint("--layers=1", "--layers=2").layers == 2
    _, given = parse([Paint], ["--layers=3", "--signed"], program="paint")
    assert given == {"layers", "signed"}


@pytest.mark.parametrize("words, said", [
    (["--layers", "0"], "--layers must be a finite number of at least 1, not 0"),
    (["--layers", "many"], "invalid int value: 'many'"),
    (["--gloss", "0"], r"--gloss must lie in \(0, 1\], not 0"),
    (["--gloss", "nan"], "--gloss must lie in"),
    (["--colour", "green"], "invalid choice: 'green'"),
    (["--colour", "rec"], "did you mean red?"),
    (["--signed", "perhaps"], "neither true nor false"),
    (["--layer", "2"], "no option is called --layer; did you mean --layers?"),  # no abbreviation
    (["--xyzzy"], "no option is called --xyzzy; see --help"),
    (["stray"], "no option is called stray"),
])
def test_what_does_not_fit_is_one_line(words, said):
    with pytest.raises(UserError, match=said) as error:
        paint(*words)
    assert "\n" not in str(error.value)


def test_a_later_file_wins_over_an_earlier_one_and_the_command_line_over_both(tmp_path):
    for name, text in (("preset", "layers: 100\ngloss: 0.5\nwords: [a, b]\n"), ("own", "layers: 200\ngloss:\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = ["--config", str(tmp_path / "preset.yaml"), f"--config={tmp_path / 'own.yaml'}"]
    assert paint(*files) == Paint("red", 200, 0.5, ["a", "b"], False)
    assert paint("--layers=7", *files).layers == 7


@pytest.mark.parametrize("text, said", [
    ("layesr: 1\n", "no option is called 'layesr'; did you mean 'layers'?"),
    ("- a\n", "must hold lines of `flag: value`, not a list"),
    ("layers: [1, [2]]\n", "'layers' must be a plain value"),
    ("layers: {a: 1}\n", "'layers' must be a plain value"),
    ("layers: [1, 2]\n", "'layers' takes one value, not a list of 2"),
    ("a: : b\n", "cannot read the configuration"),
    ("layers: strong\n", "--layers: invalid int value: 'strong' .*c.yaml"),
    ("!!python/object/apply:os.system ['false']\n", "cannot read the configuration"),
])
def test_a_faulty_file_is_one_line(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        paint("--config", str(tmp_path / "c.yaml"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot read the configuration"):
        paint("--config", str(tmp_path / "missing.yaml"))


def test_an_unquoted_no_is_a_word_where_no_is_a_choice(tmp_path):
    (tmp_path / "c.yaml").write_text("colour: no\nsigned: no\n")
    assert paint("--config", str(tmp_path / "c.yaml")) == Paint("no")


def test_what_a_method_does_not_read_is_worth_a_warning(capsys):
    warn_of_ignored([Paint(signed=True, words=["a"])], {"signed", "words"}, "oil")
    assert capsys.readouterr().err == ""
    warn_of_ignored([Paint(signed=True, words=["a"])], {"signed", "words"}, "chalk")
    assert capsys.readouterr().err == "warning: --signed does nothing here: only oil reads it, this is chalk\n"
    warn_of_ignored([Paint(words=["a"])], {"words"}, "oil")
    assert "--words does nothing here: it needs --signed" in capsys.readouterr().err


def test_the_table_has_a_row_an_option():
    table = options_table([Paint])
    assert "| `colour` | red | the colour (no, red, blue) |" in table and "| `signed` | off | with a name |" in table
    assert "| `gloss` | by the colour | how shiny |" in table and "| **paint** | | |" in table


def test_help_lists_every_option_once_with_its_default():
    from common.options import flag_names
    from common.train_options import GROUPS

    said = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  --([\w]+)", said, re.MULTILINE)
    names = [name for group in GROUPS for name in flag_names(group)]
    assert len(names) == len(set(names)), "an option is declared once"
    assert len(listed) == len(set(listed)) and set(names) <= set(listed)
    assert "None" not in said and "(default: 0.2)" in " ".join(said.split())
