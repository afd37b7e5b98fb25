"""Defaults that depend on the method and on the base: the published values, filled in where an option was not given."""

from common.errors import UserError, warn
from common.train_options import TrainOptions
from models.devices import settle_precision
from models.family import Family
from models.quantize import check_quantization

FLOW = "flow matching"  # in the tables: every family that predicts velocities

# beta: velocity errors are 1 to 2 at every noise level where noise errors are 0.1, so flow matching has 100 for 5000
# (flow_grpo, Flow-Factory and verl-omni), and what is published for noise alone divided by the same 50.
BETA = {  # (method, family); None stands for any other
    (None, None): 5000.0, (None, FLOW): 100.0,
    ("dspo", FLOW): 0.001,  # SD1.5's form: that of SDXL switches at 0.1, in units of noise
    ("dmpo", FLOW): 40.0, ("linear-dpo", FLOW): 2.0,
    ("dspo", "sd15"): 0.001,
    ("dmpo", None): 2000.0, ("dmpo", "sdxl"): 6000.0,
    ("linear-dpo", None): 100.0, ("linear-dpo", "sdxl"): 500.0,
}
MU = {(None, None): 0.9, (None, "sdxl"): 0.6, (None, FLOW): 0.6, ("dspo", "sd15"): 0.2}
ALPHA = {("dmpo", None): 0.01, (None, None): 0.0}
PUBLISHED_BATCH = 2048  # pairs per step, by which --scale_lr multiplies the published rates
RATE_BEFORE_SCALING = {  # of the Diffusion-DPO scripts; where a method publishes its own, that divided by 2048
    (None, None): 1e-8, (None, "sdxl"): 1e-9,
    ("mapo", None): 1e-5 / PUBLISHED_BATCH, ("kto", None): 1e-7 / PUBLISHED_BATCH,
    ("linear-dpo", None): 5e-6 / PUBLISHED_BATCH, ("linear-dpo", "sdxl"): 1e-5 / PUBLISHED_BATCH,
}
LORA_RATE = 1e-4
FLOW_LORA_RATE, FLOW_RATE = 1e-5, 1e-6  # Flow-Factory's, where 1e-4 collapses; of the whole network none is published
FLOW_LORA_RANK = {None: 32, "qwen_image": 64}  # with alpha twice the rank, as published
FLOW_STEPS = 1000
WARMUP = 500  # of 2000 steps


def settle_defaults(options: TrainOptions, base: Family) -> None:
    """Fill in every option whose default depends on the method or the family; one that was given stays, 0 included."""
    objective, optimizer = options.objective, options.optimizer
    settle_precision(options, base)
    settle_model(options, base)
    check_quantization(options, base)
    if optimizer.optimizer == "auto":
        optimizer.optimizer = default_optimizer(options, base)
    method, steps = objective.train_method, optimizer.max_train_steps
    for group, name, value in ((options.data, "resolution", base.training_resolution),
                               (objective, "beta_dpo", look_up(BETA, method, base)),
                               (objective, "winner_preserving_mu", look_up(MU, method, base)),
                               (objective, "dmpo_alpha", look_up(ALPHA, method, base)),
                               (optimizer, "learning_rate", default_rate(options, base)),
                               (optimizer, "lr_warmup_steps", min(WARMUP, steps // 4) if steps else WARMUP)):
        if getattr(group, name) is None:
            setattr(group, name, value)


def settle_model(options: TrainOptions, base: Family) -> None:
    """LoRA's rank and alpha, and what flow matching has otherwise than the options' declarations say."""
    model, given = options.model, options.given
    for name in sorted(given & set(base.ignored_options)):
        warn(f"--{name} means nothing for {base.label}")
    model.max_sequence_length = base.sequence_length or model.max_sequence_length
    if base.flow:
        for group, name, value in ((model, "lora_rank", FLOW_LORA_RANK.get(base.name, FLOW_LORA_RANK[None])),
                                   (options.optimizer, "max_train_steps", FLOW_STEPS),
                                   (options.run, "validation_guidance", base.guidance),
                                   (options.run, "validation_inference_steps", base.steps)):
            if name not in given:
                setattr(group, name, value)
        per_pair = "winner_preserving_granularity" in given or options.objective.winner_preserving_space == "parameter"
        if not per_pair:  # a batch's lambda follows its noisy pairs, a pair's own is the same in every space
            options.objective.winner_preserving_granularity = "sample"
    if model.lora_rank and options.objective.reference_ema is not None:
        raise UserError(f"--reference_ema needs a reference of its own, and LoRA's, the default of {base.label}, is the "
                        "policy without its adapter: drop it, or train the whole network with --lora_rank 0")
    if model.lora_rank and model.lora_alpha is None:
        model.lora_alpha = float(model.lora_rank * (2 if base.flow else 1))
    if not model.lora_rank:
        for name in ("lora_alpha", "lora_dropout", "lora_targets", "merge_lora", "no_merged_result"):
            if getattr(model, name) and name in given:
                warn(f"--{name} does nothing here: it needs --lora_rank")
    if model.merge_lora is None:
        model.merge_lora = not base.flow


def default_optimizer(options: TrainOptions, base: Family) -> str:
    """AdamW; Adafactor where it is asked for, and for the whole of SDXL, whose moments would not fit."""
    if options.optimizer.use_8bit_adam:
        return "adamw8bit"
    whole_sdxl = base.name == "sdxl" and not options.model.lora_rank
    return "adafactor" if options.optimizer.use_adafactor or whole_sdxl else "adamw"


def default_rate(options: TrainOptions, base: Family) -> float:
    """The published rate before --scale_lr; without it the rate that the published batch of 2048 pairs makes of it."""
    if base.flow:
        rate = FLOW_LORA_RATE if options.model.lora_rank else FLOW_RATE
        return rate / PUBLISHED_BATCH if options.optimizer.scale_lr else rate
    published = look_up(RATE_BEFORE_SCALING, options.objective.train_method, base)
    if options.optimizer.scale_lr:
        return published
    return LORA_RATE if options.model.lora_rank else published * PUBLISHED_BATCH


def look_up(table: dict, method: str, base: Family):
    """The most specific entry of a (method, family) table; None where there is none."""
    flow = [(method, FLOW), (None, FLOW)] if base.flow else []
    for key in ((method, base.name), *flow, (method, None), (None, base.name), (None, None)):
        if key in table:
            return table[key]
    return None
