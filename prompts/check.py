"""Check the form of prompt groups; a fault is told with its line number.

    python -m prompts.check papv2 my_prompts.json
"""

import argparse

from prompts import group_path, read_group
from common.errors import run_program


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", help="names of prompts/NAME.json, or files")
    for group in parser.parse_args(argv).groups:
        prompts = read_group(group)
        print(f"{group_path(group)}: {len(prompts)} prompts ({len(set(prompts))} distinct)")


if __name__ == "__main__":
    run_program(main)
