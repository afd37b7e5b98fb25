"""The runs and measurements of shapes/claims.py. Every training run is train.py's own, on pairs that were encoded once."""

import json
import random
import time
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import default_collate

from common.files import write_json, write_text
from common.signals import StopSignal
from common.train_options import TrainOptions
from data.cache import CacheOptions, cache
from losses import denoising_errors, preference_margin
from losses.errors import implicit_accuracy
from models.family import open_family
from shapes.mixture import sample_drawing
from shapes.claims_options import METHODS, VARIANTS, Settings
from shapes.claims_report import write_report
from shapes.drawing import caption
from shapes.experiment import Enough, Work, do_all, draw_with, evaluating, reset_accelerate, run_options, train_here, worker_pool
from shapes.oracle import judge
from shapes.pipeline import base_pipeline
from shapes.preferences import write_preferences
from training.defaults import settle_defaults
from training.optimizers import make_optimizer
from training.preference import PreferenceTask, make_task
from training.run import start_run

WINNER_ONLY = ("sft", "winner only")
CONFIGURATIONS = [(method, variant) for method in METHODS for variant in VARIANTS] + [WINNER_ONLY]
SELECTION_SEED = 1000
TIMESTEPS = 3  # at which each held-out pair's errors are measured, one in each third of the schedule


@dataclass(frozen=True)
class Run:
    method: str
    variant: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}_{self.variant}_lr{self.learning_rate:g}_seed{self.seed}".replace(" ", "-")


# --- the world: everything that no run changes ---------------------------------------------------------------------------

def build_world(settings: Settings) -> None:
    """Pairs and what train.py caches of them, the prompts, and what the oracle says of the base."""
    torch.set_num_threads(settings.workers)  # no run has begun
    output, prompts = Path(settings.output), {}
    for split, count, seed, unseen in (("train", settings.train_pairs, 1, False),
                                       ("held_out", settings.held_out_pairs, 2, True)):
        folder = write_preferences(output / "pairs" / split, count, seed, settings.inference_steps, unseen)
        reset_accelerate()
        cache(options_on(settings, split, train_data_dir=folder), CacheOptions())
    for split, count, unseen in (("selection", settings.selection_prompts, False), ("test", settings.test_prompts, True)):
        rng = random.Random(f"{split} prompts")
        prompts[split] = [caption(sample_drawing(rng, unseen)) for _ in range(count)]
    write_text(output / "prompts.json", json.dumps(prompts, indent=1))
    (output / "runs").mkdir(exist_ok=True)
    write_json(output / "runs" / "base.json",
               {split: judge_network(open_base().unet, split, "base", settings) for split in prompts})


def options_on(settings: Settings, split: str, **options: Any) -> TrainOptions:
    """train.py's options on the cached pairs of a split."""
    return run_options(pretrained_model_name_or_path=base_pipeline(), cached_dataset=Path(settings.output, "cache", split),
                       train_batch_size=settings.batch_size, max_train_steps=settings.steps, **options)


def open_task(options: TrainOptions) -> PreferenceTask:
    """train.py's task, for measuring: what it would train, on what, and its step's loss."""
    family = open_family(options.model)
    settle_defaults(options, family)
    reset_accelerate()
    task = make_task(start_run(options, StopSignal()), family)
    task.restore({}, 0)
    return task


@lru_cache(maxsize=1)
def open_base() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(base_pipeline())


def judge_network(network: nn.Module, split: str, name: str, settings: Settings) -> dict[str, list[float]]:
    """Draw a split's prompts from fixed noise; what the oracle says of each image. The images go to runs/NAME_SPLIT.npy."""
    prompts = json.loads(Path(settings.output, "prompts.json").read_text())[split]
    images = draw_with(network, open_base(), prompts, 10_000_000, settings.inference_steps)
    np.save(Path(settings.output, "runs", f"{name}_{split}.npy"), np.stack([np.asarray(image) for image in images]))
    judgements = [judge(image, prompt) for image, prompt in zip(images, prompts)]
    return {key: [float(getattr(judgement, key)) for judgement in judgements] for key in ("score", "cleanliness", "all_right")}


