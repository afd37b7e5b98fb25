"""Check the form of prompt groups; a fault is reported with its line number.

    python -m prompts.check papv2 my_prompts.json
"""

from dataclasses import MISSING, dataclass

from common.errors import run_program
from common.options import option, parse
from prompts import group_path, read_group


@dataclass
class CheckOptions:
    title = "what is checked"

    groups: list[str] = option(MISSING, "names of prompts/NAME.json, or files", positional=True)


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([CheckOptions], argv, program="python -m prompts.check", description=__doc__)
    for group in options.groups:
        prompts = read_group(group)
        print(f"{group_path(group)}: {len(prompts)} prompts ({len(set(prompts))} distinct)")


if __name__ == "__main__":
    run_program(main)
