"""Trains SPO's step-aware preference model on Pick-a-Pic pairs (arXiv:2406.04314, section 3.1).

    accelerate launch -m spo.preference_model.train --config configs/train/spm_sd15.yaml [flags that win over the file]

Both images of a pair are noised to one timestep with one noise, restored in one step by the frozen base model, and scored
at that timestep. OUTPUT_DIR/step-aware_preference_model.bin has the official checkpoints' names; accuracy.json tells how
often the preferred image scores higher, at five timesteps, before and after training.
"""

import copy
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from losses.spo import clean_and_noise
from spo.preference_model.data import LabelledPairs
from spo.preference_model.model import (EVALUATION_TIMESTEPS, StepAwarePreferenceModel, clamp_resize_clamp, load_spm,
                       load_spm_tokenizer)
from common.train_options import config_files, option, parse_words, warn, yaml_to_argv
from training.checkpoints import (continuing, find_checkpoint, load_checkpoint, policy_state, read_progress, register_hooks,
                                  save_checkpoint, save_weights, write_run_file, write_whole)
from data.pairs import load_table, tokenize, worker_count
from models.stable_diffusion import encode_images, winners_first
from data.draws import PairStream
from models.guidance import condition_on_prompts, decode_latents, guided_prediction
from training.guards import allowed_bad_pairs, is_finite
from training.run import COMPUTE_DTYPES, identify_run, start_accelerator, take_step, tracker_config
from training.records import StepScalars, bar_interval, peak_memory_gb
from models.policy import (Models, cast_compute_weights, check_conditioning, load_frozen_encoders,
                             load_tokenizers_and_scheduler)
from common.signals import StopSignal, outlive_signals
from models.weights import load_unet

WEIGHTS_FILE = "step-aware_preference_model.bin"
MAX_NONFINITE_STEPS = 10  # in a row


