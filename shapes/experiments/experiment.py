"""The experiment: do what is missing of the plan, then write the report."""

import time
from pathlib import Path

from common.errors import UserError
from common.files import read_json, write_json
from shapes.experiment import do_all, keep_settings, worker_pool
from shapes.experiments.instruments import instruments
from shapes.experiments.plan import ALL_WORLDS, PARTS, WORLD, WORLDS, Settings, stages
from shapes.experiments.report import write_report
from shapes.experiments.results import Results
from shapes.experiments.runs import base_path, is_done, record_path, train_run
from shapes.experiments.worlds import make_world


def experiment(settings: Settings) -> None:
    """Do what is left to do of each part, and write the report, also where the call is interrupted. Raises UserError for a
    part that there is not, for settings other than those of the runs that are there, and for a report of none."""
    if unknown := [part for part in settings.parts if part not in PARTS]:
        raise UserError(f"--parts has no {unknown[0]}: choose from {', '.join(PARTS)}")
    if settings.report and not has_runs(settings):
        raise UserError(f"there are no runs in {settings.output} to report: leave --report out, or name their --output")
    keep_settings(settings, "smoke", "full", "long", "parts", "report", "rates", "seeds", "instrument_steps", "timing_rounds")
    try:
        if not settings.report:
            work(settings)
    finally:
        if has_runs(settings):
            write_report(settings)


def has_runs(settings: Settings) -> bool:
    return any(base_path(world, settings).is_file() for world in ALL_WORLDS)


def work(settings: Settings) -> None:
    spent = Path(settings.output, "minutes.json")  # of all calls
    before, start = read_json(spent) if spent.is_file() else 0.0, time.time()
    try:
        with worker_pool(settings.workers) as pool:
            for part in settings.parts:
                world = WORLDS.get(part, WORLD)
                do_all(pool, [(base_path(world, settings), make_world, (world, settings))], f"{part}: pairs")
                for stage in stages(part, settings):
                    wanted = stage(Results(settings).best_rate)
                    do_all(pool, [(record_path(run, settings), train_run, (run, settings)) for run in wanted
                                  if not is_done(run, settings)], part)
                if part == "lambda":
                    do_all(pool, instruments(settings), part)
    finally:
        write_json(spent, before + (time.time() - start) / 60)
