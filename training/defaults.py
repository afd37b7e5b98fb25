"""Defaults that depend on the method and on the base: the published values, filled in where an option was not given."""

from models.family import Family
from common.train_options import TrainOptions

BETA = {  # (method, family); None stands for any other family
    (None, None): 5000.0,
    ("dspo", "sd15"): 0.001,
    ("dmpo", None): 2000.0, ("dmpo", "sdxl"): 6000.0,
    ("linear-dpo", None): 100.0, ("linear-dpo", "sdxl"): 500.0,
}
MU = {(None, None): 0.9, (None, "sdxl"): 0.6, ("dspo", "sd15"): 0.2}
ALPHA = {("dmpo", None): 0.01, (None, None): 0.0}
PUBLISHED_BATCH = 2048  # pairs per step, by which --scale_lr multiplies the published rates
RATE_BEFORE_SCALING = {  # of the Diffusion-DPO scripts; where a method publishes its own, that divided by 2048
    (None, None): 1e-8, (None, "sdxl"): 1e-9,
    ("mapo", None): 1e-5 / PUBLISHED_BATCH, ("kto", None): 1e-7 / PUBLISHED_BATCH,
    ("linear-dpo", None): 5e-6 / PUBLISHED_BATCH, ("linear-dpo", "sdxl"): 1e-5 / PUBLISHED_BATCH,
}
LORA_RATE = 1e-4
WARMUP = 500  # of 2000 steps


def settle_defaults(options: TrainOptions, base: Family) -> None:
    """Fill in every option whose default depends on the method or the family; one that was given stays, 0 included."""
    objective, optimizer = options.objective, options.optimizer
    method, family = objective.train_method, base.name
    if options.data.resolution is None:
        options.data.resolution = base.resolution
    if optimizer.optimizer == "auto":
        optimizer.optimizer = default_optimizer(options, family)
    if objective.beta_dpo is None:
        objective.beta_dpo = look_up(BETA, method, family)
    if objective.winner_preserving_mu is None:
        objective.winner_preserving_mu = look_up(MU, method, family)
    if objective.dmpo_alpha is None:
        objective.dmpo_alpha = look_up(ALPHA, method, family)
    if optimizer.learning_rate is None:
        optimizer.learning_rate = default_rate(options, family)
    if optimizer.lr_warmup_steps is None:
        steps = optimizer.max_train_steps
        optimizer.lr_warmup_steps = min(WARMUP, steps // 4) if steps else WARMUP


def default_optimizer(options: TrainOptions, family: str) -> str:
    """AdamW; Adafactor where it is asked for, and for the whole of SDXL, whose moments would not fit."""
    if options.optimizer.use_8bit_adam:
        return "adamw8bit"
    whole_sdxl = family == "sdxl" and not options.model.lora_rank
    return "adafactor" if options.optimizer.use_adafactor or whole_sdxl else "adamw"


def default_rate(options: TrainOptions, family: str) -> float:
    """The published rate before --scale_lr; without it the rate that the published batch of 2048 pairs makes of it."""
    published = look_up(RATE_BEFORE_SCALING, options.objective.train_method, family)
    if options.optimizer.scale_lr:
        return published
    return LORA_RATE if options.model.lora_rank else published * PUBLISHED_BATCH


def look_up(table: dict, method: str, family: str):
    """The most specific entry of a (method, family) table; None where there is none."""
    for key in ((method, family), (method, None), (None, family), (None, None)):
        if key in table:
            return table[key]
    return None
