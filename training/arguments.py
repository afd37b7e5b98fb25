"""train.py's options: names and defaults of the published program, checked before anything is loaded."""

import difflib
import math
import os
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from transformers import HfArgumentParser

from losses import METHODS, LossConfig
from training.errors import UserError, first_line


def option(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainArguments:
    # Models
    pretrained_model_name_or_path: str = field(metadata={"help": "base pipeline: a diffusers folder or a hub id"})
    revision: str | None = option(None, "hub revision of the base pipeline")
    pretrained_vae_model_name_or_path: str | None = option(None, "another VAE than the base pipeline's")
    unet_init: str | None = option(None, "weights that start policy AND reference: a diffusers folder, unet.pth, ...")
    sdxl: bool = option(False, "SDXL: two text encoders, size conditioning, Adafactor, gradient checkpointing, 1024 px")
    lora_rank: int = option(0, "train LoRA of this rank on the attention layers; 0 trains the whole UNet")
    cache_dir: str | None = option(None, "where hub downloads are kept")

    # Objective
    train_method: Literal["diffusion-dpo", "dspo", "dmpo", "sft", "spo"] = option("diffusion-dpo", "the objective")
    sft: bool = option(False, "the same as --train_method sft")
    beta_dpo: float = option(5000.0, "beta, strength of the implicit KL to the reference")
    dmpo_alpha: float = option(0.0, "DMPO's label smoothing, in [0, 1)")
    use_winner_preserving: bool = option(False, "the SDPO safeguard: scale the loser's gradient by lambda")
    winner_preserving_mu: float = option(0.0, "the safeguard's strength in [0, 1]; larger is more conservative")
    winner_preserving_granularity: Literal["batch", "sample"] = option("batch", "one lambda a micro-batch, or a pair")
    winner_preserving_space: Literal["output", "parameter"] = option(
        "output", "lambda from gradients of predictions (published), or of parameters (a second backward pass)")

    # Data
    dataset_name: str | None = option(None, "preference pairs: a hub id or a local folder or parquet file")
    dataset_config_name: str | None = option(None, "configuration of the hub dataset")
    train_data_dir: str | None = option(None, "local folder (parquet, or saved by datasets) of the same columns")
    split: str = option("train", "split of the dataset; only 'train' is shuffled")
    image_column: str = option("image", "image column of a dataset without pairs (sft only)")
    caption_column: str = option("caption", "caption column")
    max_train_samples: int | None = option(None, "use a seeded shuffle's first N pairs")
    resolution: int | None = option(None, "training size in pixels (default 512, with --sdxl 1024)")
    random_crop: bool = option(False, "random instead of centre crops, drawn for each image")
    no_hflip: bool = option(False, "no horizontal flips")
    paired_hflip: bool = option(False, "flip winner and loser together instead of independently")
    proportion_empty_prompts: float = option(0.2, "share of prompts replaced by the empty one")
    choice_model: Literal["aes", "clip", "hps", "pickscore", "imagereward", "oracle"] | None = option(
        None, "relabel the pairs by this scorer; oracle: of drawn shapes")
    metrics_config: str | None = option(None, "model ids and paths of --choice_model (default configs/metrics.yaml)")
    dreamlike_pairs_only: bool = option(False, "only pairs whose two generators are Dreamlike models")
    dataloader_num_workers: int = option(0, "processes that decode images, a device; one a core at most")
    cached_dataset: str | None = option(None, "a folder made by training.cache with the same flags: its encoded images "
                                        "and prompts replace VAE and text encoders")

    # Optimisation
    train_batch_size: int = option(1, "pairs a device in a micro-step")
    gradient_accumulation_steps: int = option(1, "micro-steps an optimizer step")
    max_train_steps: int = option(2000, "optimizer steps; 0 counts --num_train_epochs instead")
    num_train_epochs: int = option(100, "passes over the data, where --max_train_steps is 0")
    learning_rate: float = option(1e-8, "peak learning rate, before --scale_lr")
    scale_lr: bool = option(False, "multiply the learning rate by devices * batch * accumulation")
    lr_scheduler: str = option("constant_with_warmup", "a schedule of diffusers.optimization")
    lr_warmup_steps: int = option(500, "optimizer steps of linear warm-up")
    optimizer: Literal["auto", "adamw", "adamw8bit", "adafactor", "sgd"] = option(
        "auto", "auto: AdamW, Adafactor for SDXL")
    use_adafactor: bool = option(False, "Adafactor, and no gradient clipping (as published)")
    adam_beta1: float = option(0.9, "AdamW beta1")
    adam_beta2: float = option(0.999, "AdamW beta2")
    adam_weight_decay: float = option(1e-2, "weight decay, of Adafactor too")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(1.0, "gradient norm clip")
    noise_offset: float = option(0.0, "scale of a per-channel offset added to the noise")
    input_perturbation: float = option(0.0, "scale of extra noise on the UNet's input, shared by the pair")
    seed: int | None = option(None, "seed of everything random (default: drawn, and printed)")

    # Precision, speed and memory
    mixed_precision: Literal["no", "fp16", "bf16"] = option("fp16", "compute dtype of the UNets, VAE and text encoders")
    allow_tf32: bool = option(False, "TF32 matrix products on NVIDIA GPUs")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass (SDXL: always)")
    selective_checkpointing: bool = option(False, "recompute what is cheap and keep the rest, instead of recomputing all")
    compile: bool = option(False, "torch.compile the UNets' repeated blocks: some minutes at the start, faster steps")
    channels_last: bool = option(False, "keep the UNets' convolutions in channels-last memory")
    offload_reference: bool = option(False, "keep the reference on the host between its turns, for small GPUs")
    use_8bit_adam: bool = option(False, "AdamW with 8-bit moments (needs bitsandbytes or torchao)")

    # Robustness
    max_bad_fraction: float = option(0.01, "stop when clearly more than this share of the pairs cannot be used")
    max_nonfinite_steps: int = option(10, "stop after this many steps in a row without a finite loss and gradient")
    watch_winner_rise: float = option(0.1, "warn when the winners' error is above the reference's by this share")
    watch_margin: float = option(10.0, "warn when the margins' root mean square passes this many logits")
    process_timeout: float = option(1800.0, "seconds that a process waits for the others before the run ends")

    # Output
    output_dir: str = option("sd-model-finetuned", "checkpoints, logs and the trained pipeline")
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints; 0 keeps only the final one")
    checkpoints_total_limit: int | None = option(None, "keep this many checkpoints, the newest")
    resume_from_checkpoint: str | None = option("latest", "a checkpoint folder, 'latest' or 'none'")
    allow_changed_resume: bool = option(False, "resume although settings that matter have changed")
    hard_skip_resume: bool = option(False, "accepted: resuming never replays the data here")
    logging_dir: str = option("logs", "tracker files, inside output_dir")
    report_to: str = option("tensorboard", "tracker of accelerate: tensorboard, wandb, ..., all or none")
    tracker_project_name: str = option("tuning", "project name in the tracker")
    validation_prompts: list[str] = option([], "prompts drawn by policy and reference from the same noise")
    validation_steps: int = option(500, "optimizer steps between validations")
    validation_guidance: float = option(7.5, "guidance scale of the validation images, in diffusers' sense")
    validation_inference_steps: int = option(30, "Euler steps of the validation images")
    push_to_hub: bool = option(False, "upload the trained pipeline, with a model card")
    hub_model_id: str | None = option(None, "repository to push to (default: the name of output_dir)")
    local_rank: int = option(-1, "accepted and ignored: accelerate knows the rank")

    def loss_config(self) -> LossConfig:
        return LossConfig(self.train_method, self.beta_dpo, self.dmpo_alpha, self.use_winner_preserving,
                          self.winner_preserving_mu, self.winner_preserving_granularity, self.sdxl)

    @property
    def data_source(self) -> str | None:
        """Where the pairs come from; a local folder given beside a preset's dataset name wins."""
        return self.train_data_dir or self.dataset_name

    @property
    def safeguards_parameters(self) -> bool:
        return self.use_winner_preserving and self.needs_reference and self.winner_preserving_space == "parameter"

    @property
    def needs_reference(self) -> bool:
        return self.train_method != "sft"


def yaml_to_argv(path: str, classes: tuple[type, ...]) -> list[str]:
    """A yaml file of `flag: value` as command-line words, so that one parser checks both; the real words come after.
    classes: the dataclasses of options."""
    types = {f.name: f.type for cls in classes for f in fields(cls)}
    known = list(types)
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {first_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold lines of `flag: value`, not a {type(settings).__name__}")
    argv = []
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "; see train.py --help"
            raise UserError(f"{path}: no option is called '{key}'{hint}")
        if isinstance(value, dict) or isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
            raise UserError(f"{path}: '{key}' must be a plain value or a list of them")
        if isinstance(value, list) and get_origin(types[key]) is not list:
            raise UserError(f"{path}: '{key}' takes one value, not a list of {len(value)}")
        if value is False and "no" in get_args(types[key]):
            value = "no"  # yaml takes an unquoted no for false
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *map(str, values)]
    return argv


def parse_words(parser: HfArgumentParser, argv: list[str] | None = None) -> list:
    """The parser's dataclasses (and its namespace, where it has one) from the command line. Raises UserError for words
    that are no option, and for values that do not fit one."""
    files = config_files(sys.argv[1:] if argv is None else argv)

    def refuse(message: str):
        raise UserError(message + (f" (on the command line or in {', '.join(files)})" if files else "") + "; see --help")

    parser.error = refuse  # argparse's own prints every option's name first
    *parsed, left = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if left:
        name = left[0].split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
        raise UserError(f"no option is called {name}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    return parsed


def parse_arguments(argv: list[str] | None = None, *classes):
    """Command line and --config FILE.yaml (the command line wins) -> checked TrainArguments.

    `classes` adds further dataclasses of options; then a tuple comes back. Raises UserError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser((TrainArguments, *classes), prog="train.py", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="options in a file; the command line wins")
    argv = [word for config in config_files(argv) for word in yaml_to_argv(config, (TrainArguments, *classes))] + argv
    parsed = parse_words(parser, argv)
    args = parsed[0]
    check_arguments(args, names_given(argv))
    return (args, *parsed[1:1 + len(classes)]) if classes else args


def names_given(argv: list[str]) -> set[str]:
    """The options that these words of a command line set."""
    return {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}


def config_files(argv: list[str]) -> list[str]:
    """Every --config FILE of the command line, in order: a later file wins over an earlier one."""
    return [word.split("=", 1)[1] if "=" in word else argv[position + 1] for position, word in enumerate(argv)
            if word.startswith("--config=") or word == "--config" and position + 1 < len(argv)]


def warn(message: str) -> None:
    """One line on stderr, from one process of the node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def check_arguments(args: TrainArguments, given: set[str] = frozenset()) -> None:
    """Refuse bad values, settle defaults that depend on others, warn of options the method ignores. Raises UserError."""
    if args.sft:
        if "train_method" in given and args.train_method != "sft":
            raise UserError(f"--sft and --train_method {args.train_method} contradict each other: drop one")
        args.train_method = "sft"
    if args.resolution is None:
        args.resolution = 1024 if args.sdxl else 512

    if args.train_method in METHODS:
        try:
            args.loss_config()
        except ValueError as error:
            flag = {"beta": "beta_dpo"}.get(str(error).split()[0], str(error).split()[0])
            raise UserError(f"--{flag}: {error}") from None
    for name in ("train_batch_size", "gradient_accumulation_steps", "resolution", "validation_steps",
                 "validation_inference_steps", "max_nonfinite_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("lora_rank", "max_train_steps", "lr_warmup_steps", "checkpointing_steps", "dataloader_num_workers",
                 "noise_offset", "input_perturbation", "adam_weight_decay", "num_train_epochs"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be a number of at least 0, not {getattr(args, name)}")
    for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "watch_winner_rise", "watch_margin",
                 "process_timeout", "validation_guidance"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} must be a finite number above 0, not {value}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} must lie in [0, 1), not {getattr(args, name)}")
    if args.process_timeout > 1e9:
        raise UserError(f"--process_timeout must be at most 1e9 seconds, not {args.process_timeout:g}")
    if not args.output_dir.strip():
        raise UserError("--output_dir names no folder")
    if args.use_8bit_adam and (args.use_adafactor or args.optimizer not in ("auto", "adamw8bit")):
        other = "use_adafactor" if args.use_adafactor else f"optimizer {args.optimizer}"
        raise UserError(f"--use_8bit_adam and --{other} contradict each other: drop one")
    if args.use_adafactor and args.optimizer not in ("auto", "adafactor"):
        raise UserError(f"--use_adafactor and --optimizer {args.optimizer} contradict each other: drop one")
    for name in ("proportion_empty_prompts", "max_bad_fraction"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} must lie in [0, 1], not {getattr(args, name)}")
    if args.resolution % 8:
        raise UserError(f"--resolution must be a multiple of 8 (the VAE's downsampling), not {args.resolution}")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise UserError(f"--max_train_samples must be at least 1, not {args.max_train_samples}")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        raise UserError(f"--checkpoints_total_limit must be at least 1, not {args.checkpoints_total_limit}")
    if args.max_train_steps == 0 and args.num_train_epochs == 0:
        raise UserError("--max_train_steps 0 needs --num_train_epochs of at least 1")
    for name in ("pretrained_model_name_or_path", "unet_init", "pretrained_vae_model_name_or_path", "train_data_dir"):
        source = getattr(args, name)
        if source and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(args.output_dir):
            raise UserError(f"--output_dir is --{name} itself, which the result would overwrite: name another folder")
    if args.train_method != "spo" and args.data_source is None and args.cached_dataset is None:
        raise UserError("name the preference pairs: --dataset_name (hub id, folder or parquet) or --train_data_dir")
    if args.cached_dataset and args.choice_model and args.data_source is None:
        raise UserError("--choice_model looks at the images, which a cache does not hold: name them too, with "
                        "--train_data_dir or --dataset_name")
    if args.cached_dataset and args.random_crop:
        raise UserError("--cached_dataset holds centre crops: drop --random_crop, or train without a cache")
    if args.safeguards_parameters:
        if args.winner_preserving_granularity == "sample":
            raise UserError("--winner_preserving_space parameter has one lambda a micro-batch: a pair's own would take a "
                            "backward pass each; drop --winner_preserving_granularity sample")
        other = ("--compile" if args.compile else "--selective_checkpointing" if args.selective_checkpointing else
                 "--train_method spo" if args.train_method == "spo" else None)
        if other:
            raise UserError(f"--winner_preserving_space parameter does not go with {other}: drop one")
    if any("\ud800" <= character <= "\udfff" for character in "".join(args.validation_prompts)):
        raise UserError("--validation_prompts holds bytes that are not UTF-8 text")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must lie in [0, 2^63), not {args.seed}")

    _warn_of_ignored(args, given)


def _warn_of_ignored(args: TrainArguments, given: set[str]) -> None:
    def ignored(name: str, reason: str) -> None:
        if name in given and getattr(args, name) != default_of(name):
            warn(f"--{name} does nothing here: {reason}")

    if args.train_method != "dmpo":
        ignored("dmpo_alpha", f"only dmpo has a label smoothing, this is {args.train_method}")
    if args.train_method == "sft":
        for name in ("beta_dpo", "use_winner_preserving"):
            ignored(name, "sft trains on winners alone, without a reference")
    if not args.use_winner_preserving:
        for name in ("winner_preserving_mu", "winner_preserving_granularity", "winner_preserving_space"):
            ignored(name, "the safeguard is off (--use_winner_preserving turns it on)")
    if args.lora_rank or not args.needs_reference:
        ignored("offload_reference", "there is no reference model: LoRA's is the policy without its adapter"
                if args.lora_rank else "sft has no reference model")
    if args.no_hflip:
        ignored("paired_hflip", "flips are off (--no_hflip)")
    if args.train_method != "sft":
        ignored("image_column", "pairs have the columns jpg_0 and jpg_1")
    if args.max_train_steps:
        ignored("num_train_epochs", "--max_train_steps counts (0 makes the epochs count)")
    adam = args.optimizer in ("auto", "adamw", "adamw8bit") and not args.use_adafactor and (
        not args.sdxl or args.optimizer != "auto" or args.use_8bit_adam)
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if not adam else ():
        ignored(name, "the optimizer is not AdamW")
    if args.optimizer == "sgd":
        ignored("adam_weight_decay", "SGD has none here")
    if args.use_adafactor:
        ignored("max_grad_norm", "--use_adafactor turns clipping off, as published")
    ignored("hard_skip_resume", "resuming never replays the data")
    if not args.choice_model:
        ignored("metrics_config", "only --choice_model judges images")
    if not args.push_to_hub:
        ignored("hub_model_id", "nothing is uploaded without --push_to_hub")
    if not args.validation_prompts:
        ignored("validation_steps", "there are no --validation_prompts")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:  # 0 says itself that there is none
        ignored("lr_warmup_steps", "the constant schedule has no warm-up (constant_with_warmup has)")
    if args.lr_warmup_steps >= args.max_train_steps > 0:
        warn(f"--lr_warmup_steps {args.lr_warmup_steps} is not below --max_train_steps {args.max_train_steps}: "
             "the learning rate never reaches its peak")


def default_of(name: str):
    for f in fields(TrainArguments):
        if f.name == name:
            return f.default if f.default is not MISSING else f.default_factory()
    raise KeyError(name)
