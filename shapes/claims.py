"""The published claims as an experiment on the shapes world: many short runs from one base, then a report.

    bash scripts/reproduce_claims.sh [--smoke] [options]

Runs {diffusion-dpo, dspo, dmpo} x {plain, safeguarded, lambda 0, fixed lambda} and training on winners only, with
losses.preference_loss and the published beta and mu, equal budgets, and latents and embeddings computed once. The noise
has the offset that the base was trained with, and the learning rate falls to 0 along a cosine after its warm-up, because
the noise of small batches makes a small base draw worse.

Learning rates are chosen by one rule for all: each configuration is trained at every rate of the grid (with a seed of
its own) and the rate is taken whose images for the selection prompts have the highest mean oracle score. A method's
common rate is the one with the highest mean of these scores over the method's configurations. The final runs, with
`--seeds` seeds, are judged on other prompts and pairs, whose captions the base was never trained on.

Each run ends in OUTPUT/runs/NAME.json; a second call goes on where the first ended. shapes/claims_report.py reads them.
"""

import json
import math
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

from losses import LossConfig, preference_loss
from losses.errors import denoising_errors, implicit_accuracy, preference_margin
from shapes.base import sample_drawing
from shapes.claims_report import write_report
from shapes.drawing import caption
from shapes.oracle import judge
from shapes.pipeline import NOISE_OFFSET, base_pipeline, draw_images
from shapes.preferences import write_preferences
from common.train_options import TrainArguments, parse_words
from data.pairs import choose_pairs, load_table
from models.stable_diffusion import NoisyBatch, predict, sample_latents, winners_first
from data.draws import draw_pair, epoch_order
from common.errors import run_program
from common.images import decode_image, image_bytes
from data.images import to_pixels
from training.optimizers import make_optimizer, make_schedule
from training.parameter_space import parameter_space_gradients

METHODS = {  # the published settings
    "diffusion-dpo": LossConfig("diffusion-dpo", beta=5000.0, winner_preserving_mu=0.9),
    "dspo": LossConfig("dspo", beta=0.001, winner_preserving_mu=0.2),
    "dmpo": LossConfig("dmpo", beta=2000.0, dmpo_alpha=0.01, winner_preserving_mu=0.9),
}
VARIANTS = ("plain", "safeguarded", "lambda 0", "fixed lambda")
WINNER_ONLY = ("sft", "winner only")
CONFIGURATIONS = [(method, variant) for method in METHODS for variant in VARIANTS] + [WINNER_ONLY]
SELECTION_SEED = 1000
TIMESTEPS = 3  # at which each held-out pair's errors are measured, one in each third of the schedule
LATENT_SHAPE = (4, 16, 16)


@dataclass
class Settings:
    output: str = field(default="outputs/claims", metadata={"help": "folder for the runs and the report"})
    smoke: bool = field(default=False, metadata={"help": "one seed and tiny budgets: does everything run?"})
    seeds: int = field(default=3, metadata={"help": "final runs of each configuration"})
    learning_rates: list[float] = field(default_factory=lambda: [5e-6, 2e-5, 8e-5], metadata={"help": "the grid"})
    steps: int = field(default=100, metadata={"help": "optimizer steps of each run"})
    batch_size: int = field(default=8, metadata={"help": "pairs a step"})
    train_pairs: int = field(default=400, metadata={"help": "pairs trained on"})
    held_out_pairs: int = field(default=64, metadata={"help": "pairs on which errors are measured"})
    selection_prompts: int = field(default=48, metadata={"help": "prompts that choose the learning rate"})
    test_prompts: int = field(default=96, metadata={"help": "prompts that judge the final runs"})
    inference_steps: int = field(default=20, metadata={"help": "DDIM steps of each image"})
    instrument_steps: int = field(default=40, metadata={"help": "steps on which each kind of lambda is measured"})
    timing_rounds: int = field(default=12, metadata={"help": "rounds of three steps, plain and safeguarded by turns"})
    workers: int = field(default=2, metadata={"help": "runs at a time, one thread each"})

    def __post_init__(self):
        if self.smoke:
            self.seeds, self.learning_rates, self.steps, self.batch_size = 1, [2e-5, 8e-5], 6, 4
            self.train_pairs, self.held_out_pairs, self.selection_prompts, self.test_prompts = 40, 8, 8, 16
            self.inference_steps, self.instrument_steps, self.timing_rounds = 5, 3, 3


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

