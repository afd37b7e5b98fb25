"""Speed and memory of a training step, by part, against the official program's way of doing it.

    python -m benchmarks.train_step --model sd15          # 512 px, batch 8; --model sdxl: 1024 px; --model tiny: a CPU

builds the models at their published sizes with random weights and measures, one after the other:

    baseline    as the official program does: encoders in the loop, reference cast to the compute dtype as a whole,
                errors in that dtype, eager, autocast's cache, seven gathers with .item() in every micro-step (xformers:
                torch's SDPA here); Diffusion-DPO without the safeguard, which the others have
    uncached    train.py's own step, encoders in the loop
    cached      with a cache of data.cache
    compact     cached, with --selective_checkpointing; SDXL, which recomputes everything, with --offload_reference
    compiled    cached, with --compile --channels_last and, but for SDXL, --selective_checkpointing

--variants chooses among them; --baseline is short for --variants baseline. Tensors, draws and batches are train.py's.
"""

import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
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
from transformers import HfArgumentParser
from transformers.optimization import Adafactor

from benchmarks.models import RESOLUTIONS, UNETS, frozen, make_encoders, make_unet
from benchmarks.timing import Parts, check_output, check_positive, matrix_rate
from losses import preference_loss
from common.train_options import TrainArguments, names_given, parse_arguments, parse_words
from data.cache import CacheArguments, encode_table
from data.cached import CachedDataset
from models.compile import check_compiler
from data.pairs import PairDataset, choose_pairs, make_loader
from models.stable_diffusion import encode_prompts, noisy_batch, predict, predict_reference, winners_first
from common.errors import UserError, run_program
from data.images import scale_pixels
from training.run import COMPUTE_DTYPES, gradient_norm, start_accelerator
from training.records import StepScalars
from models.policy import Models, set_up_policy_and_reference
from training.optimizers import make_optimizer

VARIANTS = ("baseline", "uncached", "cached", "compact", "compiled")
PARTS = ("data", "vae", "text", "reference", "policy", "backward", "optimizer", "logging")


@dataclass
class Arguments:
    model: str = field(default="tiny", metadata={"help": "tiny, sd15 or sdxl"})
    variants: list[str] = field(default_factory=list, metadata={"help": "default: all; on a CPU all but compiled"})
    baseline: bool = field(default=False, metadata={"help": "the baseline alone"})
    batch: int = field(default=8, metadata={"help": "pairs in a micro-step"})
    accumulation: int = field(default=4, metadata={"help": "micro-steps in an optimizer step (published: 32)"})
    steps: int = field(default=5, metadata={"help": "optimizer steps measured, after one that is not"})
    mixed_precision: str = field(default="", metadata={"help": "default: bf16, on a CPU no"})
    num_workers: int = field(default=-1, metadata={"help": "data workers (default 8, on a CPU 0)"})
    train_flags: list[str] = field(default_factory=list, metadata={"help": "more of train.py, as --train_flags=--FLAG"})
    json: str | None = field(default=None, metadata={"help": "write the figures here too"})


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
    config, side = UNETS[model], resolution // 8
    with torch.device("meta"):
        unet = make_unet(model)
        added = None
        if model == "sdxl":
            added = {"text_embeds": torch.empty(samples, 1280), "time_ids": torch.empty(samples, 6)}
        inputs = (torch.empty(samples, 4, side, side), torch.empty(samples, dtype=torch.long),
                  torch.empty(samples, 77, config["cross_attention_dim"]))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(*inputs, added_cond_kwargs=added)
    return counter.get_total_flops()


# --- the two ways of doing a micro-step ----------------------------------------------------------------------------

def our_micro_step(policy, unwrapped, models: Models, batch, args: TrainArguments, accelerator: Accelerator,
                   scalars: StepScalars, parts: Parts) -> None:
    """The inner lines of train.py's loop."""
    inputs = noisy_batch(batch, models, args)
    with accelerator.autocast():
        ref_pred = predict_reference(models, unwrapped, inputs)
    result = preference_loss(predict(policy, inputs), ref_pred, inputs.target, args.loss_config())
    with parts.part("backward"):
        accelerator.backward(result.loss)
    with parts.part("logging"):
        scalars.add(result.logs)