@dataclass
class SPMArguments:
    """Options that train.py has too bear its names: its loaders read them."""

    # Models
    pretrained_model_name_or_path: str = field(metadata={"help": "base pipeline that restores the noised images"})
    revision: str | None = option(None, "hub revision of the base pipeline")
    pretrained_vae_model_name_or_path: str | None = option(None, "another VAE than the base pipeline's")
    sdxl: bool = option(False, "the base is SDXL")
    spm_clip: str = option("yuvalkirstain/PickScore_v1", "the CLIP to condition on the timestep")
    spm_tokenizer: str = option("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "that CLIP's tokenizer")
    cache_dir: str | None = option(None, "where hub downloads are kept")

    # Data
    dataset_name: str | None = option(None, "preference pairs: a hub id or a local folder or parquet file")
    dataset_config_name: str | None = option(None, "configuration of the hub dataset")
    train_data_dir: str | None = option(None, "local folder (parquet, or saved by datasets) of the same columns")
    split: str = option("train", "split to train on")
    validation_split: str = option("validation_unique", "split whose accuracy is reported; 'none' for none")
    caption_column: str = option("caption", "caption column")
    resolution: int | None = option(None, "size of the base model's images (default 512, with --sdxl 1024)")
    relabel_threshold: float = option(0.0, "above 0: label the pairs by --spm_clip itself, as ties where the two "
                                           "probabilities differ by less")
    dataloader_num_workers: int = option(0, "processes that decode images, a device; one a core at most")
    max_bad_fraction: float = option(0.01, "stop when clearly more than this share of the pairs cannot be used")

    # Optimisation
    guidance: float = option(5.0, "guidance scale of the base model")
    train_batch_size: int = option(16, "pairs a device in a micro-step")
    gradient_accumulation_steps: int = option(1, "micro-steps an optimizer step")
    max_train_steps: int = option(8000, "optimizer steps")
    learning_rate: float = option(3e-6, "peak learning rate")
    lr_warmup_steps: int = option(500, "steps of logarithmic warm-up; then linear decay to 0")
    adam_weight_decay: float = option(0.3, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradient norm clip")
    gradient_checkpointing: bool = option(False, "recompute the vision tower's activations in the backward pass")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("bf16", "compute dtype of all models")
    allow_tf32: bool = option(False, "TF32 matrix products on NVIDIA GPUs")
    seed: int | None = option(None, "seed of everything random (default: drawn, and printed)")

    # Output
    output_dir: str = option("step-aware-preference-model", "checkpoints, logs, weights and accuracies")
    validation_steps: int = option(1000, "optimizer steps between validations")
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints; 0 keeps only the final one")
    checkpoints_total_limit: int | None = option(None, "keep this many checkpoints, the newest")
    resume_from_checkpoint: str | None = option("latest", "a checkpoint folder, 'latest' or 'none'")
    allow_changed_resume: bool = option(False, "resume although settings that matter have changed")
    logging_dir: str = option("logs", "tracker files, inside output_dir")
    report_to: str = option("tensorboard", "tracker of accelerate: tensorboard, wandb, ..., all or none")
    tracker_project_name: str = option("spm", "project name in the tracker")

    lora_rank = 0  # no option here: the whole model is trained, and its checkpoints say so

    @property
    def data_source(self) -> str | None:
        return self.train_data_dir or self.dataset_name


def parse_spm_arguments(argv: list[str] | None = None) -> SPMArguments:
    """Command line and --config FILE.yaml (the command line wins). Raises UserError for bad values."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(SPMArguments, prog="spo.preference_model.train", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="options in a file; the command line wins")
    args = parse_words(parser, [word for config in config_files(argv) for word in yaml_to_argv(config, (SPMArguments,))] + argv)[0]
    if args.resolution is None:
        args.resolution = 1024 if args.sdxl else 512
    if args.resolution < 8 or args.resolution % 8:
        raise UserError(f"--resolution must be a multiple of 8 (the VAE's downsampling), not {args.resolution}")
    if args.data_source is None:
        raise UserError("name the preference pairs: --dataset_name (hub id, folder or parquet) or --train_data_dir")
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "validation_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("learning_rate", "guidance", "max_grad_norm"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} must be above 0, not {getattr(args, name)}")
    if not 0 <= args.relabel_threshold < 1:
        raise UserError(f"--relabel_threshold must lie in [0, 1), not {args.relabel_threshold}")
    if not 0 <= args.max_bad_fraction <= 1:
        raise UserError(f"--max_bad_fraction must lie in [0, 1], not {args.max_bad_fraction}")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must lie in [0, 2^63), not {args.seed}")
    if args.checkpointing_steps < 0 or args.lr_warmup_steps < 0:
        raise UserError("--checkpointing_steps and --lr_warmup_steps must not be negative")
    return args


def warmup_then_decay(step: int, warmup_steps: int, max_steps: int) -> float:
    """Share of the peak rate after `step` optimizer steps: logarithmic warm-up, then linear to 0. DeepSpeed's
    WarmupDecayLR, whose warm-up is logarithmic unless told otherwise, and the official program does not tell it."""
    if step < warmup_steps:
        return math.log(step + 1) / math.log(max(2, warmup_steps))
    return max(0, max_steps - step) / max(1, max_steps - warmup_steps)


def preference_cross_entropy(scores: Tensor, label_0: Tensor) -> Tensor:
    """Cross-entropy (B,) of softmax(score_0, score_1) to the soft labels; a tie's is shifted by log 0.5, so that 0 is the
    least it can be. scores: (2, B); label_0: (B,) the probability that image 0 is preferred."""
    log_probabilities = scores.log_softmax(dim=0)
    loss = -(label_0 * log_probabilities[0] + (1 - label_0) * log_probabilities[1])
    return loss + torch.where(label_0 == 0.5, torch.tensor(0.5).log(), 0.0)


def labels_from_scores(scores: Tensor, threshold: float) -> Tensor:
    """Soft labels (B,) of image 0 from scores (2, B): a tie where the probabilities differ by less than `threshold`."""
    difference = torch.tanh((scores[0] - scores[1]) / 2)
    return torch.where(difference.abs() < threshold, 0.5, (difference > 0).float())


def agreement(scores: Tensor, label_0: Tensor) -> Tensor:
    """1 where the preferred image scores higher, 0 where it does not, one half for a tie (B,); with equal scores 0, as the
    official program has it. scores: (2, B); label_0: (B,)."""
    return label_0 * (scores[0] > scores[1]) + (1 - label_0) * (scores[0] < scores[1])


class Restorer:
    """Noised and restored images of a batch, and the labels: all that needs the frozen models. judge: PickScore in float32,
    which relabels; None leaves the dataset's labels."""

    def __init__(self, models: Models, unet, judge: StepAwarePreferenceModel | None, tokenizer, args: SPMArguments,
                 accelerator: Accelerator):
        self.models, self.unet, self.judge, self.tokenizer = models, unet, judge, tokenizer
        self.args, self.accelerator = args, accelerator

    @torch.no_grad()
    def images(self, batch: dict, timestep: Tensor) -> Tensor:
        """(2B, 3, H, W) around [-1, 1], images 0 first: noised to timestep (B,) with the pair's one noise, x0-hat decoded."""
        models = self.models
        conditioning = condition_on_prompts(models, self.args, batch["caption"], timestep.device)
        latents = encode_images(models.vae, winners_first(batch["pixel_values"]), winners_first(batch["vae_noise"]))
        timestep = timestep.repeat(2)
        noisy = models.scheduler.add_noise(latents, batch["noise"].repeat(2, 1, 1, 1), timestep)
        rows = torch.arange(len(batch["caption"]), device=timestep.device).repeat(2)
        with self.accelerator.autocast():
            prediction = guided_prediction(self.unet, noisy, timestep, conditioning, rows, self.args.guidance)
        clean, _ = clean_and_noise(prediction, noisy, timestep, models.scheduler.alphas_cumprod,
                                   models.scheduler.config.prediction_type)
        return decode_latents(models.vae, clean)

    @torch.no_grad()
    def labels(self, batch: dict) -> Tensor:
        """label_0 (B,): the dataset's, or by the untrained CLIP on the images themselves, in float32 as officially."""
        if self.judge is None:
            return batch["label_0"]
        pixels = winners_first(batch["judged"]).float() / 255
        scores = self.judge(pixels, torch.zeros(len(pixels), device=pixels.device), self.input_ids(batch))
        return labels_from_scores(scores.unflatten(0, (2, -1)), self.args.relabel_threshold)

    def input_ids(self, batch: dict) -> Tensor:
        return tokenize(self.tokenizer, batch["caption"]).to(batch["pixel_values"].device)


def on_device(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()}


@torch.no_grad()
def accuracies(spm: StepAwarePreferenceModel, restorer: Restorer, pairs: LabelledPairs, batch_size: int,
               accelerator: Accelerator) -> dict[str, float]:
    """Mean agreement() over the pairs at each evaluation timestep; at t = 0 the images themselves are looked at. As
    officially, a tie counts one half, but does not count where PickScore relabels; nor do pairs that cannot be used. {}
    where no pair counts. Every process must call this."""
    rank, world = accelerator.process_index, accelerator.num_processes
    own = [(index, index) for index in range(rank, len(pairs), world)]
    batches = [own[start:start + batch_size] for start in range(0, len(own), batch_size)]
    right = torch.zeros(len(EVALUATION_TIMESTEPS), device=accelerator.device)
    number = torch.zeros(1, device=accelerator.device)
    for batch in DataLoader(pairs, batch_sampler=batches):
        batch = on_device(batch, accelerator.device)
        labels, input_ids = restorer.labels(batch), restorer.input_ids(batch)
        counts = (batch["passed_over"] == 0) & ((labels != 0.5) | (restorer.judge is None))
        number += counts.sum()
        for row, t in enumerate(EVALUATION_TIMESTEPS):
            timestep = torch.full((len(labels),), t, device=accelerator.device)
            images = restorer.images(batch, timestep) if t else winners_first(batch["pixel_values"])
            pixels = clamp_resize_clamp(images, spm.image_size)
            with accelerator.autocast():
                scores = spm(pixels, timestep.repeat(2), input_ids)
            right[row] += (agreement(scores.unflatten(0, (2, -1)), labels) * counts).sum()
    right, number = (accelerator.reduce(tensor, reduction="sum") for tensor in (right, number))
    if number == 0:
        return {}
    return {f"accuracy_t{t}": float(value / number) for t, value in zip(EVALUATION_TIMESTEPS, right)}


def train(args: SPMArguments, stop: StopSignal) -> None:
    # 1. The run, and the small files of its models.
    accelerator = start_accelerator(args)
    device, main_process, world = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    dtype = COMPUTE_DTYPES[args.mixed_precision]
    identify_run(args, accelerator)
    models = load_tokenizers_and_scheduler(args)
    tokenizer = load_spm_tokenizer(args.spm_tokenizer, args.cache_dir)

    # 2. Pairs.
    source = args.data_source
    with accelerator.main_process_first():
        table = load_table(args)
        validation = None if args.validation_split == "none" else load_table(replace(args, split=args.validation_split))

    # 3. Models: frozen base, the trained model, and the labels' judge.
    load_frozen_encoders(models, args, dtype, device)
    unet = load_unet(args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir)
    check_conditioning(unet, args)
    unet = cast_compute_weights(unet.requires_grad_(False).eval(), dtype).to(device)
    spm = load_spm(args.spm_clip, cache_dir=args.cache_dir).train().to(device)
    spm.gradient_checkpointing = args.gradient_checkpointing
    judge = None
    if args.relabel_threshold:
        judge = copy.deepcopy(spm).requires_grad_(False).eval()
    restorer = Restorer(models, unet, judge, tokenizer, args, accelerator)
    judge_size = spm.image_size if judge else None
    pairs = LabelledPairs(table, args.caption_column, args.resolution, models.latent_shape, args.seed, source, judge_size)
    validation = validation and LabelledPairs(validation, args.caption_column, args.resolution, models.latent_shape, args.seed,
                                              f"{source} ({args.validation_split})", judge_size)

    # 4. Optimizer, schedule, resume.
    optimizer = torch.optim.AdamW(spm.parameters(), lr=args.learning_rate, weight_decay=args.adam_weight_decay)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_then_decay(step, args.lr_warmup_steps, args.max_train_steps))
    wrapped, optimizer = accelerator.prepare(spm, optimizer)
    write_run_file(args, accelerator)
    register_hooks(accelerator, lora=False, weights_file=WEIGHTS_FILE)
    checkpoint = find_checkpoint(args, accelerator)
    first_step = load_checkpoint(accelerator, lr_scheduler, checkpoint, args) if checkpoint else 0
    bad_pairs = read_progress(checkpoint)["record"].get("bad_pairs", 0) if checkpoint else 0
    per_step = world * args.train_batch_size * args.gradient_accumulation_steps
    if main_process:
        accelerator.init_trackers(args.tracker_project_name, tracker_config(args))
        print(f"Training the step-aware preference model on {len(pairs)} pairs of {source}: {args.max_train_steps} steps of "
              f"{per_step} pairs, {world} device(s), {args.mixed_precision}, seed {args.seed}", flush=True)
        if checkpoint:
            print(f"resuming {checkpoint}, after step {first_step}", flush=True)

    def validate(step: int) -> None:
        if validation is None:
            return
        wrapped.eval()
        found = accuracies(accelerator.unwrap_model(wrapped), restorer, validation, args.train_batch_size, accelerator)
        wrapped.train()
        accelerator.log(found, step=step)
        if main_process and not found:
            warn(f"no pair of {args.validation_split} counts: there is no accuracy to report")
        elif main_process:
            add_accuracies(Path(args.output_dir), step, found)
            shown = "  ".join(f"t={t} {found[f'accuracy_t{t}']:.3f}" for t in EVALUATION_TIMESTEPS)
            print(f"step {step}: accuracy on {len(validation)} pairs of {args.validation_split}: {shown}", flush=True)

    if first_step == 0:
        validate(0)

    # 5. The loop: one optimizer step a turn.
    accumulation = args.gradient_accumulation_steps
    stream = PairStream(len(pairs), args.train_batch_size, accelerator.process_index, world, args.seed, shuffle=True,
                        first_micro_step=first_step * accumulation, last_micro_step=args.max_train_steps * accumulation)
    micro_batches = iter(DataLoader(pairs, batch_sampler=stream, num_workers=worker_count(args.dataloader_num_workers),
                                    pin_memory=device.type == "cuda", worker_init_fn=outlive_signals))
    scalars, saved_step, skipped = StepScalars(), first_step, 0
    bar = tqdm(range(first_step, args.max_train_steps), initial=first_step, total=args.max_train_steps, desc="spm",
               unit="step", disable=not accelerator.is_local_main_process, dynamic_ncols=True, mininterval=bar_interval())
    for step in bar:
        replaced = torch.zeros((), device=device)
        for _ in range(accumulation):
            batch = on_device(next(micro_batches), device)
            replaced += (batch["passed_over"] > 0).sum()
            timestep = (batch["timestep"] * models.scheduler.config.num_train_timesteps).long()
            pixels = clamp_resize_clamp(restorer.images(batch, timestep), spm.image_size)
            labels = restorer.labels(batch)
            with accelerator.accumulate(wrapped):
                scores = wrapped(pixels, timestep.repeat(2), restorer.input_ids(batch)).unflatten(0, (2, -1))
                losses = preference_cross_entropy(scores, labels)
                total = accelerator.reduce(batch["weight"].sum(), reduction="sum")
                loss = (batch["weight"] * losses).sum() * world / total  # processes average their gradients
                accelerator.backward(loss)
            scalars.add({"train_loss": loss.detach(), "accuracy": agreement(scores.detach(), labels).mean()})
        grad_norm = accelerator.clip_grad_norm_(spm.parameters(), args.max_grad_norm)
        done = step + 1
        logs = scalars.reduce(accelerator, grad_norm=grad_norm if grad_norm is not None else 0.0, bad_pairs=replaced,
                              stop_share=float(stop.name is not None))
        finite = is_finite(accelerator, logs)
        take_step(accelerator, optimizer, lr_scheduler, finite)
        skipped = 0 if finite else skipped + 1
        if not finite and main_process:
            warn(f"step {done} is skipped: loss {logs['train_loss']:g}, gradient norm {logs['grad_norm']:g} ({skipped} in a row)")
        bad_pairs += round(logs["bad_pairs"] * world)
        logs["bad_pairs"] = bad_pairs
        stopped_by_signal = logs.pop("stop_share") > 0
        accelerator.log(logs | {"lr": lr_scheduler.get_last_lr()[0], "peak_memory_gb": peak_memory_gb(device)}, step=done)
        bar.set_postfix(loss=f"{logs['train_loss']:.4g}", acc=f"{logs['accuracy']:.3g}", refresh=False)
        too_many_bad = bad_pairs > allowed_bad_pairs(done * per_step, args.max_bad_fraction)
        never_finite = skipped >= MAX_NONFINITE_STEPS
        if never_finite or (too_many_bad or stopped_by_signal) and done < args.max_train_steps:
            good = done - skipped if never_finite else done  # skipped steps left the model as it was
            if good and saved_step != good:
                save_checkpoint(accelerator, wrapped, lr_scheduler, good, args, WEIGHTS_FILE, {"bad_pairs": bad_pairs})
            accelerator.end_training()
            kept = f"{Path(args.output_dir, f'checkpoint-{good}')} is saved" if good else "nothing was learned"
            if never_finite:
                go_on = ", and continue with --allow_changed_resume" if good else ""
                raise UserError(f"loss or gradient was not finite in {skipped} steps in a row: {kept}; lower "
                                f"--learning_rate, or train in bf16{go_on}")
            if too_many_bad:
                raise UserError(f"{bad_pairs} of {done * per_step} pairs could not be used, more than --max_bad_fraction "
                                f"{args.max_bad_fraction:g}: {kept}. python -m data.check names them; raise "
                                "the bound to train on regardless")
            if main_process:
                print(f"Stopped by {stop.name or 'a signal'}: {kept}"
                      + f", {continuing(args.resume_from_checkpoint)}" * bool(good), flush=True)
            return
        if done % args.validation_steps == 0 or done == args.max_train_steps:
            validate(done)
        if args.checkpointing_steps and done % args.checkpointing_steps == 0 and done < args.max_train_steps:
            save_checkpoint(accelerator, wrapped, lr_scheduler, done, args, WEIGHTS_FILE, {"bad_pairs": bad_pairs})
            saved_step = done

    # 6. The result: a last checkpoint and the weights under the official names.
    if saved_step < args.max_train_steps:
        save_checkpoint(accelerator, wrapped, lr_scheduler, args.max_train_steps, args, WEIGHTS_FILE,
                        {"bad_pairs": bad_pairs})
    state = policy_state(accelerator, wrapped)
    if main_process:
        save_weights(Path(args.output_dir) / WEIGHTS_FILE, state)
        print(f"Done: {Path(args.output_dir) / WEIGHTS_FILE}", flush=True)
    accelerator.end_training()


def add_accuracies(output_dir: Path, step: int, found: dict[str, float]) -> None:
    """Add a validation to OUTPUT_DIR/accuracy.json, a list of {"step", "accuracy_tN", ...} in order of steps."""
    path = output_dir / "accuracy.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    entries = [entry for entry in entries if entry["step"] < step] + [{"step": step} | found]
    write_whole(path, json.dumps(entries, indent=1))


def main() -> None:
    for library in (datasets, diffusers.utils.logging, transformers.utils.logging):
        (getattr(library, "disable_progress_bar", None) or library.disable_progress_bars)()  # ours is the run's
    args = parse_spm_arguments()
    with StopSignal() as stop:
        train(args, stop)


if __name__ == "__main__":
    run_program(main)