@torch.no_grad()
def build_world(settings: Settings) -> None:
    """Pairs, their latents, the prompts' embeddings and the base's images, in OUTPUT/world.pt and OUTPUT/runs/base.json.

    train, held_out: mean, std (n, 2, 4, 16, 16) of the latents, winners first, and text (n, 77, 64); empty: (77, 64).
    """
    torch.set_num_threads(settings.workers)  # no run has begun
    output = Path(settings.output)
    pipeline = StableDiffusionPipeline.from_pretrained(base_pipeline())
    world = {"empty": pipeline.encode_prompt("", "cpu", 1, False)[0][0]}
    for name, count, seed, unseen in (("train", settings.train_pairs, 1, False),
                                      ("held_out", settings.held_out_pairs, 2, True)):
        folder = write_preferences(output / "pairs" / name, count, seed, settings.inference_steps, unseen)
        args = TrainArguments(pretrained_model_name_or_path="", train_data_dir=str(folder), resolution=32)
        world[name] = encode_pairs(choose_pairs(load_table(args), args, seed), pipeline)
    torch.save(world, output / "world.pt")

    prompts = {}
    for split, count, unseen in (("selection", settings.selection_prompts, False), ("test", settings.test_prompts, True)):
        rng = random.Random(f"{split} prompts")
        prompts[split] = [caption(sample_drawing(rng, unseen)) for _ in range(count)]
    (output / "prompts.json").write_text(json.dumps(prompts, indent=1))
    record = {split: judge_policy(pipeline, prompts[split], output / "runs" / f"base_{split}", settings)
              for split in prompts}
    write_json(output / "runs" / "base.json", record)


def encode_pairs(pairs, pipeline) -> dict[str, Tensor]:
    means, stds, texts = [], [], []
    for index, first_wins in zip(pairs.index, pairs.first_wins):
        row = pairs.rows[int(index)]
        images = [row["jpg_0"], row["jpg_1"]] if first_wins else [row["jpg_1"], row["jpg_0"]]
        pixels = torch.stack([to_pixels(decode_image(image_bytes(image)), 32, crop=None, flip=False)
                              for image in images])
        posterior = pipeline.vae.encode(pixels).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
        texts.append(pipeline.encode_prompt(row["caption"], "cpu", 1, False)[0][0])
    return {"mean": torch.stack(means), "std": torch.stack(stds), "text": torch.stack(texts)}


@lru_cache(maxsize=1)
def load_world(output: str):
    """(world, scheduler, pipeline) of this process."""
    torch.set_num_threads(1)
    world = torch.load(Path(output, "world.pt"), weights_only=True)
    base = base_pipeline()
    return world, DDPMScheduler.from_pretrained(base, subfolder="scheduler"), StableDiffusionPipeline.from_pretrained(base)


def make_inputs(split: dict[str, Tensor], rows: list[int], draws: list, timesteps: list[int], empty: list[bool], world,
                scheduler, scaling_factor: float) -> NoisyBatch:
    """The UNet's inputs for some pairs, winners first, from cached latents: models.stable_diffusion.noisy_batch without the
    encoders."""
    mean, std = winners_first(split["mean"][rows]), winners_first(split["std"][rows])
    latents = sample_latents(mean, std, winners_first(torch.stack([draw.vae_noise for draw in draws])), scaling_factor)
    noise = torch.stack([draw.noise + NOISE_OFFSET * draw.offset_noise for draw in draws]).repeat(2, 1, 1, 1)
    steps = torch.tensor(timesteps).repeat(2)
    text = torch.stack([world["empty"] if drop else split["text"][row] for row, drop in zip(rows, empty)])
    return NoisyBatch(scheduler.add_noise(latents, noise, steps), steps, noise,
                      {"encoder_hidden_states": text.repeat(2, 1, 1)})