def official_micro_step(policy, models: Models, batch, args: TrainArguments, accelerator: Accelerator,
                        parts: Parts) -> dict:
    """The same as the official program does it."""
    dtype, config = models.vae.dtype, args.loss_config()
    with torch.no_grad():
        pixels = winners_first(batch["pixel_values"]).to(dtype)
        halves = pixels.split(args.train_batch_size)
        latents = torch.cat([models.vae.encode(half).latent_dist.sample() for half in halves])
        latents = latents * models.vae.config.scaling_factor
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        steps = torch.randint(0, 1000, (args.train_batch_size,), device=latents.device).repeat(2)
        noisy = models.scheduler.add_noise(latents, noise, steps)
        embeddings, pooled = encode_prompts(models.text_encoders, [batch[f"input_ids.{number}"] for number in
                                                                   range(len(models.text_encoders))], args.sdxl)
        conditioning = {"encoder_hidden_states": embeddings.repeat(2, 1, 1)}
        if args.sdxl:
            size = torch.tensor([args.resolution, args.resolution, 0, 0, args.resolution, args.resolution])
            conditioning["added_cond_kwargs"] = {"text_embeds": pooled.repeat(2, 1),
                                                 "time_ids": size.to(noisy.device, dtype).repeat(len(noisy), 1)}
    prediction = policy(noisy, steps, return_dict=False, **conditioning)[0].to(dtype)
    with torch.no_grad():
        ref_prediction = models.reference(noisy, steps, return_dict=False, **conditioning)[0]
    error_w, error_l = (prediction - noise).square().mean(dim=(1, 2, 3)).chunk(2)
    ref_error_w, ref_error_l = (ref_prediction - noise).square().mean(dim=(1, 2, 3)).chunk(2)
    margin = -0.5 * config.beta * ((error_w - error_l) - (ref_error_w - ref_error_l))
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    with parts.part("backward"):
        accelerator.backward(loss)
    with parts.part("logging"):
        scalars = {"train_loss": loss, "accuracy": (margin > 0).float().mean(), "model_mse": error_w.mean(),
                   "ref_mse": ref_error_w.mean(), "win": (error_w - ref_error_w).mean(),
                   "lose": (error_l - ref_error_l).mean(), "scale": torch.ones_like(loss)}
        return {name: accelerator.gather(value.detach().repeat(args.train_batch_size)).mean().item()
                for name, value in scalars.items()}


# --- measuring -----------------------------------------------------------------------------------------------------

@dataclass
class Bench:
    """optimizer_step: one optimizer step, timed by `parts`. policy: as accelerate has prepared it."""

    optimizer_step: Callable[[], None]
    parts: Parts
    policy: nn.Module


def prepare(variant: str, args: TrainArguments, options: Arguments, table: datasets.Dataset, accelerator: Accelerator,
            folder: Path) -> Bench:
    """Models, data and loop of a variant; for options.steps + 1 optimizer steps."""
    device, dtype, official = accelerator.device, COMPUTE_DTYPES[args.mixed_precision], variant == "baseline"
    models = make_encoders(options.model, args, dtype, device)
    cache = None
    if variant in ("cached", "compact", "compiled"):
        args.cached_dataset = str(folder)
        if not (folder / "manifest.json").is_file():
            encode_table(table, ["jpg_0", "jpg_1"], models, args, CacheArguments(), accelerator)
        cache = CachedDataset(folder)
        models.vae, models.text_encoders = None, []
        free_device(device)
    args.compile = args.channels_last = variant == "compiled"
    args.selective_checkpointing = variant in ("compact", "compiled") and not args.sdxl
    args.offload_reference = variant == "compact" and args.sdxl
    with torch.device(device):
        torch.manual_seed(0)
        unet = make_unet(options.model)
    set_up_policy_and_reference(models, unet, args, dtype, device)
    trainable = list(models.policy.parameters())
    accelerator.autocast_handler.cache_enabled = official
    if official:
        models.reference = frozen(models.reference, dtype)
        optimizer = (Adafactor(trainable, lr=1e-6, scale_parameter=False, relative_step=False) if args.sdxl else
                     torch.optim.AdamW(trainable, lr=1e-6))
    else:
        optimizer = make_optimizer(trainable, args, 1e-6)
    policy, optimizer = accelerator.prepare(models.policy, optimizer)
    unwrapped = accelerator.unwrap_model(policy)
    dataset = PairDataset(choose_pairs(table, args, 0), models.tokenizers, args, 0, models.latent_shape, cache)
    if official:  # which moves float pixels
        read = dataset.read
        dataset.read = lambda *key: (item := read(*key)) | {"pixel_values": scale_pixels(item["pixel_values"])}
    batches = iter(make_loader(dataset, args, accelerator.process_index, accelerator.num_processes, 0,
                               options.steps + 1, pin_memory=device.type == "cuda"))

    parts, scalars = Parts(device), StepScalars()
    parts.watch(policy, "policy")
    parts.watch(models.reference, "reference")
    for encoder in models.text_encoders:
        parts.watch(encoder, "text")
    if models.vae is not None:
        parts.watch(models.vae.encoder, "vae")

    def optimizer_step() -> None:
        for _ in range(options.accumulation):
            with parts.part("data"):
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
            with accelerator.accumulate(policy):
                if official:
                    official_micro_step(policy, models, batch, args, accelerator, parts)
                else:
                    our_micro_step(policy, unwrapped, models, batch, args, accelerator, scalars, parts)
        with parts.part("optimizer"):
            norm = gradient_norm(accelerator, policy, args)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with parts.part("logging"):
            if not official:
                scalars.reduce(accelerator, grad_norm=norm)

    return Bench(optimizer_step, parts, policy)


