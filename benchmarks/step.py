"""The training step that benchmarks/train_step.py measures, in its variants."""

import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import accelerate
import datasets
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.optimization import Adafactor

from benchmarks.models import RESOLUTIONS, frozen, make_family, make_unet, network_inputs
from benchmarks.step_options import VARIANTS, StepOptions
from benchmarks.timing import Parts, matrix_rate
from common.errors import UserError
from common.signals import StopSignal
from common.train_checks import parse_options
from common.train_options import TrainOptions
from data.cached import CachedDataset
from data.encode import encode_table
from data.images import scale_pixels
from data.choosing import choose_pairs
from models.devices import COMPUTE_DTYPES, start_accelerator
from models.policy import make_policy
from models.speed import check_compiler
from training.defaults import settle_defaults
from training.optimizers import gradient_norm, make_optimizer
from training.preference import PreferenceTask, group, winners_first
from training.records import StepScalars
from training.run import Run

PARTS = ("data", "vae", "text", "reference", "policy", "backward", "optimizer", "logging")


@dataclass
class Result:
    """milliseconds: of each part, a micro-step; the optimizer's is its step's, divided by the accumulation."""

    variant: str
    pairs_per_second: float
    milliseconds: dict[str, float]
    peak_gib: float | None
    share_of_peak: float


def make_pairs(count: int, side: int) -> datasets.Dataset:
    """Pick-a-Pic's columns with JPEGs of `side` pixels that are about as hard to decode as photographs."""
    random = np.random.default_rng(0)

    def jpeg() -> bytes:
        coarse = Image.fromarray(random.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((side, side), Image.BICUBIC)).astype(np.int16)
        noise = random.integers(-12, 13, image.shape, dtype=np.int16)
        file = BytesIO()
        Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        return file.getvalue()

    return datasets.Dataset.from_dict({
        "caption": [f"picture number {number} of a small world" for number in range(count)],
        "jpg_0": [jpeg() for _ in range(count)], "jpg_1": [jpeg() for _ in range(count)],
        "label_0": [float(number % 2) for number in range(count)]})


def unet_forward_flops(model: str, samples: int, resolution: int) -> int:
    """Operations of one UNet forward, counted on shapes alone."""
    family = make_family(model)
    with torch.device("meta"):
        unet, (x_t, times, text) = make_unet(model), network_inputs(family, samples, resolution)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            family.predict(unet, x_t, times, text, (resolution, resolution))
    return counter.get_total_flops()


# --- the two ways of doing a micro-step ----------------------------------------------------------------------------

def our_micro_step(policy, task: PreferenceTask, batch: dict, scalars: StepScalars, parts: Parts) -> None:
    """The inner lines of the loop in training/fit.py."""
    result = task.loss(policy, batch)
    with parts.part("backward"):
        task.run.accelerator.backward(result.loss)
    with parts.part("logging"):
        scalars.add(result.logs)


def official_micro_step(policy, task: PreferenceTask, batch: dict, parts: Parts) -> dict:
    """The same as the official program does it."""
    family, accelerator, size = task.family, task.run.accelerator, task.size
    dtype, pairs = family.vae.dtype, len(batch["timestep"])
    with torch.no_grad():
        pixels = winners_first(batch["pixel_values"]).to(dtype)
        latents = torch.cat([family.vae.encode(half).latent_dist.sample() for half in pixels.split(pairs)])
        latents = latents * family.scaling_factor
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        steps = torch.randint(0, 1000, (pairs,), device=latents.device).repeat(2)
        noisy = family.scheduler.add_noise(latents, noise, steps)
        text = family.encode_text(group(batch, "tokens"))
        text = {name: rows.repeat(2, *[1] * (rows.dim() - 1)) for name, rows in text.items()}
    prediction = family.predict(policy, noisy, steps, text, size).to(dtype)
    with torch.no_grad():
        ref_prediction = family.predict(task.policy.reference, noisy, steps, text, size)
    error_w, error_l = (prediction - noise).square().mean(dim=(1, 2, 3)).chunk(2)
    ref_error_w, ref_error_l = (ref_prediction - noise).square().mean(dim=(1, 2, 3)).chunk(2)
    margin = -0.5 * task.config.beta * ((error_w - error_l) - (ref_error_w - ref_error_l))
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    with parts.part("backward"):
        accelerator.backward(loss)
    with parts.part("logging"):
        scalars = {"train_loss": loss, "accuracy": (margin > 0).float().mean(), "model_mse": error_w.mean(),
                   "ref_mse": ref_error_w.mean(), "win": (error_w - ref_error_w).mean(),
                   "lose": (error_l - ref_error_l).mean(), "scale": torch.ones_like(loss)}
        return {name: accelerator.gather(value.detach().repeat(pairs)).mean().item() for name, value in scalars.items()}


