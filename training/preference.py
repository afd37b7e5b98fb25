"""Learning from preference pairs: every offline objective, with or without the safeguard, and training on winners."""

import math
from dataclasses import fields, replace

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError, warn
from common.train_options import WITH_BETA, ObjectiveOptions, TrainOptions
from data.cached import CachedDataset, check_cache
from data.contradictions import contradictions
from data.images import scale_pixels
from data.labels import ai_feedback_labels
from data.pairs import PairDataset
from data.choosing import PairTable, choose_pairs
from data.table import content_digest, load_table
from losses import LossConfig, kto_reference_point, preference_loss
from models.devices import sharded
from models.family import Family, Text
from models.policy import MovingReference, Policy, load_policy
from training.defaults import PUBLISHED_BATCH
from training.fit import StepLoss
from training.guards import DriftWatch
from training.optimizers import effective_learning_rate
from training.parameter_space import check_whole_gradients, parameter_space_loss
from training.run import Run
from training.state import LoraWeights, WeightsAndReference, WholeWeights
from training.stored_pairs import StoredPairs
from training.validation import Validation, encode_validation

FEW_PAIRS = 8  # a step of fewer, at the rate published for 2048, is warned of


class PreferenceTask(StoredPairs):
    """Offline preference optimisation. See training.fit.Task for what each method is for."""

    def __init__(self, run: Run, family: Family, policy: Policy, pairs: PairTable, cache: CachedDataset | None = None,
                 shown: tuple[Text, Text] | None = None):
        options = run.options
        size = (options.data.resolution, options.data.resolution)
        dataset = PairDataset(pairs, options.data, run.seed, family.latent_shape(*size), family.tokenize, cache,
                              winners_only=options.objective.winners_only)
        super().__init__(run, dataset, max_steps=(
            options.optimizer.max_train_steps
            or math.ceil(options.optimizer.num_train_epochs * len(pairs) / run.pairs_per_step)))
        self.family, self.policy, self.pairs, self.cache, self.size = family, policy, pairs, cache, size
        self.name, self.trained = options.objective.train_method, policy.network
        decay = options.objective.reference_ema
        self.moving = MovingReference(policy, decay) if decay is not None and policy.reference is not None else None
        self.weights = (LoraWeights(family, run) if policy.lora else WholeWeights(family.weights_file) if self.moving is None
                        else WeightsAndReference(family.weights_file, reference=self.moving))
        if self.moving and sharded(run.accelerator):
            raise UserError("--reference_ema needs whole weights on every device: train with DDP")
        self.config = loss_config(options.objective, family.name)
        self.watch = DriftWatch(options.run.watch_winner_rise, options.run.watch_margin, options.objective.safeguarded)
        self.validation = Validation(run, family, policy, shown)
        if options.objective.safeguards_parameters:
            check_whole_gradients(run.accelerator)
        if run.pairs_per_step > len(pairs):
            warn(f"a step takes {run.pairs_per_step} pairs, and there are {len(pairs)}: lower --gradient_accumulation_steps "
                 "or --train_batch_size")
        if run.pairs_per_step < FEW_PAIRS and not policy.lora and not family.flow and "learning_rate" not in options.given:
            warn(f"{run.pairs_per_step} pair{'s' * (run.pairs_per_step > 1)} a step at the rate published for "
                 f"{PUBLISHED_BATCH}: the gradient is mostly noise. Raise --gradient_accumulation_steps, or lower "
                 "--learning_rate")

    # --- a step ----------------------------------------------------------------------------------------------------------

    def stepped(self) -> None:
        if self.moving:
            self.moving.update()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> StepLoss:
        accelerator, family = self.run.accelerator, self.family
        x_t, target, times, text = self.noised(batch)
        ref_pred = None
        if self.run.options.objective.needs_reference:
            with torch.no_grad(), accelerator.autocast(), self.policy.as_reference(self.run.device) as reference:
                ref_pred = family.predict(reference, x_t, times, text, self.size)
        with accelerator.autocast():  # a context of its own: weights that the first one cast carry no gradient
            model_pred = family.predict(model, x_t, times, text, self.size)
        if self.run.options.objective.safeguards_parameters:
            trainable = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
            loss, result = parameter_space_loss(accelerator, trainable, model_pred, ref_pred, target, self.config)
        else:
            result = preference_loss(model_pred, ref_pred, target, self.config, self.run.options.objective.fixed_lambda,
                                     kto_z=lambda gain: kto_reference_point(accelerator.gather(gain)),
                                     liked=batch.get("liked"))
            loss = result.loss
        self.results.append((times, result.logs["train_loss"], result.margin))
        return StepLoss(loss, result.logs)

    @torch.no_grad()
    def noised(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Text]:
        """x_t, target (N, C, h, w), times (N,) and text of a micro-batch of B pairs on the device, winners first: N = 2B,
        for sft B. One time and one noise per pair, shared by winner and loser."""
        members = batch["vae_noise"].shape[1]  # winner and loser; the winner alone for sft
        if self.cache is not None:
            moments = winners_first(batch["moments"])
            text = group(batch, "text")
        else:
            moments = self.family.encode_images(scale_pixels(winners_first(batch["pixel_values"])))
            text = self.family.encode_text(group(batch, "tokens"))
        latents = self.family.latents(moments, winners_first(batch["vae_noise"]))
        times = self.family.times(batch["timestep"]).repeat(members)
        noise = batch["noise"].repeat(members, 1, 1, 1)
        input_noise = batch["input_noise"].repeat(members, 1, 1, 1) if "input_noise" in batch else None
        x_t, target = self.family.noise(latents, noise, times, input_noise)
        return x_t, target, times, {name: rows.repeat(members, *[1] * (rows.dim() - 1)) for name, rows in text.items()}

    # --- after a step ----------------------------------------------------------------------------------------------------

    def settle(self, step: int, logs: dict[str, float]) -> str | None:
        for warning in self.watch(step, logs):
            self.run.warn(warning)
        return super().settle(step, logs)

    def validate(self, step: int) -> None:
        self.validation(step)

    # --- the start -------------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, str]:
        run, options = self.run, self.run.options
        objective, optimizer = options.objective, options.optimizer
        safeguard = "off"
        if objective.safeguarded:
            safeguard = (f"mu {objective.winner_preserving_mu:g}{options.origin('winner_preserving_mu')}, one lambda per "
                         f"{objective.winner_preserving_granularity}, {objective.winner_preserving_space} space")
        elif objective.fixed_lambda is not None:
            safeguard += f", fixed lambda {objective.fixed_lambda:g}"
        beta = f", beta {objective.beta_dpo:g}{options.origin('beta_dpo')}" if self.name in WITH_BETA else ""
        reference = "policy without adapter" if self.policy.lora else "frozen copy"
        if self.moving:
            reference += f", moving average of decay {objective.reference_ema:g}"
        lr = effective_learning_rate(optimizer, run.accelerator.num_processes)
        return {
            "method": f"{self.name}{beta}, safeguard {safeguard}",
            "base": f"{options.model.pretrained_model_name_or_path} ({self.family.label}, {options.data.resolution} px)"
                    + (f", weights of {options.model.unet_init}" if options.model.unet_init else ""),
            "policy": self.policy.in_words(options),
            "reference": reference if objective.needs_reference else "none",
            "precision": f"{options.memory.mixed_precision}, errors in float32",
            "pairs": "; ".join([f"{len(self.pairs)} of {options.data.source or options.data.cached_dataset}",
                                f"read as {self.pairs.layout}", *self.pairs.notes]
                               + [f"encoded in {options.data.cached_dataset}"] * bool(options.data.cached_dataset)),
            "batch": run.batch_in_words,
            "steps": f"{self.max_steps}, {self.max_steps * run.pairs_per_step / len(self.pairs):.2f} passes over the pairs",
            "optimizer": f"{optimizer.optimizer}{options.origin('optimizer')}, learning rate {lr:.4g} after scaling"
                         f"{options.origin('learning_rate')}, {optimizer.lr_scheduler}, {optimizer.lr_warmup_steps} warm-up "
                         f"steps{options.origin('lr_warmup_steps')}",
            "seed": str(run.seed),
            "output": str(run.output_dir),
        }