@lru_cache(maxsize=1)
def training_batches(output: str, seed: int, steps: int, batch_size: int) -> list[tuple[NoisyBatch, Tensor]]:
    """A seed's batches with the reference's predictions: equal for every method, variant and learning rate."""
    world, scheduler, pipeline = load_world(output)
    count = len(world["train"]["mean"])
    order = np.concatenate([epoch_order(count, seed, epoch, shuffle=True)
                            for epoch in range(math.ceil(steps * batch_size / count))])
    batches = []
    for step in range(steps):
        positions = range(step * batch_size, (step + 1) * batch_size)
        draws = [draw_pair(seed, position, LATENT_SHAPE) for position in positions]
        inputs = make_inputs(world["train"], [int(order[position]) for position in positions], draws,
                             [int(draw.timestep * 1000) for draw in draws], [draw.drop_prompt < 0.2 for draw in draws],
                             world, scheduler, pipeline.vae.config.scaling_factor)
        with torch.no_grad():
            batches.append((inputs, predict(pipeline.unet, inputs)))
    return batches


@lru_cache(maxsize=1)
def held_out_batches(output: str) -> list[tuple[NoisyBatch, Tensor]]:
    """The held-out pairs at TIMESTEPS timesteps each, with the reference's errors (2B,)."""
    world, scheduler, pipeline = load_world(output)
    batches = []
    for third in range(TIMESTEPS):
        rows = list(range(len(world["held_out"]["mean"])))
        draws = [draw_pair(SELECTION_SEED + 1 + third, row, LATENT_SHAPE) for row in rows]
        timesteps = [int((third + draw.timestep) * 1000 / TIMESTEPS) for draw in draws]
        inputs = make_inputs(world["held_out"], rows, draws, timesteps, [False] * len(rows), world, scheduler,
                             pipeline.vae.config.scaling_factor)
        with torch.no_grad():
            batches.append((inputs, denoising_errors(predict(pipeline.unet, inputs), inputs.target)))
    return batches


# --- one run -------------------------------------------------------------------------------------------------------------

def loss_settings(method: str, variant: str) -> tuple[LossConfig, float | None]:
    """The loss of a configuration, and the loser's scale where it is fixed by hand."""
    if method == "sft":
        return LossConfig("sft"), None
    config = METHODS[method]
    fixed = {"lambda 0": 0.0, "fixed lambda": 1.0 - config.winner_preserving_mu}.get(variant)
    return replace(config, use_winner_preserving=variant == "safeguarded"), fixed


def fresh_policy(output: str):
    """The base's UNet, to be trained."""
    policy = load_world(output)[2].unet
    clone = type(policy).from_config(policy.config)
    clone.load_state_dict(policy.state_dict())
    return clone.train()


def loss_on(policy, inputs: NoisyBatch, ref_pred: Tensor, config: LossConfig, loser_scale: float | None = None):
    if config.method == "sft":
        half = len(inputs.target) // 2
        inputs = NoisyBatch(inputs.latents[:half], inputs.timesteps[:half], inputs.target[:half],
                            {name: value[:half] for name, value in inputs.conditioning.items()})
    return preference_loss(predict(policy, inputs), ref_pred, inputs.target, config, loser_scale)