# --- measuring -----------------------------------------------------------------------------------------------------

@dataclass
class Bench:
    """optimizer_step: one optimizer step, timed by `parts`. policy: as accelerate has prepared it."""

    optimizer_step: Callable[[], None]
    parts: Parts
    policy: nn.Module


def step_options(model: str, pairs: int, accumulation: int, mixed_precision: str, *more: str) -> TrainOptions:
    """train.py's options for the measured step."""
    options = parse_options([
        f"--pretrained_model_name_or_path={model}", "--dataset_name=synthetic", "--report_to=none", "--seed=0",
        f"--mixed_precision={mixed_precision}", "--use_winner_preserving", "--winner_preserving_mu=0.9",
        f"--train_batch_size={pairs}", f"--gradient_accumulation_steps={accumulation}", *more])
    settle_defaults(options, make_family(model, options.model))
    return options


def prepare(variant: str, model: str, steps: int, options: TrainOptions, table: datasets.Dataset, accelerator: Accelerator,
            folder: Path) -> Bench:
    """Models, data and loop of a variant; for so many optimizer steps."""
    device, official, family = accelerator.device, variant == "baseline", make_family(model, options.model)
    options.optimizer.max_train_steps = steps
    run, memory, recomputes, cache = Run(options, accelerator, StopSignal()), options.memory, family.always_checkpoints, None
    family.load_encoders(run.dtype, device)
    options.data.cached_dataset = None
    if variant in ("cached", "compact", "compiled"):
        options.data.cached_dataset = str(folder)
        if not (folder / "manifest.json").is_file():
            encode_table(table, ["jpg_0", "jpg_1"], family, options.data, memory.mixed_precision, accelerator)
        cache = CachedDataset(folder)
        family.drop_encoders()
        free_device(device)
    memory.compile = memory.channels_last = variant == "compiled"
    memory.selective_checkpointing = variant in ("compact", "compiled") and not recomputes
    memory.offload_reference = variant == "compact" and recomputes
    with torch.device(device):
        torch.manual_seed(0)
        unet = make_unet(model)
    networks = make_policy(family, unet, memory, run.dtype, device, options.objective.needs_reference)
    trainable, optimizer_options = list(networks.network.parameters()), options.optimizer
    accelerator.autocast_handler.cache_enabled = official
    if official:
        networks.reference = frozen(networks.reference, run.dtype)
        optimizer = (Adafactor(trainable, lr=1e-6, scale_parameter=False, relative_step=False)
                     if optimizer_options.optimizer == "adafactor" else torch.optim.AdamW(trainable, lr=1e-6))
    else:
        optimizer = make_optimizer(trainable, optimizer_options, 1e-6)
    policy, optimizer = accelerator.prepare(networks.network, optimizer)
    task = PreferenceTask(run, family, networks, choose_pairs(table, options.data, 0), cache)
    if official:  # which moves float pixels
        read = task.dataset.read
        task.dataset.read = lambda *key: (item := read(*key)) | {"pixel_values": scale_pixels(item["pixel_values"])}
    task.restore({}, 0)

    parts, scalars, batches = Parts(device), StepScalars(), task.batches(0)
    parts.watch(policy, "policy")
    if networks.reference is not None:
        parts.watch(networks.reference, "reference")
    for encoder in family.text_encoders:
        parts.watch(encoder, "text")
    if family.vae is not None:
        parts.watch(family.vae.encoder, "vae")

    def optimizer_step() -> None:
        count, micro_batches = next(batches)
        for _ in range(count):
            with parts.part("data"):
                batch = next(micro_batches)
            with accelerator.accumulate(policy):
                if official:
                    official_micro_step(policy, task, batch, parts)
                else:
                    our_micro_step(policy, task, batch, scalars, parts)
        with parts.part("optimizer"):
            norm = gradient_norm(accelerator, policy, optimizer_options)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with parts.part("logging"):
            if not official:
                task.settle(1, scalars.reduce(accelerator, grad_norm=norm, **task.flags()))

    return Bench(optimizer_step, parts, policy)


