"""Look through preference pairs before training on them, with the code that training reads them with.

    python -m data.check DATASET [train.py's flags]

DATASET is a hub id, a local folder or a file (or name it as train.py does). Reports how it was read (--sheet FILE.png shows
some pairs so); which pairs would be dropped, used with a remark, or replaced by their neighbour, and why; which
contradict each other; how labels and image sizes are spread; and, with --pretrained_model_name_or_path, how much of the
captions its text encoder reads. Exits 1 where so many pairs cannot be used that training on them would stop
(--max_bad_fraction).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, quiet_libraries, run_program
from common.options import option, parse
from common.train_checks import check_data_options
from common.train_options import GROUPS, TrainOptions


@dataclass
class CheckOptions:
    title = "the check"

    num_workers: int = option(min(8, os.cpu_count() or 1), "processes that read images", at_least=0)
    sheet: str | None = option(None, "draw pairs, winners left, into this PNG")
    sheet_pairs: int = option(12, "how many it shows: up to a third contradict others or are odd, the rest are spread "
                             "over the dataset", at_least=1)
    report: str | None = option(None, "write each pair that cannot be used to this file, as a line of JSON")


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = [f"--{'train_data_dir' if Path(argv[0]).exists() else 'dataset_name'}={argv[0]}", *argv[1:]]
    groups, given = parse([*GROUPS, CheckOptions], argv, program="python -m data.check", description=__doc__,
                          configurable=True)
    options, own = TrainOptions(*groups[:len(GROUPS)], given), groups[-1]
    if options.data.source is None:
        raise UserError("name the pairs to check: a hub id, a local folder or a file")
    check_data_options(options.data, options.objective)
    for name in ("report", "sheet"):
        file = getattr(own, name)
        if file and not Path(file).absolute().parent.is_dir():
            raise UserError(f"--{name} {file}: there is no folder {Path(file).parent}: make it, or name another")
    family = None
    if options.model.pretrained_model_name_or_path:
        from models.family import open_family
        family = open_family(options.model)
    quiet_libraries()
    from data.look import look
    look(options, family, own.num_workers, own.report, own.sheet, own.sheet_pairs)


if __name__ == "__main__":
    run_program(main)
