"""What each kind of lambda does to a step's own winners, what the safeguard costs, and at which beta DSPO's loser matters."""

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.signals import StopSignal
from losses import denoising_errors
from models.family import open_family
from shapes.experiment import Work, reset_accelerate
from shapes.experiments.plan import MU, SAFEGUARD, WORLD, Settings, short
from shapes.experiments.worlds import options_on
from training.defaults import settle_defaults
from training.optimizers import make_optimizer
from training.preference import PreferenceTask, make_task
from training.run import start_run

LAMBDAS = {"none": {}, "output, per batch": SAFEGUARD, "output, per pair": SAFEGUARD | {"winner_preserving_granularity": "sample"},
           "parameters": SAFEGUARD | {"winner_preserving_space": "parameter"}}
RATE = 3e-5
BETAS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
COUNTS = 0.1  # of the gradient's length: from there on the loser's part matters


def instruments(settings: Settings) -> list[Work]:
    return [*[(instrument_path(kind, settings), measure_lambda, (kind, settings)) for kind in LAMBDAS],
            *[(pulls_path(beta, settings), measure_pulls, (beta, settings)) for beta in BETAS],
            (overhead_path(settings), measure_overhead, (settings,))]


def instrument_path(kind: str, settings: Settings) -> Path:
    return Path(settings.output, "runs", "lambda", f"{kind.replace(', ', '-').replace(' ', '-')}.json")


def pulls_path(beta: float, settings: Settings) -> Path:
    return Path(settings.output, "runs", "lambda", f"dspo-beta{short(beta)}.json")


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
        with torch.no_grad():
            before, start = float(winner_error(task, batch)), time.process_time()
        result = task.loss(task.trained, batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        scales.append(float(result.logs["avg_lose_l_scale"]))
        with torch.no_grad():
            rises.append(float(winner_error(task, batch)) - before)
    return {"mu": MU, "rises": rises, "lambda": scales, "seconds": seconds}


def winner_error(task: PreferenceTask, batch: dict[str, Tensor]) -> Tensor:
    """The batch's mean winner error, ()."""
    x_t, target, times, text = task.noised(batch)
    half = len(target) // 2
    text = {name: rows[:half] for name, rows in text.items()}
    pred = task.family.predict(task.trained, x_t[:half], times[:half], text, task.size)
    return denoising_errors(pred, target[:half]).mean()


def measure_pulls(beta: float, settings: Settings) -> dict[str, list[float]]:
    """Plain DSPO with one beta: each step's gradient taken apart. "loser": the length of the loser's part over the sum of both
    parts' lengths; "winner": the cosine between the winner's part and the gradient of the winner's own error."""
    task = open_task(settings, output_dir=Path(settings.output, "instrument"), train_method="dspo", beta_dpo=beta)
    options, parameters = task.run.options.optimizer, list(task.trained.parameters())
    optimizer = make_optimizer(parameters, options, RATE)
    found: dict[str, list[float]] = {"loser": [], "winner": []}
    for _, (_, [batch]) in zip(range(settings.instrument_steps), task.batches(0)):
        own, gradients = gradient(winner_error(task, batch), optimizer, parameters), {}
        for scale in (0.0, 1.0):  # lambda: without and with the loser's part
            task.run.options.objective.fixed_lambda = scale
            gradients[scale] = gradient(task.loss(task.trained, batch).loss, optimizer, parameters)
        loser, winner = gradients[1.0] - gradients[0.0], gradients[0.0]
        found["loser"].append(float(loser.norm() / (loser.norm() + winner.norm())))
        found["winner"].append(float(torch.cosine_similarity(winner, own, dim=0)))
        torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
    return found


def gradient(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Tensor:
    """As one vector; the parameters keep it as theirs."""
    optimizer.zero_grad()
    loss.backward()
    return torch.nn.utils.parameters_to_vector(parameter.grad for parameter in parameters)


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
