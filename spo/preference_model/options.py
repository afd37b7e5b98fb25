"""The options of `python -m spo.preference_model.train`: those of train.py's that mean something here, and its own."""

from dataclasses import dataclass
from typing import Literal

from common.options import flag_names, option, parse
from common.train_checks import check_data_options, check_run_options
from common.train_options import (DataOptions, MemoryOptions, ModelOptions, ObjectiveOptions, OptimizerOptions, RunOptions,
                                  TrainOptions)

PICKAPIC_VALIDATION = "validation_unique"  # Pick-a-Pic's name of that split


@dataclass
class SPMMemoryOptions(MemoryOptions):
    mixed_precision: Literal["no", "fp16", "bf16"] = option("bf16", "compute dtype of all models")
    gradient_checkpointing: bool = option(False, "recompute the vision tower's activations in the backward pass", free=True)


@dataclass
class SPMOptimizerOptions(OptimizerOptions):
    train_batch_size: int = option(16, "pairs a device in a micro-step", at_least=1)
    max_train_steps: int = option(8000, "optimizer steps", at_least=1, free=True)
    learning_rate: float = option(3e-6, "peak learning rate", above=0)
    lr_scheduler: str = option("warmup_then_decay", "fixed: that of the official program")
    lr_warmup_steps: int = option(500, "steps of logarithmic warm-up; then linear decay to 0", at_least=0)
    optimizer: Literal["adamw"] = option("adamw", "fixed")
    adam_weight_decay: float = option(0.3, "AdamW's weight decay", at_least=0)


@dataclass
class SPMRunOptions(RunOptions):
    output_dir: str = option("step-aware-preference-model", "checkpoints, logs, weights and accuracies", free=True)
    validation_steps: int = option(1000, "optimizer steps between validations", at_least=1, free=True)
    tracker_project_name: str = option("spm", "project name in the tracker", free=True)


@dataclass
class SPMOptions:
    title = "the preference model"

    spm_clip: str = option("yuvalkirstain/PickScore_v1", "the CLIP to condition on the timestep")
    spm_tokenizer: str = option("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "that CLIP's tokenizer")
    validation_split: str = option(PICKAPIC_VALIDATION, "split whose accuracy is reported; 'none' for none; local data "
                                   "without Pick-a-Pic's holds pairs of its training split out instead")
    relabel_threshold: float = option(0.0, "above 0: label the pairs by --spm_clip itself, as ties where the two "
                                      "probabilities differ by less", at_least=0, below=1)
    guidance: float = option(5.0, "guidance scale of the base model", above=0)


SPM_GROUPS = [ModelOptions, SPMMemoryOptions, DataOptions, ObjectiveOptions, SPMOptimizerOptions, SPMRunOptions]
NAMES = {  # of train.py's options, those that are read here
    "pretrained_model_name_or_path", "revision", "pretrained_vae_model_name_or_path", "sdxl", "cache_dir",
    "max_sequence_length", "timestep_sampling", "logit_mean", "logit_std", "timestep_shift",
    "mixed_precision", "allow_tf32", "gradient_checkpointing",
    "dataset_name", "dataset_config_name", "train_data_dir", "split", "dataset_shards", "caption_column", "winner_column",
    "loser_column", "label_column", "resolution",
    "dataloader_num_workers", "max_bad_fraction",
    "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate", "lr_warmup_steps",
    "adam_weight_decay", "max_grad_norm",
    "output_dir", "seed", "max_nonfinite_steps", "process_timeout", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "allow_changed_resume", "logging_dir", "report_to", "tracker_project_name", "validation_steps"}


def parse_spm_options(argv: list[str] | None = None, description: str | None = None) -> TrainOptions:
    """Command line and --config FILE.yaml (the command line wins) -> checked options; options.more[0] is the SPMOptions.
    Raises UserError."""
    (*groups, own), given = parse([*SPM_GROUPS, SPMOptions], argv, program="python -m spo.preference_model.train",
                                  description=description, configurable=True, only=NAMES | flag_names(SPMOptions))
    options = TrainOptions(*groups, given, [own])
    options.objective.train_method = "spm"
    check_run_options(options)
    check_data_options(options.data, options.objective)
    return options
