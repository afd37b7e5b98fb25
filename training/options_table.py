"""Every option of train.py as a markdown table, for docs/training.md:  python -m training.options_table"""

from dataclasses import fields
from typing import Literal, get_args, get_origin

from training.options import TrainArguments, default_of


def options_table() -> str:
    rows = ["| option | default | |", "|---|---|---|"]
    for option in fields(TrainArguments):
        try:
            default = default_of(option.name)
        except TypeError:  # it has none
            default = "required"
        if isinstance(default, bool) or default in (None, [], ""):
            default = "on" if default is True else "off" if default is False else ""
        elif isinstance(default, float):
            default = f"{default:g}"
        kinds = [option.type, *get_args(option.type)]  # Literal, or Literal | None
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
        listed = f" ({', '.join(choices)})" if choices else ""
        rows.append(f"| `{option.name}` | {default} | {option.metadata['help']}{listed} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(options_table())