def measure(variant: str, options: StepOptions, train: TrainOptions, table: datasets.Dataset, accelerator: Accelerator,
            folder: Path, peak: float) -> Result:
    device = accelerator.device
    bench = prepare(variant, options.model, options.steps + 1, train, table, accelerator, folder)
    parts = bench.parts
    bench.optimizer_step()
    parts.spans.clear()
    start = parts.mark()
    for _ in range(options.steps):
        bench.optimizer_step()
    micro_steps = options.steps * options.accumulation
    total = parts.between(start, parts.mark()) / micro_steps
    milliseconds = {name: spent / micro_steps for name, spent in parts.milliseconds().items()}
    milliseconds["other"] = total - sum(milliseconds.values())
    flops = 4 * unet_forward_flops(options.model, 2 * options.batch, RESOLUTIONS[options.model])
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    del bench
    accelerator.free_memory()
    free_device(device)
    return Result(variant, options.batch / total * 1000, milliseconds, peak_gib, flops / (total / 1000) / peak)


def free_device(device: torch.device) -> None:
    """Drop what is no longer used, and start counting the peak again."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def report(results: list[Result], options: StepOptions, precision: str, device: torch.device, peak: float) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()}), CPU time, " \
        f"{torch.get_num_threads()} thread(s)"
    lines = [f"{options.model}, {RESOLUTIONS[options.model]} px, {options.batch} pairs x {options.accumulation} accumulated, "
             f"mixed precision {precision}; {name}, matrix products at {peak / 1e12:.3g} TFLOP/s; torch {torch.__version__}, "
             f"diffusers {diffusers.__version__}, accelerate {accelerate.__version__}", "",
             "| ms a micro-step | " + " | ".join(result.variant for result in results) + " |",
             "|---|" + "---:|" * len(results)]
    rows = {part: [result.milliseconds.get(part, 0.0) for result in results] for part in (*PARTS, "other")}
    for part, values in rows.items():
        lines.append(f"| {part} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    lines.append("| pairs/s | " + " | ".join(f"{result.pairs_per_second:.2f}" for result in results) + " |")
    lines.append("| peak memory, GiB | " + " | ".join("-" if result.peak_gib is None else f"{result.peak_gib:.1f}"
                                                      for result in results) + " |")
    lines.append("| UNets' share of the matrix rate | " + " | ".join(f"{result.share_of_peak:.1%}"
                                                                     for result in results) + " |")
    base = next((result for result in results if result.variant == "baseline"), None)
    if base:
        lines.append("| pairs/s against baseline | " + " | ".join(
            f"{result.pairs_per_second / base.pairs_per_second:.2f}x" for result in results) + " |")
        if base.peak_gib:
            lines.append("| memory against baseline | " + " | ".join(
                f"{result.peak_gib / base.peak_gib:.2f}x" for result in results) + " |")
    return "\n".join(lines)


def measure_all(options: StepOptions) -> None:
    """Measure the variants one after the other, and print the table."""
    cuda = torch.cuda.is_available()
    variants = ["baseline"] if options.baseline else options.variants or list(VARIANTS if cuda else VARIANTS[:-1])
    workers = (8 if cuda else 0) if options.num_workers is None else options.num_workers
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("one device is measured: start it without a launcher; benchmarks.communication is about several")
    train = step_options(options.model, options.batch, options.accumulation,
                         options.mixed_precision or ("bf16" if cuda else "no"), "--allow_tf32",
                         f"--dataloader_num_workers={workers}", *options.train_flags)
    accelerator = start_accelerator(train)
    if not cuda:
        torch.set_num_threads(1)  # threads that wait for each other on a busy machine count as CPU time
    diffusers.utils.logging.set_verbosity_error()  # it remarks on every module.to(dtype)
    if "compiled" in variants:
        check_compiler(accelerator.device)
    precision = train.memory.mixed_precision
    peak = matrix_rate(accelerator.device, COMPUTE_DTYPES[precision])
    table = make_pairs(4 * options.batch, RESOLUTIONS[options.model])
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for variant in variants:
            results.append(measure(variant, options, train, table, accelerator, Path(folder), peak))
            print(f"measured {variant}: {results[-1].pairs_per_second:.2f} pairs/s", file=sys.stderr, flush=True)
    print(report(results, options, precision, accelerator.device, peak))
    if options.json:
        Path(options.json).write_text(json.dumps([vars(result) for result in results], indent=1), encoding="utf-8")