class HeldOut:
    """The held-out pairs, noised at TIMESTEPS times each, and the reference's errors on them."""

    def __init__(self, output: str):
        self.task, self.batches = open_task(options_on(Settings(output), "held_out", seed=0, proportion_empty_prompts=0)), []
        for third in range(TIMESTEPS):
            self.task.dataset.seed = SELECTION_SEED + 1 + third
            batch = default_collate([self.task.dataset[row, row] for row in range(len(self.task.dataset))])
            batch["timestep"] = (third + batch["timestep"]) / TIMESTEPS
            self.batches.append(self.task.noised(batch))
        self.reference = self.errors(self.task.policy.reference)

    def errors(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Winners' and losers', (TIMESTEPS, pairs) each."""
        with evaluating(network):
            errors = [denoising_errors(self.task.family.predict(network, x_t, times, text, self.task.size), target)
                      for x_t, target, times, text in self.batches]
        return torch.stack(errors).chunk(2, dim=1)

    def measure(self, network: nn.Module, beta: float) -> dict[str, float]:
        """Winner and loser error, the reference's beside them, and how the pairs are ranked."""
        (winner, loser), (ref_winner, ref_loser) = self.errors(network), self.reference
        margin = preference_margin(winner, loser, ref_winner, ref_loser, beta)
        return {"winner": float(winner.mean()), "loser": float(loser.mean()), "ref_winner": float(ref_winner.mean()),
                "ref_loser": float(ref_loser.mean()), "margin": float(margin.mean()),
                "implicit_accuracy": float(implicit_accuracy(margin))}


held_out = lru_cache(maxsize=1)(HeldOut)  # by the experiment's folder


# --- one run -------------------------------------------------------------------------------------------------------------

def objective(method: str, variant: str) -> dict[str, Any]:
    """A configuration in train.py's options."""
    mu = METHODS.get(method)
    options = {"plain": {}, "winner only": {}, "lambda 0": {"fixed_lambda": 0.0},
               "safeguarded": {"use_winner_preserving": True, "winner_preserving_mu": mu},
               "fixed lambda": {"fixed_lambda": mu and 1.0 - mu}}[variant]
    return {"train_method": method} | options


def train_policy(run: Run, split: str, settings: Settings) -> dict:
    """Train one policy and judge it on the prompts of a split, for "test" with its errors over training. Returns the
    run's record."""
    record = asdict(run) | {"curve": [], "winner_scale": [], "train_implicit_accuracy": []}
    options = options_on(settings, "train", seed=run.seed, learning_rate=run.learning_rate, lr_scheduler="cosine",
                         lr_warmup_steps=settings.steps // 10, **objective(run.method, run.variant))
    every = max(1, settings.steps // 4)
    errors = held_out(settings.output) if split == "test" else None  # before the run: it sets up accelerate anew

    def watch(step: int, network: nn.Module, scalars: dict[str, float]) -> None:
        if errors and (step % every == 0 or step == settings.steps):
            record["curve"].append({"step": step} | errors.measure(network, options.objective.beta_dpo))
        if scalars:
            record["winner_scale"].append(scalars.get("avg_lose_l_scale", 1.0))
        if "implicit_acc_accumulated" in scalars:
            record["train_implicit_accuracy"].append(scalars["implicit_acc_accumulated"])
        if step == settings.steps:
            record[split] = judge_network(network, split, run.name, settings)
            raise Enough

    train_here(options, watch)
    return record


# --- how good is lambda, and what does it cost -----------------------------------------------------------------------------

LAMBDAS = {"none": {}, "output, per batch": {}, "output, per pair": {"winner_preserving_granularity": "sample"},
           "parameters": {"winner_preserving_space": "parameter"}}


def measure_lambda(kind: str, mu: float, optimizer_name: str, learning_rate: float, settings: Settings) -> dict:
    """Diffusion-DPO with one kind of lambda: in which share of its steps the batch's own winner error rose, and the
    processor time of a step (without that measurement)."""
    safeguard = {"use_winner_preserving": kind != "none", "winner_preserving_mu": mu} | LAMBDAS[kind]
    task = open_task(options_on(settings, "train", seed=0, optimizer=optimizer_name, learning_rate=learning_rate, **safeguard))
    options, parameters = task.run.options.optimizer, list(task.trained.parameters())
    optimizer = make_optimizer(parameters, options, learning_rate)
    rises, scales, seconds = [], [], []
    for _, (_, [batch]) in zip(range(settings.instrument_steps), task.batches(0)):
        before = winner_error(task, batch)
        start = time.process_time()
        result = task.loss(task.trained, batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        scales.append(float(result.logs["avg_lose_l_scale"]))
        rises.append(winner_error(task, batch) - before)
    return {"kind": kind, "mu": mu, "optimizer": optimizer_name, "learning_rate": learning_rate, "rises": rises,
            "winner_scale": scales, "seconds": seconds}


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
    task = open_task(options_on(settings, "train", seed=0, **objective("diffusion-dpo", "safeguarded")))
    configs = {"plain": replace(task.config, use_winner_preserving=False), "safeguarded": task.config}
    optimizer = torch.optim.SGD(task.trained.parameters(), lr=0.0)
    _, [batch] = next(task.batches(0))
    seconds = {name: [] for name in configs}
    for round_number in range(settings.timing_rounds + 1):  # the first round warms up
        for variant in sorted(configs, reverse=round_number % 2 == 0):
            task.config = configs[variant]
            start = time.process_time()
            for _ in range(3):
                task.loss(task.trained, batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if round_number:
                seconds[variant].append(time.process_time() - start)
    return seconds


# --- the experiment --------------------------------------------------------------------------------------------------------

def choose_learning_rates(settings: Settings, runs: Path) -> dict[str, dict]:
    """The written rule (see shapes/claims.py): own[method, variant] and common[method], as rates."""
    scores = {}
    for method, variant in CONFIGURATIONS:
        for rate in settings.learning_rates:
            record = json.loads((runs / f"{Run(method, variant, rate, SELECTION_SEED).name}.json").read_text())
            scores[method, variant, rate] = float(np.mean(record["selection"]["score"]))
    own = {(method, variant): max(settings.learning_rates, key=lambda rate: scores[method, variant, rate])
           for method, variant in CONFIGURATIONS}
    common = {method: max(settings.learning_rates,
                          key=lambda rate: sum(scores[method, variant, rate] for variant in VARIANTS))
              for method in METHODS}
    return {"own": own, "common": common, "scores": scores}


def do_experiment(settings: Settings, pool: Executor | None) -> tuple[dict, list[Path]]:
    """Everything that is trained and measured. Returns the chosen rates and the records of the kinds of lambda."""
    runs = Path(settings.output, "runs")

    def training(run: Run, split: str) -> Work:
        return runs / f"{run.name}.json", train_policy, (run, split, settings)

    do_all(pool, [training(Run(method, variant, rate, SELECTION_SEED), "selection") for method, variant in CONFIGURATIONS
                  for rate in settings.learning_rates], "learning rates")
    rates = choose_learning_rates(settings, runs)

    final = dict.fromkeys(
        Run(method, variant, rate, seed) for seed in range(settings.seeds) for method, variant in CONFIGURATIONS
        for rate in (rates["own"][method, variant], rates["common"].get(method, rates["own"][method, variant])))
    do_all(pool, [training(run, "test") for run in final], "final runs")

    instruments = [(runs / f"lambda_{kind}_mu{mu}_{optimizer}.json".replace(" ", "-").replace(",", ""), measure_lambda,
                    (kind, mu, optimizer, rate, settings))
                   for optimizer, rate in (("adamw", rates["common"]["diffusion-dpo"]), ("sgd", 1e-3))
                   for kind in LAMBDAS for mu in ((0.0,) if kind == "none" else (0.0, 0.9))]
    do_all(pool, [*instruments, (runs / "overhead.json", measure_overhead, (settings,))], "instruments")
    return rates, [path for path, _, _ in instruments]


def experiment(settings: Settings) -> None:
    """Do what is left to do, and write the report."""
    output = Path(settings.output)
    start, spent = time.time(), output / "minutes.json"  # of all calls
    before = json.loads(spent.read_text()) if spent.is_file() else 0.0
    output.mkdir(parents=True, exist_ok=True)
    try:
        if not (output / "runs" / "base.json").is_file():
            print("drawing the pairs, encoding them, judging the base", flush=True)
            build_world(settings)
        with worker_pool(settings.workers) as pool:
            rates, instruments = do_experiment(settings, pool)
    finally:
        minutes = before + (time.time() - start) / 60
        write_json(spent, minutes)
    write_report(settings, rates, instruments, minutes)
