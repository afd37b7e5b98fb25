"""Command-line options, each declared once: name, default, help, bounds, and what a resumed run may change.

A program's options are dataclasses, one a group, whose fields option() declares; parse() reads the command line and
--config FILE.yaml into them and refuses what is out of bounds. Nothing heavy is imported here, so that --help and a typo
cost no second.
"""

import argparse
import dataclasses
import difflib
import math
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml

from common.errors import UserError, first_line, warn


@dataclass(frozen=True)
class Declaration:
    """What an option's declaration says besides its type and default.

    at_least, above, at_most, below: bounds of a number. free: a resumed run may change it. methods: the training methods
    that read it (None: all). needs: the option without which it does nothing. default_text: the default in words, where
    it is None and settled later. positional: given by its place, without a flag.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    free: bool = False
    methods: tuple[str, ...] | None = None
    needs: str | None = None
    default_text: str | None = None
    positional: bool = False

    def fault(self, value) -> str | None:
        """What is wrong with a number, as the rest of a sentence that begins with the option's name."""
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        low = self.at_least if self.at_least is not None else self.above
        high = self.at_most if self.at_most is not None else self.below
        inside = ((isinstance(value, int) or math.isfinite(value))  # an int too large for a float is still finite
                  and (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
                  and (self.at_most is None or value <= self.at_most) and (self.below is None or value < self.below))
        if inside:
            return None
        if low is not None and high is not None:
            left, right = "(" if self.above is not None else "[", ")" if self.below is not None else "]"
            return f"must lie in {left}{low:g}, {high:g}{right}, not {value}"
        if low is not None:
            return f"must be a finite number {'above' if self.above is not None else 'of at least'} {low:g}, not {value}"
        return f"must be a finite number, not {value}"


def option(default, help: str, **declaration):
    """A field of a group of options. The keywords are Declaration's."""
    metadata = {"option": Declaration(help, **declaration)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def declaration(f: dataclasses.Field) -> Declaration:
    return f.metadata["option"]


def default_of(f: dataclasses.Field):
    """The field's default; MISSING where it must be given."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


def flag_names(group: type) -> set[str]:
    return {f.name for f in fields(group)}


# --- parsing -----------------------------------------------------------------------------------------------------------

def parse(groups: list[type], argv: list[str] | None = None, *, program: str, description: str | None = None,
          configurable: bool = False, only: set[str] | None = None) -> tuple[list[Any], set[str]]:
    """The command line as one instance of each group, and the names of the options that were given.

    configurable: --config FILE.yaml holds options too; the command line wins, and a later file over an earlier one.
    only: the names that the program has, of the groups'; the others keep their defaults.
    Raises UserError for a word that is no option, and for a value that does not fit one or is out of bounds.
    """
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    files = config_files(argv) if configurable else []
    declared = {f.name: f for group in groups for f in fields(group) if only is None or f.name in only}
    argv = [word for file in files for word in yaml_words(file, declared)] + argv
    parser = _Parser(program, description, files)
    if configurable:
        parser.add_argument("--config", metavar="FILE.yaml", action="append",
                            help="options in a file; the command line wins")
    for group in groups:
        section = parser.add_argument_group(getattr(group, "title", "options"))
        for f in fields(group):
            if f.name in declared:
                _add(section, f)
    named = [name.upper() for name, f in declared.items() if declaration(f).positional]
    parser.usage = " ".join(["%(prog)s [options]", *named])  # argparse's own lists every option a second time
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
        raise UserError(f"no option is called {name}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    missing = [f"--{name}" for name, f in declared.items() if default_of(f) is MISSING and getattr(found, name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} must be given")
    for name, value in vars(found).items():
        for each in value if isinstance(value, list) else [value]:
            if name in declared and (fault := declaration(declared[name]).fault(each)):
                raise UserError(f"--{name} {fault}")
    given = names_given(argv) & declared.keys()
    return [group(**{f.name: getattr(found, f.name) for f in fields(group) if f.name in declared})
            for group in groups], given


class _Parser(argparse.ArgumentParser):
    def __init__(self, program: str, description: str | None, files: list[str]):
        super().__init__(prog=program, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.files = files

    def error(self, message: str) -> NoReturn:  # argparse's own prints every option's name first
        wrong, _, choices = message.partition(" (choose from ")
        word, known = wrong.rpartition(": ")[2].strip("'"), re.findall(r"[\w.-]+", choices)
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
        message += f"; did you mean {near[0]}?" if near else ""
        where = f" (on the command line or in {', '.join(self.files)})" if self.files else ""
        raise UserError(f"{message}{where}; see --help")


def _add(section, f: dataclasses.Field) -> None:
    kind, choices, many = option_type(f)
    default = default_of(f)
    settings: dict[str, Any] = {"default": default, "help": help_text(f)}
    if default is MISSING:
        settings["default"] = None  # parse() asks for it, once no name is known to be mistyped
    if kind is bool:
        settings |= {"type": _truth, "nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        settings |= {"type": kind, "metavar": None if choices else kind.__name__.upper()}
        settings |= {"choices": choices} if choices else {}
        settings |= {"nargs": "+"} if many else {}
    if declaration(f).positional:
        section.add_argument(f.name, **settings | {"metavar": None if choices else f.name})
        return
    names = [f"--{f.name}"] + [f"--{f.name.replace('_', '-')}"] * (f.name == "local_rank")  # as torch's launcher writes it
    section.add_argument(*names, dest=f.name, **settings)


def option_type(f: dataclasses.Field) -> tuple[type, tuple[str, ...], bool]:
    """The type of an option's (or of each of its) values, what they are chosen from if anything, and whether there are
    several."""
    kind = f.type
    if get_origin(kind) in (UnionType, Union):  # X | None; of a Literal typing makes the latter
        kind = next(part for part in get_args(kind) if part is not type(None))
    many = get_origin(kind) is list
    if many:
        [kind] = get_args(kind)
    if get_origin(kind) is Literal:
        return str, get_args(kind), many
    return kind, (), many


def help_text(f: dataclasses.Field) -> str:
    """The help, with the default where there is one."""
    default, text = default_text(f), declaration(f).help
    return (f"{text} ({default})" if default else text).replace("%", "%%")


def default_text(f: dataclasses.Field) -> str:
    """The default in words; "" where an option is off or empty by default."""
    default, told = default_of(f), declaration(f).default_text
    if default is MISSING:
        return "required"
    if told is not None:
        return told if told == "required" else f"default: {told}"
    if default in (None, "", []) or default is False:
        return ""
    return f"default: {default:g}" if isinstance(default, float) else f"default: {default}"


def _truth(word: str) -> bool:
    if word.lower() in ("true", "yes", "on", "1"):
        return True
    if word.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")


# --- files of options --------------------------------------------------------------------------------------------------

def yaml_words(path: str, declared: dict[str, dataclasses.Field]) -> list[str]:
    """A yaml file of `flag: value` as command-line words, so that one parser checks both. Raises UserError."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path} ({first_line(error)}): it must be yaml, lines of "
                        "`flag: value`") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold lines of `flag: value`, not a {type(settings).__name__}")
    words = []
    for key, value in settings.items():
        if key not in declared:
            near = difflib.get_close_matches(str(key), declared, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see --help"
            raise UserError(f"{path}: no option is called '{key}'; {hint}")
        _, choices, many = option_type(declared[key])
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict) or any(isinstance(each, (dict, list)) for each in values):
            raise UserError(f"{path}: '{key}' must be a plain value or a list of them")
        if isinstance(value, list) and not many:
            raise UserError(f"{path}: '{key}' takes one value, not a list of {len(value)}")
        if value is False and "no" in choices:
            values = ["no"]  # yaml takes an unquoted no for false
        if value is not None:
            words += [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *map(str, values)]
    return words


def config_files(argv: list[str]) -> list[str]:
    """Every --config FILE of the command line, in order."""
    return [word.split("=", 1)[1] if "=" in word else argv[position + 1] for position, word in enumerate(argv)
            if word.startswith("--config=") or word == "--config" and position + 1 < len(argv)]


def names_given(argv: list[str]) -> set[str]:
    """The options that these words of a command line set."""
    return {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}


# --- what a method does not read ----------------------------------------------------------------------------------------

def warn_of_ignored(groups: list[Any], given: set[str], method: str) -> None:
    """Warn of given options that do nothing: of another method, or without the option that they need."""
    values = {f.name: getattr(group, f.name) for group in groups for f in fields(group)}
    for group in groups:
        for f in fields(group):
            told, default = declaration(f), default_of(f)
            if f.name not in given or values[f.name] in (default, None, False, 0):
                continue
            if told.methods is not None and method not in told.methods:
                warn(f"--{f.name} does nothing here: only {', '.join(told.methods)} reads it, this is {method}")
            elif told.needs and not values[told.needs]:
                warn(f"--{f.name} does nothing here: it needs --{told.needs}")


def options_table(groups: list[type]) -> str:
    """The groups' options as a markdown table."""
    rows = ["| option | default | |", "|---|---|---|"]
    for group in groups:
        rows.append(f"| **{getattr(group, 'title', 'options')}** | | |")
        for f in fields(group):
            _, choices, _ = option_type(f)
            default = default_of(f)
            shown = "off" if default is False else "on" if default is True else default_text(f).removeprefix("default: ")
            rows.append(f"| `{f.name}` | {shown} | {declaration(f).help}"
                        + (f" ({', '.join(choices)})" if choices else "") + " |")
    return "\n".join(rows)
