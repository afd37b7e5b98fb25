"""One run: train.py's own, judged as it goes."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from common.files import read_json
from shapes.experiment import Enough, train_here
from shapes.experiments.plan import JUDGED, SEED, Run, Settings
from shapes.experiments.worlds import judged, options_on

COLLAPSED = 0.08  # below the base's score: no run came back from there, and this one ends
WARMUP = 0.1  # share of the steps
AVERAGED = {"winner": "avg_win_diff_loss", "loser": "avg_lose_diff_loss", "reference": "ref_mse_unaccumulated",
            "margin": "margin_mean", "accuracy": "implicit_acc_accumulated", "lambda": "avg_lose_l_scale"}


def record_path(run: Run, settings: Settings) -> Path:
    return Path(settings.output, "runs", f"{run.name}.json")


def is_done(run: Run, settings: Settings) -> bool:
    """A longer run's record holds a shorter one's."""
    return record_path(run, settings).is_file() or record_path(run._replace(share=1.0), settings).is_file()


def base_path(world, settings: Settings) -> Path:
    return Path(settings.output, "runs", world.name, "base.json")


def judged_steps(settings: Settings, share: float = 1.0) -> list[int]:
    return [round(part * settings.steps) for part in JUDGED if part <= share]


def train_run(run: Run, settings: Settings) -> dict:
    """Train one configuration and judge it along the way.

    Returns its record: "points", one a judgement, with the step, what the oracle says, the training's own processor seconds
    up to there, and the training's scalars, averaged since the judgement before (errors against the reference). Seed 0's
    drawings go to NAME.npz.
    """
    world, steps = run.config.world, judged_steps(settings, run.share)
    options = options_on(world, settings, seed=run.seed, learning_rate=run.rate, max_train_steps=settings.steps,
                         lr_warmup_steps=round(WARMUP * settings.steps), **run.config.options())
    base = np.mean(read_json(base_path(world, settings))["scores"])
    points: list[dict[str, Any]] = []
    drawings, seen = {}, []
    spent, since = 0.0, None

    def watch(step: int, network: nn.Module, scalars: dict[str, float]) -> None:
        nonlocal spent, since
        if since is not None:
            spent += time.process_time() - since
        if scalars:
            seen.append(scalars)
        if step in steps:
            point, drawings[str(step)] = judged(world, settings, network)
            points.append({"step": step, "seconds": spent} | point | {
                name: float(np.mean([line[scalar] for line in seen])) for name, scalar in AVERAGED.items() if scalar in seen[0]})
            seen.clear()
            if step == steps[-1] or np.mean(point["scores"]) < base - COLLAPSED:
                raise Enough
        since = time.process_time()

    train_here(options, watch)
    if run.seed == SEED:
        path = record_path(run, settings).with_suffix(".npz")
        np.savez_compressed(path, **drawings)
    return {"share": run.share, "points": points}
