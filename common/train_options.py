"""train.py's options, each declared once, with the published program's names; the cache and the check of data take them too.

Defaults that depend on the method or the base are None here, and settled by training/defaults.py; common/train_checks.py
parses the options and refuses what contradicts.
"""

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from common.options import declaration, option

PAIRWISE = ("diffusion-dpo", "dspo", "dmpo", "mapo", "poly-dpo", "linear-dpo", "ipo", "dpop", "kto")
WITH_BETA = tuple(method for method in PAIRWISE if method != "mapo")
REFERENCE_FREE = ("sft", "mapo")
OFFLINE = (*PAIRWISE, "sft")


@dataclass
class ModelOptions:
    title = "models"

    pretrained_model_name_or_path: str = option("", "base pipeline: a diffusers folder or a hub id", default_text="required")
    revision: str | None = option(None, "hub revision of the base pipeline")
    pretrained_vae_model_name_or_path: str | None = option(None, "another VAE than the base pipeline's")
    unet_init: str | None = option(None, "weights that start policy AND reference: a diffusers folder, unet.pth, ...")
    sdxl: bool = option(False, "the base is SDXL: refuse any other (the base's model_index.json says which it is)")
    lora_rank: int = option(0, "train LoRA of this rank on the attention layers; 0 trains the whole network", at_least=0,
                            default_text="0; flow matching 32, Qwen-Image 64")
    lora_alpha: float | None = option(None, "LoRA is scaled by this over its rank", above=0,
                                      default_text="the rank; flow matching twice the rank")
    lora_dropout: float = option(0.0, "share of LoRA's inputs that is dropped in training", at_least=0, below=1)
    lora_targets: list[str] = option([], "layers that get LoRA, by the end of their names",
                                     default_text="the base's own: attention; flow matching also the feed-forward layers")
    merge_lora: bool | None = option(None, "leave the whole pipeline with the LoRA merged, beside the adapter", free=True,
                                     default_text="on; off for flow matching, whose networks are large")
    no_merged_result: bool = option(False, "leave LoRA's adapter alone: the same as --merge_lora false", free=True)
    max_sequence_length: int | None = option(
        None, "tokens of a caption that flow-matching bases read", at_least=1,
        default_text="SD3 256, others 512; SD1.5 and SDXL read 77, always")
    timestep_sampling: Literal["uniform", "logit_normal"] | None = option(
        None, "how sigma is drawn for flow matching, before the shift; SD1.5 and SDXL draw from all timesteps alike",
        default_text="SD3 logit_normal, others uniform")
    logit_mean: float = option(0.0, "of logit_normal: above 0 there is more noise (flow matching alone)")
    logit_std: float = option(1.0, "of logit_normal (flow matching alone)", above=0)
    timestep_shift: float | None = option(
        None, "s in sigma' = s sigma / (1 + (s - 1) sigma), above 1 for more noise (flow matching alone)", above=0,
        default_text="the base's static one; 1 where its sampler's depends on the size")
    embedded_guidance: float = option(1.0, "guidance given to policy and reference in training, where it is an input of "
                                      "the network; 1 keeps what was distilled", above=0)
    cache_dir: str | None = option(None, "where hub downloads are kept", free=True)


@dataclass
class MemoryOptions:
    title = "precision, speed and memory"

    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "fp16", "compute dtype of the trained network, VAE and text encoders")
    allow_tf32: bool = option(False, "TF32 matrix products on NVIDIA GPUs")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass (SDXL: always)", free=True)
    selective_checkpointing: bool = option(False, "recompute what is cheap and keep the rest, instead of recomputing all",
                                           free=True)
    compile: bool = option(False, "torch.compile the repeated blocks: some minutes at the start, faster steps", free=True)
    channels_last: bool = option(False, "keep convolutions in channels-last memory", free=True)
    offload_reference: bool = option(False, "keep the reference on the host between its turns, for small GPUs", free=True)
    quantize_base: Literal["none", "int8", "nf4"] = option(
        "none", "LoRA's frozen base in 8 bits a weight (torchao), or in 4 (bitsandbytes, on a GPU)")