def measure(variant: str, args: TrainArguments, options: Arguments, table: datasets.Dataset, accelerator: Accelerator,
            folder: Path, peak: float) -> Result:
    device = accelerator.device
    bench = prepare(variant, args, options, table, accelerator, folder)
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
    flops = 4 * unet_forward_flops(options.model, 2 * args.train_batch_size, args.resolution)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    del bench
    accelerator.free_memory()
    free_device(device)
    return Result(variant, args.train_batch_size / total * 1000, milliseconds, peak_gib, flops / (total / 1000) / peak)


def free_device(device: torch.device) -> None:
    """Drop what is no longer used, and start counting the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def report(results: list[Result], options: Arguments, args: TrainArguments, device: torch.device, peak: float) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()}), CPU time, " \
        f"{torch.get_num_threads()} thread(s)"
    lines = [f"{options.model}, {args.resolution} px, {args.train_batch_size} pairs x {options.accumulation} accumulated, "
             f"mixed precision {args.mixed_precision}; {name}, matrix products at {peak / 1e12:.3g} TFLOP/s; torch {torch.__version__}, "
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


def main() -> None:
    [options] = parse_words(HfArgumentParser(Arguments, prog="python -m benchmarks.train_step"))
    if options.model not in RESOLUTIONS:
        raise UserError(f"--model must be one of {', '.join(RESOLUTIONS)}, not {options.model}")
    cuda = torch.cuda.is_available()
    variants = ["baseline"] if options.baseline else options.variants or list(VARIANTS if cuda else VARIANTS[:-1])
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise UserError(f"--variants are {', '.join(VARIANTS)}, not {', '.join(unknown)}")
    check_positive(options, "batch", "accumulation", "steps")
    check_output(options.json)
    workers = options.num_workers if options.num_workers >= 0 else 8 if cuda else 0
    args = parse_arguments([
        f"--pretrained_model_name_or_path={options.model}", "--dataset_name=synthetic", "--report_to=none",
        f"--mixed_precision={options.mixed_precision or ('bf16' if cuda else 'no')}", "--use_winner_preserving",
        "--winner_preserving_mu=0.9", f"--train_batch_size={options.batch}", "--seed=0", "--allow_tf32",
        f"--gradient_accumulation_steps={options.accumulation}", f"--dataloader_num_workers={workers}",
        f"--resolution={RESOLUTIONS[options.model]}", *(["--sdxl"] if options.model == "sdxl" else []),
        *options.train_flags])
    chosen = names_given(options.train_flags)
    refused = chosen & {"train_batch_size", "gradient_accumulation_steps", "channels_last", "compile", "lora_rank", "sft",
                        "selective_checkpointing", "offload_reference", "cached_dataset", "resolution", "sdxl"}
    if refused or args.train_method != "diffusion-dpo":
        raise UserError(f"--train_flags cannot change what is compared ({', '.join(sorted(refused)) or args.train_method}): use "
                        "--model, --batch, --accumulation and --variants")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("one device is measured: start it without a launcher; benchmarks.communication is about several")
    accelerator = start_accelerator(args)
    if not cuda:
        torch.set_num_threads(1)  # threads that wait for each other on a busy machine count as CPU time
    datasets.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it remarks on every module.to(dtype)
    if "compiled" in variants:
        check_compiler(accelerator.device)
    peak = matrix_rate(accelerator.device, COMPUTE_DTYPES[args.mixed_precision])
    table = make_pairs(4 * options.batch, args.resolution)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for variant in variants:
            results.append(measure(variant, args, options, table, accelerator, Path(folder), peak))
            print(f"measured {variant}: {results[-1].pairs_per_second:.2f} pairs/s", file=sys.stderr, flush=True)
    print(report(results, options, args, accelerator.device, peak))
    if options.json:
        Path(options.json).write_text(json.dumps([vars(result) for result in results], indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
