"""Prompt groups: JSON lists of {"prompt": ...} or {"caption": ...}, read by name (prompts/NAME.json) or by path; or text, one
prompt a line."""

import json
import os
from pathlib import Path

from common.errors import UserError

PROMPTS = Path(__file__).parent


def group_path(name_or_path: str | os.PathLike) -> Path:
    """prompts/NAME.json for a bare name, else the path itself."""
    name = str(name_or_path)
    return PROMPTS / f"{name}.json" if Path(name).name == name and not name.endswith((".json", ".txt")) else Path(name)


def read_group(name_or_path: str | os.PathLike) -> list[str]:
    """The prompts of a group, in order.

    A file is a .txt of one prompt a line, where lines that begin with # are comments, or a JSON list of {"prompt": text},
    {"caption": text} (SPO's published prompts) or bare strings. Raises UserError, with the line of the fault, when it is
    not, and when it is missing or empty.
    """
    path = group_path(name_or_path)
    if not path.exists() or path.is_dir():
        built = ", ".join(file.stem for file in sorted(PROMPTS.glob("*.json")))
        advice = f": `python -m prompts.build {path.stem}` makes a published one; here are {built}"
        raise UserError(f"no prompt group at {path}{advice if path.parent == PROMPTS else ''}")
    text = read_text(path)
    if path.suffix == ".txt":
        lines = [line.strip() for line in text.split("\n")]
        prompts = [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise UserError(f"{path} lists no prompt")
        return prompts
    return parse_group(text, str(path))


def read_text(path: Path) -> str:
    """A text file's content. Raises UserError, with the line of the fault, where it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text") from None


def prompts_of(values: list[str]) -> list[str]:
    """Prompts, with those of a file in the place of its name (.txt or .json). Raises UserError."""
    return [prompt for value in values
            for prompt in (read_group(value) if value.endswith((".txt", ".json")) else [value])]


def parse_group(text: str, source: str) -> list[str]:
    """read_group of a file's text; `source` names it in errors."""
    decoder = json.JSONDecoder()
    prompts, at = [], _skip_spaces(text, 0)
    if text[at:at + 1] != "[":
        raise _fault(source, text, at, "a prompt group is a JSON list, it must begin with [")
    at = _skip_spaces(text, at + 1)
    while text[at:at + 1] != "]":
        try:
            entry, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _fault(source, text, error.pos, f"no JSON here ({error.msg})") from None
        except (RecursionError, ValueError):
            raise _fault(source, text, at, "this is nested too deeply, or a number too long") from None
        prompt = entry.get("prompt", entry.get("caption")) if isinstance(entry, dict) else entry
        if not isinstance(prompt, str) or not prompt.strip():
            raise _fault(source, text, at, f'entry {len(prompts) + 1} has no "prompt" or "caption" that is non-empty text')
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise _fault(source, text, at, f"the prompt of entry {len(prompts) + 1} holds half a character (a lone surrogate)")
        prompts.append(prompt)
        at = _skip_spaces(text, end)
        if text[at:at + 1] == ",":
            at = _skip_spaces(text, at + 1)
            if text[at:at + 1] == "]":
                raise _fault(source, text, at, "no entry follows the last comma")
        elif text[at:at + 1] != "]":
            raise _fault(source, text, at, "a comma or ] must follow")
    if text[at + 1:].strip():
        raise _fault(source, text, _skip_spaces(text, at + 1), "nothing may follow the list")
    if not prompts:
        raise UserError(f"{source} lists no prompt")
    return prompts


def _skip_spaces(text: str, at: int) -> int:
    while text[at:at + 1].isspace():
        at += 1
    return at


def _fault(source: str, text: str, at: int, what: str) -> UserError:
    return UserError(f"{source}, line {text.count(chr(10), 0, at) + 1}: {what}")