def train_policy(run: Run, settings: Settings, split: str) -> dict:
    """Train one policy and judge it on the prompts of a split, for "test" with its errors over training. Returns the
    run's record."""
    torch.manual_seed(run.seed)
    config, fixed = loss_settings(run.method, run.variant)
    policy = fresh_policy(settings.output)
    args = TrainArguments(pretrained_model_name_or_path="", learning_rate=run.learning_rate, lr_scheduler="cosine",
                          lr_warmup_steps=settings.steps // 10)
    optimizer = make_optimizer(list(policy.parameters()), args, run.learning_rate)
    schedule = make_schedule(optimizer, args, settings.steps)
    curve, scales, accuracies = [], [], []
    every = max(1, settings.steps // 4)
    for step, (inputs, ref_pred) in enumerate(training_batches(settings.output, run.seed, settings.steps,
                                                               settings.batch_size)):
        if step % every == 0 and split == "test":
            curve.append({"step": step} | held_out_errors(policy, settings.output, config.beta))
        result = loss_on(policy, inputs, ref_pred, config, fixed)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        scales.append(float(result.winner_scale))
        if result.margin is not None:
            accuracies.append(float(implicit_accuracy(result.margin)))
    if split == "test":
        curve.append({"step": settings.steps} | held_out_errors(policy, settings.output, config.beta))

    prompts = json.loads(Path(settings.output, "prompts.json").read_text())[split]
    pipeline = load_world(settings.output)[2]
    reference, pipeline.unet = pipeline.unet, policy.eval()
    judged = judge_policy(pipeline, prompts, Path(settings.output, "runs", f"{run.name}_{split}"), settings)
    pipeline.unet = reference
    return asdict(run) | {"curve": curve, "winner_scale": scales, "train_implicit_accuracy": accuracies, split: judged}


@torch.no_grad()
def held_out_errors(policy, output: str, beta: float) -> dict[str, float]:
    """Winner and loser error on the held-out pairs, the reference's beside them, and how the pairs are ranked."""
    policy.eval()
    errors, reference = zip(*[(denoising_errors(predict(policy, inputs), inputs.target), ref_errors)
                              for inputs, ref_errors in held_out_batches(output)])
    policy.train()
    winner, loser = torch.stack([error.chunk(2)[0] for error in errors]), torch.stack([e.chunk(2)[1] for e in errors])
    ref_winner, ref_loser = (torch.stack([error.chunk(2)[part] for error in reference]) for part in (0, 1))
    margin = preference_margin(winner, loser, ref_winner, ref_loser, beta)
    return {"winner": float(winner.mean()), "loser": float(loser.mean()), "ref_winner": float(ref_winner.mean()),
            "ref_loser": float(ref_loser.mean()), "margin": float(margin.mean()),
            "implicit_accuracy": float(implicit_accuracy(margin))}


def judge_policy(pipeline, prompts: list[str], images_stem: Path, settings: Settings) -> dict[str, list]:
    """Draw the prompts from fixed noise; what the oracle says of each image. The images go to IMAGES_STEM.npy."""
    images = draw_images(pipeline, prompts, 10_000_000, settings.inference_steps)
    images_stem.parent.mkdir(parents=True, exist_ok=True)
    np.save(f"{images_stem}.npy", np.stack([np.asarray(image) for image in images]))
    judgements = [judge(image, prompt) for image, prompt in zip(images, prompts)]
    return {name: [float(getattr(judgement, name)) for judgement in judgements]
            for name in ("score", "cleanliness", "all_right")}


# --- how good is lambda, and what does it cost -----------------------------------------------------------------------------

LAMBDAS = ("none", "output, per batch", "output, per pair", "parameters")


def measure_lambda(kind: str, mu: float, optimizer_name: str, learning_rate: float, settings: Settings) -> dict:
    """Diffusion-DPO with one kind of lambda: in which share of its steps the batch's own winner error rose, and the
    processor time of a step (without that measurement)."""
    config = replace(METHODS["diffusion-dpo"], use_winner_preserving=kind.startswith("output"), winner_preserving_mu=mu,
                     winner_preserving_granularity="sample" if kind == "output, per pair" else "batch")
    policy = fresh_policy(settings.output)
    args = TrainArguments(pretrained_model_name_or_path="", optimizer=optimizer_name)
    optimizer = make_optimizer(list(policy.parameters()), args, learning_rate)
    rises, scales, seconds = [], [], []
    for inputs, ref_pred in training_batches(settings.output, 0, settings.steps,
                                             settings.batch_size)[:settings.instrument_steps]:
        before = winner_error(policy, inputs)
        start = time.process_time()
        if kind == "parameters":
            parameters = list(policy.parameters())
            gradients, result = parameter_space_gradients(predict(policy, inputs), ref_pred, inputs.target, config,
                                                          parameters)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
        else:
            result = loss_on(policy, inputs, ref_pred, config)
            result.loss.backward()
        scales.append(float(result.winner_scale.mean()))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        rises.append(winner_error(policy, inputs) - before)
    return {"kind": kind, "mu": mu, "optimizer": optimizer_name, "learning_rate": learning_rate, "rises": rises,
            "winner_scale": scales, "seconds": seconds}


@torch.no_grad()
def winner_error(policy, inputs: NoisyBatch) -> float:
    """The batch's mean winner error."""
    half = len(inputs.target) // 2
    pred = policy(inputs.latents[:half], inputs.timesteps[:half],
                  inputs.conditioning["encoder_hidden_states"][:half], return_dict=False)[0]
    return float(denoising_errors(pred, inputs.target[:half]).mean())


def measure_overhead(settings: Settings) -> dict[str, list[float]]:
    """Processor seconds of three whole training steps (reference included), plain and safeguarded by turns."""
    pipeline = load_world(settings.output)[2]
    policy = fresh_policy(settings.output)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    inputs, _ = training_batches(settings.output, 0, settings.steps, settings.batch_size)[0]

    def step(config):
        with torch.no_grad():
            ref_pred = predict(pipeline.unet, inputs)
        preference_loss(predict(policy, inputs), ref_pred, inputs.target, config).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = {"plain": [], "safeguarded": []}
    for round_number in range(settings.timing_rounds + 1):  # the first round warms up
        for variant in sorted(seconds, reverse=round_number % 2 == 0):
            start = time.process_time()
            for _ in range(3):
                step(loss_settings("diffusion-dpo", variant)[0])
            if round_number:
                seconds[variant].append(time.process_time() - start)
    return seconds


# --- the experiment --------------------------------------------------------------------------------------------------------

def write_json(path: Path, record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(record))
    os.replace(temporary, path)


def do(task: str, argument, settings: Settings, path: Path) -> None:
    """One piece of work in a worker process, its record written to `path`."""
    if task == "overhead":
        record = measure_overhead(settings)
    elif task == "lambda":
        record = measure_lambda(*argument, settings)
    else:
        record = train_policy(argument, settings, split=task)
    write_json(path, record)


def do_all(pool: ProcessPoolExecutor, work: list[tuple], settings: Settings, description: str) -> None:
    """Do what is not yet done, several at a time."""
    work = [item for item in work if not item[-1].is_file()]
    futures = [pool.submit(do, task, argument, settings, path) for task, argument, path in work]
    for future in tqdm(as_completed(futures), total=len(futures), desc=description, unit="run"):
        future.result()


def choose_learning_rates(settings: Settings, runs: Path) -> dict[str, dict]:
    """The written rule (see the top): own[method, variant] and common[method], as rates."""
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


def experiment(settings: Settings, pool: ProcessPoolExecutor) -> tuple[dict, list[Path]]:
    """Everything that is trained and measured. Returns the chosen rates and the records of the kinds of lambda."""
    runs = Path(settings.output, "runs")
    grid = [Run(method, variant, rate, SELECTION_SEED) for method, variant in CONFIGURATIONS
            for rate in settings.learning_rates]
    do_all(pool, [("selection", run, runs / f"{run.name}.json") for run in grid], settings, "learning rates")
    rates = choose_learning_rates(settings, runs)

    final = dict.fromkeys(  # seed by seed, so that a seed's batches are made once
        Run(method, variant, rate, seed) for seed in range(settings.seeds) for method, variant in CONFIGURATIONS
        for rate in (rates["own"][method, variant], rates["common"].get(method, rates["own"][method, variant])))
    do_all(pool, [("test", run, runs / f"{run.name}.json") for run in final], settings, "final runs")

    instruments = [("lambda", (kind, mu, optimizer, rate),
                    runs / f"lambda_{kind}_mu{mu}_{optimizer}.json".replace(" ", "-").replace(",", ""))
                   for optimizer, rate in (("adamw", rates["common"]["diffusion-dpo"]), ("sgd", 1e-3))
                   for kind in LAMBDAS for mu in ((0.0,) if kind == "none" else (0.0, 0.9))]
    do_all(pool, [*instruments, ("overhead", None, runs / "overhead.json")], settings, "instruments")
    return rates, [path for _, _, path in instruments]


def main() -> None:
    [settings] = parse_words(HfArgumentParser(Settings, prog="python -m shapes.claims"))
    start, spent = time.time(), Path(settings.output, "minutes.json")  # of all calls
    before = json.loads(spent.read_text()) if spent.is_file() else 0.0
    try:
        if not Path(settings.output, "runs", "base.json").is_file():
            print("drawing the pairs, encoding them, judging the base", flush=True)
            build_world(settings)
        with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
            rates, instruments = experiment(settings, pool)
    finally:
        minutes = before + (time.time() - start) / 60
        write_json(spent, minutes)
    write_report(settings, rates, instruments, minutes)


if __name__ == "__main__":
    run_program(main)
