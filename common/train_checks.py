"""train.py's options, parsed and checked: what contradicts is refused, and what does nothing is warned of.

What needs the base to be known is refused where it is looked up: training/defaults.py, models/quantize.py and devices.py.
"""

import os
from dataclasses import fields
from importlib.util import find_spec

from common.errors import UserError, warn
from common.options import default_of, parse, warn_of_ignored
from common.train_options import GROUPS, DataOptions, ObjectiveOptions, TrainOptions

TRACKERS = {  # accelerate's, and the packages of which each needs one
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",), "comet_ml": ("comet_ml",),
    "aim": ("aim",), "mlflow": ("mlflow",), "clearml": ("clearml",), "dvclive": ("dvclive",), "swanlab": ("swanlab",),
}


def parse_options(argv: list[str] | None = None, *more: type, program: str = "train.py",
                  description: str | None = None) -> TrainOptions:
    """Command line and --config FILE.yaml (the command line wins) -> checked options. more: further groups, which
    options.more then holds. Raises UserError."""
    groups, given = parse([*GROUPS, *more], argv, program=program, description=description, configurable=True)
    options = TrainOptions(*groups[:len(GROUPS)], given, groups[len(GROUPS):])
    check_options(options)
    return options


def check_options(options: TrainOptions) -> None:
    """Refuse options that contradict each other, and warn of those that do nothing. Raises UserError."""
    model, memory, data = options.model, options.memory, options.data
    objective, optimizer, run, given = options.objective, options.optimizer, options.run, options.given
    if objective.sft:
        if "train_method" in given and objective.train_method != "sft":
            raise UserError(f"--sft and --train_method {objective.train_method} contradict each other: drop one")
        objective.train_method = "sft"
    check_run_options(options)
    if optimizer.use_8bit_adam and (optimizer.use_adafactor or optimizer.optimizer not in ("auto", "adamw8bit")):
        other = "use_adafactor" if optimizer.use_adafactor else f"optimizer {optimizer.optimizer}"
        raise UserError(f"--use_8bit_adam and --{other} contradict each other: drop one")
    if optimizer.use_adafactor and optimizer.optimizer not in ("auto", "adafactor"):
        raise UserError(f"--use_adafactor and --optimizer {optimizer.optimizer} contradict each other: drop one")
    if optimizer.max_train_steps == 0 and optimizer.num_train_epochs == 0:
        raise UserError("--max_train_steps 0 needs --num_train_epochs of at least 1")
    check_data_options(data, objective)
    if model.no_merged_result:
        if model.merge_lora:
            raise UserError("--no_merged_result and --merge_lora contradict each other: drop one")
        model.merge_lora = False
    if model.lora_dropout and objective.train_method == "spo":
        raise UserError("--lora_dropout does not go with spo, whose policy samples its own pairs: drop it")
    if objective.reference_ema is not None and model.lora_rank:
        raise UserError("--reference_ema needs a reference of its own, and LoRA's is the policy without adapter: drop one")
    if objective.fixed_lambda is not None and objective.use_winner_preserving:
        raise UserError("--fixed_lambda and --use_winner_preserving contradict each other: drop one")
    if objective.safeguards_parameters:
        if objective.train_method in ("mapo", "ipo", "kto"):
            raise UserError(f"--winner_preserving_space parameter does not go with {objective.train_method}, which may pull "
                            "at the winner the wrong way: leave it at output")
        if objective.winner_preserving_granularity == "sample":
            raise UserError("--winner_preserving_space parameter has one lambda a micro-batch: a pair's own would take a "
                            "backward pass each; drop --winner_preserving_granularity sample")
        other = "--compile" if memory.compile else "--selective_checkpointing" if memory.selective_checkpointing else None
        if other:
            raise UserError(f"--winner_preserving_space parameter does not go with {other}: drop one")
    if any("\ud800" <= character <= "\udfff" for character in "".join(run.validation_prompts)):
        raise UserError("--validation_prompts holds bytes that are not UTF-8 text: type them again, or name a UTF-8 file")
    warn_of_ignored(options.groups(), given, objective.train_method)
    _warn_of_combinations(options)