def make_task(run: Run, family: Family) -> PreferenceTask:
    """Pairs first, before any large model is read; then encoders, policy and reference. Raises UserError."""
    options = run.options
    cache = CachedDataset(options.data.cached_dataset) if options.data.cached_dataset else None
    with run.accelerator.main_process_first():
        table, images = load_rows(options, cache)
    labels = None
    if options.data.choice_model:  # what a step costs does not depend on them
        labels = (np.ones(len(table)) if options.run.dry_run else
                  ai_feedback_labels(images, options.data, run.output_dir, run.accelerator))
    pairs = choose_pairs(table, options.data, run.seed, labels, options.objective.train_method)
    if run.main and images is not None and (groups := contradictions(replace(pairs, rows=images))):
        warn(f"{sum(map(len, groups))} pairs contradict each other: the same two images under one caption with opposite "
             f"winners (rows {' and '.join(map(str, groups[0]))}{', ...' * (len(groups) > 1)}); "
             "python -m data.check names all of them")
    if not pairs.paired and (name := options.objective.needs_pairs):
        source = options.data.source or options.data.cached_dataset
        raise UserError(f"--{name} needs pairs, and {source} holds {pairs.layout}: drop it")
    if cache:
        check_cache(cache, options.data, family, options.memory.mixed_precision, pairs.image_columns)
    else:
        family.load_encoders(run.dtype, run.device)
    shown = encode_validation(run, family)
    policy = load_policy(family, options.memory, run.dtype, run.device, options.objective.needs_reference,
                         options.data.resolution)
    return PreferenceTask(run, family, policy, pairs, cache, shown)


def load_rows(options: TrainOptions, cache: CachedDataset | None) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The table that pairs are chosen from, and the one with the images; of a cache the former, and the latter where it
    is at hand or is looked at. Raises UserError, also where local data is not what the cache was made of."""
    data, cache_dir = options.data, options.model.cache_dir
    if cache is None:
        table = load_table(data, cache_dir)
        return table, table
    compared = data.is_local and data.split == cache.settings.get("split")
    images = load_table(data, cache_dir) if data.choice_model or compared else None
    if images is not None and content_digest(images, data) != cache.settings.get("content"):
        raise UserError(f"{data.source} (split {data.split}) is not the data that --cached_dataset {cache.folder} was made "
                        "of, or not in its order: name no data and take the cache's rows, or cache again into an empty "
                        "folder")
    return cache.rows(), images


def loss_config(objective: ObjectiveOptions, family: str) -> LossConfig:
    """The options by their names in losses/."""
    named = {f.name: getattr(objective, f.name) for f in fields(LossConfig) if hasattr(objective, f.name)}
    return LossConfig(method=objective.train_method, beta=objective.beta_dpo, sdxl=family == "sdxl", **named)


def winners_first(per_pair: Tensor) -> Tensor:
    """(B, k, ...) -> (k * B, ...), all winners before all losers."""
    return per_pair.transpose(0, 1).flatten(0, 1)


def group(batch: dict[str, Tensor], prefix: str) -> Text:
    """The batch's entries "PREFIX.NAME", by NAME."""
    return {name.removeprefix(f"{prefix}."): value for name, value in batch.items() if name.startswith(f"{prefix}.")}