@dataclass
class DataOptions:
    title = "data"

    dataset_name: str | None = option(None, "preference pairs: a hub id, or as --train_data_dir")
    dataset_config_name: str | None = option(None, "configuration of the hub dataset")
    train_data_dir: str | None = option(None, "local pairs: a folder (parquet, saved by datasets, or images in w/ and "
                                        "l/), or a file (parquet, or a JSONL or CSV of paths)")
    split: str = option("train", "split of the dataset; only 'train' is shuffled")
    dataset_shards: int | None = option(None, "download only the split's first N parquet files of a hub dataset", at_least=1)
    image_column: str = option("image", "image column of a dataset without pairs", methods=("sft", "kto"))
    caption_column: str = option("caption", "caption column", default_text="caption, or else prompt or text")
    winner_column: str | None = option(None, "image column of the winners, where the layout is not a known one",
                                       needs="loser_column", methods=OFFLINE)
    loser_column: str | None = option(None, "image column of the losers", needs="winner_column", methods=OFFLINE)
    label_column: list[str] = option([], "column that decides: the first image's share of the votes; or two of scores; of "
                                     "single images whether each is liked", methods=OFFLINE)
    max_train_samples: int | None = option(None, "use a seeded shuffle's first N pairs (spo: prompts)", at_least=1)
    resolution: int | None = option(None, "training size in pixels", at_least=8,
                                    default_text="the base's own: SD1.5 512, SDXL 1024; flow matching 512 at most")
    random_crop: bool = option(False, "random instead of centre crops, drawn for each image", methods=OFFLINE)
    no_hflip: bool = option(False, "no horizontal flips", methods=OFFLINE)
    paired_hflip: bool = option(False, "flip winner and loser together instead of independently", methods=OFFLINE)
    proportion_empty_prompts: float = option(0.2, "share of prompts replaced by the empty one", at_least=0, at_most=1,
                                             methods=OFFLINE)
    choice_model: Literal["aes", "clip", "hps", "pickscore", "imagereward", "oracle"] | None = option(
        None, "relabel the pairs by this scorer; oracle: of drawn shapes", methods=OFFLINE)
    metrics_config: str | None = option(None, "model ids and paths of --choice_model (default configs/metrics.yaml)",
                                        free=True, needs="choice_model", methods=OFFLINE)
    dreamlike_pairs_only: bool = option(False, "only pairs whose two generators are Dreamlike models", methods=OFFLINE)
    dataloader_num_workers: int = option(0, "processes that decode images, a device; one a core at most", at_least=0,
                                         free=True, methods=OFFLINE)
    cached_dataset: str | None = option(None, "a folder made by data.cache with the same flags: its encoded images "
                                        "and prompts replace VAE and text encoders", free=True, methods=OFFLINE)
    noise_offset: float = option(0.0, "scale of a per-channel offset added to the noise", at_least=0, methods=OFFLINE)
    input_perturbation: float = option(0.0, "scale of extra noise on the model's input, shared by the pair", at_least=0,
                                       methods=OFFLINE)
    max_bad_fraction: float = option(0.01, "stop when clearly more than this share of the pairs cannot be used", at_least=0,
                                     at_most=1, free=True, methods=OFFLINE)

    @property
    def source(self) -> str | None:
        """Where the pairs come from; a local folder given beside a preset's dataset name wins."""
        return self.train_data_dir or self.dataset_name

    @property
    def is_local(self) -> bool:
        return self.source is not None and os.path.exists(self.source)


