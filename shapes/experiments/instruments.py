"""What each kind of lambda does to a step's own winners, and what the safeguard costs."""

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.signals import StopSignal
from losses import denoising_errors
from models.family import open_family
from shapes.experiment import Work, reset_accelerate
from shapes.experiments.plan import MU, SAFEGUARD, WORLD, Settings
from shapes.experiments.worlds import options_on
from training.defaults import settle_defaults
from training.optimizers import make_optimizer
from training.preference import PreferenceTask, make_task
from training.run import start_run

LAMBDAS = {"none": {}, "output, per batch": SAFEGUARD, "output, per pair": SAFEGUARD | {"winner_preserving_granularity": "sample"},
           "parameters": SAFEGUARD | {"winner_preserving_space": "parameter"}}
RATE = 3e-5


def instruments(settings: Settings) -> list[Work]:
    return [*[(instrument_path(kind, settings), measure_lambda, (kind, settings)) for kind in LAMBDAS],
            (overhead_path(settings), measure_overhead, (settings,))]


def instrument_path(kind: str, settings: Settings) -> Path:
    return Path(settings.output, "runs", "lambda", f"{kind.replace(', ', '-').replace(' ', '-')}.json")


def overhead_path(settings: Settings) -> Path:
    return Path(settings.output, "runs", "lambda", "overhead.json")


def open_task(settings: Settings, **options) -> PreferenceTask:
    """train.py's task for measuring: what it would train, on what, and its step's loss."""
    options = options_on(WORLD, settings, seed=0, learning_rate=RATE, max_train_steps=settings.steps, **options)
    family = open_family(options.model)
    settle_defaults(options, family)
    reset_accelerate()
    task = make_task(start_run(options, StopSignal()), family)
    task.restore({}, 0)
    return task


def measure_lambda(kind: str, settings: Settings) -> dict:
    """Diffusion-DPO with one kind of lambda: by how much each step changed its own batch's winner error, lambda, and the
    processor seconds of a step without that measurement."""
    task = open_task(settings, output_dir=Path(settings.output, "instrument"), **LAMBDAS[kind])
    options, parameters = task.run.options.optimizer, list(task.trained.parameters())
    optimizer = make_optimizer(parameters, options, RATE)
    rises, scales, seconds = [], [], []
    for _, (_, [batch]) in zip(range(settings.instrument_steps), task.batches(0)):
        before, start = winner_error(task, batch), time.process_time()
        result = task.loss(task.trained, batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        scales.append(float(result.logs["avg_lose_l_scale"]))
        rises.append(winner_error(task, batch) - before)
    return {"mu": MU, "rises": rises, "lambda": scales, "seconds": seconds}


@torch.no_grad()
def winner_error(task: PreferenceTask, batch: dict[str, Tensor]) -> float:
    """The batch's mean winner error."""
    x_t, target, times, text = task.noised(batch)
    half = len(target) // 2
    text = {name: rows[:half] for name, rows in text.items()}
    pred = task.family.predict(task.trained, x_t[:half], times[:half], text, task.size)
    return float(denoising_errors(pred, target[:half]).mean())


def measure_overhead(settings: Settings) -> dict[str, list[float]]:
    """Processor seconds of three whole training steps (reference included), plain and safeguarded by turns."""
    task = open_task(settings, output_dir=Path(settings.output, "instrument"), **SAFEGUARD)
    configs = {"plain": replace(task.config, use_winner_preserving=False), "safeguarded": task.config}
    optimizer = torch.optim.SGD(task.trained.parameters(), lr=0.0)
    _, [batch] = next(task.batches(0))
    seconds = {name: [] for name in configs}
    for turn in range(settings.timing_rounds + 1):  # the first warms up
        for variant in sorted(configs, reverse=turn % 2 == 0):
            task.config = configs[variant]
            start = time.process_time()
            for _ in range(3):
                task.loss(task.trained, batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if turn:
                seconds[variant].append(time.process_time() - start)
    return seconds
