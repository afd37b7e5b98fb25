"""Print the table of options that docs/training.md has: python -m scripts.options_table"""

from common.options import options_table
from common.train_options import GROUPS
from spo.options import SPOOptions


def table() -> str:
    return options_table([*GROUPS, SPOOptions])


if __name__ == "__main__":
    print(table())
