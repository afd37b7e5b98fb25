"""SPO's own options, beside train.py's, and their checks."""

import math
from dataclasses import dataclass, fields

import numpy as np

from prompts import read_group
from common.train_options import TrainArguments, default_of, option
from common.errors import UserError, warn
from data.pairs import column_values, load_table
from spo.resampler import ResamplerConfig

# Options of train.py that mean nothing here: no pairs are loaded, the objective has its own beta and clip, no images
# are noised whose error could be watched, and the empty prompt is guidance's other half.
IGNORED = ("beta_dpo", "dmpo_alpha", "use_winner_preserving", "winner_preserving_mu", "image_column", "random_crop",
           "no_hflip", "paired_hflip", "choice_model", "dreamlike_pairs_only", "dataloader_num_workers", "noise_offset",
           "input_perturbation", "cached_dataset", "metrics_config", "proportion_empty_prompts", "max_bad_fraction",
           "watch_winner_rise", "watch_margin")


@dataclass
class SPOArguments:
    spo_prompts: str | None = option(None, "SPO: prompts to train on: .txt (one a line) or .json; without it, the "
                                           "distinct captions of --dataset_name (the first --max_train_samples)")
    spo_sample_batch_size: int = option(10, "SPO: prompts a device samples at once")
    spo_num_steps: int = option(20, "SPO: DDIM steps")
    spo_eta: float = option(1.0, "SPO: DDIM's eta, in (0, 1]: the noise of a step")
    spo_guidance: float = option(5.0, "SPO: guidance scale of sampling and of training")
    spo_divert_start_step: int = option(4, "SPO: first step that draws a pool of candidates")
    spo_k: int = option(4, "SPO: candidates in a pool")
    spo_num_inner_step: int = option(0, "SPO: steps that each candidate walks on its own before the comparison")
    spo_threshold: float = option(0.3, "SPO: keep a pair when P(best) - P(worst) exceeds this")
    spo_clip: float = option(0.1, "SPO: clip the ratios policy/reference to 1 +- this")
    spo_beta: float = option(10.0, "SPO: beta of the loss")
    spm_checkpoint: str | None = option(None, "SPO: step-aware preference model: a .bin, or ORG/REPO/FILE on the hub")
    spm_clip: str = option("yuvalkirstain/PickScore_v1", "SPO: the CLIP that --spm_checkpoint conditions on the timestep")
    spm_tokenizer: str = option("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "SPO: that CLIP's tokenizer")


def resampler_config(spo: SPOArguments) -> ResamplerConfig:
    return ResamplerConfig(spo.spo_num_steps, spo.spo_eta, spo.spo_divert_start_step, spo.spo_k,
                           spo.spo_num_inner_step, spo.spo_threshold)


def check_spo_arguments(args: TrainArguments, spo: SPOArguments) -> None:
    """Refuse bad values and warn of options that SPO ignores, before anything is loaded. Raises UserError."""
    if spo.spo_prompts is None and args.data_source is None:
        raise UserError("SPO needs prompts: --spo_prompts FILE (.txt or .json), or --dataset_name for its captions")
    if spo.spo_k < 2:
        raise UserError(f"--spo_k must be at least 2, not {spo.spo_k}: a pool needs a winner and a loser")
    if spo.spo_num_steps < 1 or spo.spo_num_steps > 1000:
        raise UserError(f"--spo_num_steps must lie in 1..1000, not {spo.spo_num_steps}")
    if not 0 <= spo.spo_divert_start_step < spo.spo_num_steps:
        raise UserError(f"--spo_divert_start_step {spo.spo_divert_start_step} is outside the {spo.spo_num_steps} denoising "
                        f"steps: choose one of 0..{spo.spo_num_steps - 1}, or more --spo_num_steps")
    if spo.spo_num_inner_step < 0:
        raise UserError(f"--spo_num_inner_step must not be negative, but is {spo.spo_num_inner_step}")
    if spo.spo_sample_batch_size < 1:
        raise UserError(f"--spo_sample_batch_size must be at least 1, not {spo.spo_sample_batch_size}")
    if not 0 < spo.spo_eta <= 1:
        raise UserError(f"--spo_eta must lie in (0, 1], not {spo.spo_eta}: without noise a pool's members are all equal")
    if not 0 <= spo.spo_threshold < 1:
        raise UserError(f"--spo_threshold must lie in [0, 1), not {spo.spo_threshold}: it bounds a difference of two "
                        "probabilities")
    if not 0 < spo.spo_clip < 1:
        raise UserError(f"--spo_clip must lie in (0, 1), not {spo.spo_clip}")
    for name in ("spo_beta", "spo_guidance"):
        if not (math.isfinite(getattr(spo, name)) and getattr(spo, name) > 0):
            raise UserError(f"--{name} must be a finite number above 0, not {getattr(spo, name)}")
    if args.max_train_steps == 0 and args.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise UserError(f"--lr_scheduler {args.lr_scheduler} needs --max_train_steps: how many steps SPO's epochs have "
                        "depends on the pairs that are kept")
    for name in IGNORED:
        if getattr(args, name) != default_of(name):
            warn(f"--{name} does nothing here: SPO samples its own pairs")
    if spo.spm_checkpoint is None:
        warn("no --spm_checkpoint: --spm_clip itself judges the noisy steps, as if they were finished images")


def warn_of_spo_flags(given: set[str]) -> None:
    """For runs of another method: warn of SPO's options among the names of those that were given."""
    for name in sorted(given & {field.name for field in fields(SPOArguments)}):
        warn(f"--{name} does nothing here: only --train_method spo reads it")


def load_prompts(args: TrainArguments, spo: SPOArguments, seed: int) -> list[str]:
    """The prompts to train on, in file order. Raises UserError for a file that cannot be read or holds none."""
    if spo.spo_prompts is None:
        table = load_table(args)
        if args.caption_column not in table.column_names:
            raise UserError(f"the dataset has no column '{args.caption_column}' to take prompts from; it has "
                            f"{', '.join(table.column_names)}")
        prompts = list(dict.fromkeys(text for text in column_values(table, args.caption_column) if text))
    else:
        prompts = read_group(spo.spo_prompts)
    if not prompts:
        raise UserError(f"{spo.spo_prompts or args.data_source} holds no prompts")
    if args.max_train_samples is not None and args.max_train_samples < len(prompts):
        chosen = np.random.default_rng([seed, 2]).permutation(len(prompts))[:args.max_train_samples]
        prompts = [prompts[i] for i in sorted(chosen)]
    return prompts