def check_run_options(options: TrainOptions) -> None:
    """What every program that trains asks of its base, its size, its seed and its folder. Raises UserError."""
    model, data, run = options.model, options.data, options.run
    if not model.pretrained_model_name_or_path:
        raise UserError("name the base model: --pretrained_model_name_or_path (a diffusers folder or a hub id)")
    if not run.output_dir.strip():
        raise UserError("--output_dir names no folder: give it one")
    check_tracker(run.report_to)
    if data.resolution is not None and data.resolution % 8:
        lower = data.resolution // 8 * 8
        raise UserError(f"--resolution must be a multiple of 8 (the VAE's downsampling), not {data.resolution}: take "
                        f"{lower} or {lower + 8}")
    for name, source in (("pretrained_model_name_or_path", model.pretrained_model_name_or_path),
                         ("unet_init", model.unet_init),
                         ("pretrained_vae_model_name_or_path", model.pretrained_vae_model_name_or_path),
                         ("train_data_dir", data.train_data_dir)):
        if source and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(run.output_dir):
            raise UserError(f"--output_dir is --{name} itself, which the result would overwrite: name another folder")
    if run.seed is not None and run.seed >= 2**63:
        raise UserError(f"--seed must lie in [0, 2^63), not {run.seed}")


def check_tracker(name: str) -> None:
    """accelerate leaves a tracker whose package is missing out without a word. Raises UserError."""
    if name in ("all", "none"):
        return
    if name not in TRACKERS:
        raise UserError(f"--report_to {name} is no tracker that accelerate knows: {', '.join(TRACKERS)}, all or none")
    if not any(find_spec(package) for package in TRACKERS[name]):
        package = TRACKERS[name][0]
        raise UserError(f"--report_to {name}: the package {package} is not installed: pip install {package}, or "
                        "--report_to none")


def check_data_options(data: DataOptions, objective: ObjectiveOptions) -> None:
    if objective.train_method != "spo" and data.source is None and data.cached_dataset is None:
        raise UserError("name the preference pairs: --dataset_name (hub id, folder or parquet) or --train_data_dir")
    if data.cached_dataset and data.choice_model and data.source is None:
        raise UserError("--choice_model looks at the images, which a cache does not hold: name them too, with "
                        "--train_data_dir or --dataset_name")
    for one, other in (("winner_column", "loser_column"), ("loser_column", "winner_column")):
        if getattr(data, one) and not getattr(data, other):
            raise UserError(f"--{one} needs --{other}: name both image columns of a pair")
    if data.winner_column and data.winner_column == data.loser_column:
        raise UserError(f"--winner_column and --loser_column are both {data.winner_column}: a pair has two images")
    if len(data.label_column) > 2:
        raise UserError(f"--label_column takes one column, or two of scores, not {len(data.label_column)}")
    if data.dataset_shards and data.is_local:
        raise UserError(f"--dataset_shards is for a dataset on the hub, {data.source} is here: drop it, or take "
                        "--max_train_samples")
    if data.cached_dataset and data.random_crop:
        raise UserError("--cached_dataset holds centre crops: drop --random_crop, or train without a cache")


def _warn_of_combinations(options: TrainOptions) -> None:
    """What is ignored for a reason that no declaration gives."""
    model, data, optimizer = options.model, options.data, options.optimizer
    values = options.flat()
    defaults = {f.name: default_of(f) for group in options.groups() for f in fields(group)}

    def ignored(name: str, reason: str) -> None:
        if name in options.given and values[name] not in (defaults[name], 0):
            warn(f"--{name} does nothing here: {reason}")

    if model.lora_rank:
        ignored("offload_reference", "there is no reference model: LoRA's is the policy without its adapter")
    elif not options.objective.needs_reference:
        ignored("offload_reference", f"{options.objective.train_method} has no reference model")
    if data.no_hflip:
        ignored("paired_hflip", "flips are off (--no_hflip)")
    if optimizer.max_train_steps:
        ignored("num_train_epochs", "--max_train_steps counts (0 makes the epochs count)")
    if optimizer.use_adafactor or optimizer.optimizer in ("adafactor", "sgd"):
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            ignored(name, "the optimizer is not AdamW")
    if optimizer.optimizer == "sgd":
        ignored("adam_weight_decay", "SGD has none here")
    if optimizer.use_adafactor:
        ignored("max_grad_norm", "--use_adafactor turns clipping off, as published")
    ignored("hard_skip_resume", "resuming never replays the data")
    if not options.run.validation_prompts:
        ignored("validation_steps", "there are no --validation_prompts")
    if optimizer.lr_scheduler == "constant":
        ignored("lr_warmup_steps", "the constant schedule has no warm-up (constant_with_warmup has)")
    elif optimizer.lr_warmup_steps is not None and optimizer.lr_warmup_steps >= optimizer.max_train_steps > 0:
        warn(f"--lr_warmup_steps {optimizer.lr_warmup_steps} is not below --max_train_steps {optimizer.max_train_steps}: "
             "the learning rate never reaches its peak")