@dataclass
class ObjectiveOptions:
    title = "objective"

    train_method: Literal["diffusion-dpo", "dspo", "dmpo", "mapo", "poly-dpo", "linear-dpo", "ipo", "dpop", "kto", "sft",
                          "spo"] = option("diffusion-dpo", "the objective")
    sft: bool = option(False, "the same as --train_method sft")
    beta_dpo: float | None = option(None, "beta, strength of the implicit KL to the reference", above=0, methods=WITH_BETA,
                                    default_text="published: 5000; dmpo 2000, SDXL 6000; dspo 0.001, SDXL 5000; linear-dpo "
                                                 "100, SDXL 500; flow matching 100; dmpo 40, dspo 0.001, linear-dpo 2")
    dmpo_alpha: float | None = option(None, "DMPO's label smoothing", at_least=0, below=1, methods=("dmpo",),
                                      default_text="published: 0.01")
    mapo_weight: float = option(0.1, "MaPO's weight of the margin term", at_least=0, methods=("mapo",))
    mapo_scale: float = option(0.5, "MaPO's scale s of the errors", above=0, methods=("mapo",))
    mapo_timesteps: int = option(1000, "MaPO's T", at_least=1, methods=("mapo",))
    poly_alpha: float = option(8.0, "Poly-DPO's weight on undecided pairs; below -1 it would reverse pairs", at_least=-1,
                               methods=("poly-dpo",))
    linear_eta: float = option(1e-3, "Linear-DPO's lowest weight of a pair", at_least=0, at_most=0.5,
                               methods=("linear-dpo",))
    ipo_target: float = option(0.5, "the margin that IPO aims at", above=0, methods=("ipo",))
    dpop_penalty: float = option(1.0, "DPOP's k; none is published for diffusion, 1 to 10 is where to start", at_least=0,
                                 methods=("dpop",))
    kto_liked_weight: float = option(1.6, "KTO's weight of liked images; disliked ones weigh 2 - w", at_least=0, at_most=2,
                                     methods=("kto",))
    winner_error_weight: float = option(0.0, "adds this much of the winners' own error to an objective of pairs", at_least=0,
                                        methods=PAIRWISE)
    reference_ema: float | None = option(None, "the reference follows the policy as a float32 moving average of this decay; "
                                               "by default it is fixed", above=0, below=1, methods=WITH_BETA)
    use_winner_preserving: bool = option(False, "the SDPO safeguard: scale the loser's gradient by lambda", methods=PAIRWISE)
    winner_preserving_mu: float | None = option(
        None, "the safeguard's strength; larger is more conservative", at_least=0, at_most=1, methods=PAIRWISE,
        needs="use_winner_preserving", default_text="published: 0.9, SDXL 0.6; dspo 0.2, SDXL 0.6; flow matching 0.6")
    winner_preserving_granularity: Literal["batch", "sample"] = option(
        "batch", "one lambda per micro-batch, or per pair", methods=PAIRWISE, needs="use_winner_preserving",
        default_text="batch; flow matching sample")
    winner_preserving_space: Literal["output", "parameter"] = option(
        "output", "lambda from gradients of predictions (published), or of parameters (a second backward pass)",
        methods=PAIRWISE, needs="use_winner_preserving")
    fixed_lambda: float | None = option(None, "scale the loser's gradient by this number instead of the safeguard's lambda: "
                                        "a control for experiments", at_least=0, at_most=1, methods=PAIRWISE)

    @property
    def needs_reference(self) -> bool:
        return self.train_method not in REFERENCE_FREE

    @property
    def winners_only(self) -> bool:
        return self.train_method == "sft"

    @property
    def needs_pairs(self) -> str | None:
        """An option in use that means nothing for single images, if any."""
        if self.winners_only:
            return None
        return next((name for name in ("use_winner_preserving", "winner_error_weight", "fixed_lambda")
                     if getattr(self, name) not in (None, False, 0.0)), None)

    @property
    def safeguarded(self) -> bool:
        return self.use_winner_preserving and self.train_method in PAIRWISE

    @property
    def safeguards_parameters(self) -> bool:
        return self.safeguarded and self.winner_preserving_space == "parameter"


@dataclass
class OptimizerOptions:
    title = "optimisation"

    train_batch_size: int = option(1, "pairs a device in a micro-step", at_least=1)
    gradient_accumulation_steps: int = option(1, "micro-steps per optimizer step", at_least=1)
    max_train_steps: int = option(2000, "optimizer steps; 0 counts --num_train_epochs instead", at_least=0, free=True,
                                  default_text="2000; flow matching 1000")
    num_train_epochs: int = option(100, "passes over the data, where --max_train_steps is 0", at_least=0, free=True)
    learning_rate: float | None = option(
        None, "peak learning rate, before --scale_lr", above=0,
        default_text="published: 1e-8, SDXL 1e-9, with --scale_lr; without it 2e-5, SDXL 2e-6, LoRA 1e-4; "
                     "flow matching 1e-6, LoRA 1e-5, in all")
    scale_lr: bool = option(False, "multiply the learning rate by devices * batch * accumulation")
    lr_scheduler: str = option("constant_with_warmup",
                               "a schedule of diffusers.optimization, or warmup_then_decay: DeepSpeed's")
    lr_warmup_steps: int | None = option(None, "optimizer steps of linear warm-up", at_least=0,
                                         default_text="published: 500, and a quarter of a shorter run")
    optimizer: Literal["auto", "adamw", "adamw8bit", "adafactor", "sgd"] = option(
        "auto", "auto: AdamW; Adafactor for the whole of SDXL")
    use_adafactor: bool = option(False, "Adafactor, and no gradient clipping (as published)")
    use_8bit_adam: bool = option(False, "AdamW with 8-bit moments (needs bitsandbytes or torchao)")
    adam_beta1: float = option(0.9, "AdamW beta1", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW beta2", at_least=0, below=1)
    adam_weight_decay: float = option(1e-2, "weight decay, of Adafactor too", at_least=0)
    adam_epsilon: float = option(1e-8, "AdamW epsilon", above=0)
    max_grad_norm: float = option(1.0, "gradient norm clip", above=0)


@dataclass
class RunOptions:
    title = "the run and its output"

    output_dir: str = option("sd-model-finetuned", "checkpoints, logs and the trained pipeline", free=True)
    seed: int | None = option(None, "seed of everything random", at_least=0, default_text="drawn, and printed")
    max_nonfinite_steps: int = option(10, "stop after this many steps in a row without a finite loss and gradient",
                                      at_least=1, free=True)
    watch_winner_rise: float = option(0.1, "warn when the winners' error is above the reference's by this share", above=0,
                                      methods=PAIRWISE, free=True)
    watch_margin: float = option(10.0, "warn when the margins' root mean square passes this many logits", above=0,
                                 methods=PAIRWISE, free=True)
    process_timeout: float = option(1800.0, "seconds that a process waits for the others before the run ends", above=0,
                                    at_most=1e9, free=True)
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints; 0 keeps only the final one", at_least=0,
                                      free=True)
    checkpoints_total_limit: int | None = option(None, "keep this many checkpoints, the newest", at_least=1, free=True)
    resume_from_checkpoint: str | None = option("latest", "a checkpoint folder, 'latest' or 'none'", free=True)
    allow_changed_resume: bool = option(False, "resume although settings that matter have changed", free=True)
    hard_skip_resume: bool = option(False, "accepted: resuming never replays the data here", free=True)
    logging_dir: str = option("logs", "tracker files, inside output_dir", free=True)
    report_to: str = option("tensorboard", "tracker of accelerate: tensorboard, wandb, ..., all or none", free=True)
    tracker_project_name: str = option("tuning", "project name in the tracker", free=True)
    validation_prompts: list[str] = option([], "prompts drawn by policy and reference from the same noise, or files of them "
                                               "(.txt, .json)", free=True)
    validation_steps: int = option(500, "optimizer steps between validations", at_least=1, free=True)
    validation_guidance: float = option(7.5, "guidance scale of the validation images, in diffusers' sense", above=0,
                                        needs="validation_prompts", free=True,
                                        default_text="7.5; flow matching the base's own")
    validation_inference_steps: int = option(30, "Euler steps of the validation images", at_least=1,
                                             needs="validation_prompts", free=True,
                                             default_text="30; flow matching the base's own")
    push_to_hub: bool = option(False, "upload the trained pipeline, with a model card", free=True)
    hub_model_id: str | None = option(None, "repository to push to (default: the name of output_dir)", needs="push_to_hub",
                                      free=True)
    dry_run: bool = option(False, "take two steps, report memory, time and disk of the whole run, and leave nothing",
                           free=True)
    local_rank: int = option(-1, "accepted and ignored: accelerate knows the rank", free=True)


@dataclass
class TrainOptions:
    """The options of a run by group, and the names of those that were given. more: groups of a program that has others."""

    model: ModelOptions
    memory: MemoryOptions
    data: DataOptions
    objective: ObjectiveOptions
    optimizer: OptimizerOptions
    run: RunOptions
    given: set[str] = field(default_factory=set)
    more: list[Any] = field(default_factory=list)

    def groups(self) -> list[Any]:
        return [self.model, self.memory, self.data, self.objective, self.optimizer, self.run, *self.more]

    def flat(self) -> dict[str, Any]:
        """Every option by name."""
        return {f.name: getattr(group, f.name) for group in self.groups() for f in fields(group)}

    def origin(self, name: str) -> str:
        """" (default)" behind a value that was not given."""
        return "" if name in self.given else " (default)"

    def settings(self) -> dict[str, Any]:
        """The options that identify a run: those that a resumed one may not change."""
        return {f.name: getattr(group, f.name) for group in self.groups() for f in fields(group) if not declaration(f).free}


GROUPS = [ModelOptions, MemoryOptions, DataOptions, ObjectiveOptions, OptimizerOptions, RunOptions]
