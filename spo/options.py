"""SPO's own options, beside train.py's, and what contradicts them."""

from dataclasses import dataclass

from common.errors import UserError, warn
from common.options import option
from common.train_options import TrainOptions

SPO = ("spo",)


@dataclass
class SPOOptions:
    title = "spo"

    spo_prompts: str | None = option(None, "SPO: prompts to train on: .txt (one a line) or .json; without it, the "
                                           "distinct captions of --dataset_name (the first --max_train_samples)",
                                     methods=SPO)
    spo_sample_batch_size: int = option(10, "SPO: prompts a device samples at once", at_least=1, methods=SPO)
    spo_num_steps: int = option(20, "SPO: denoising steps", at_least=1, at_most=1000, methods=SPO)
    spo_eta: float | None = option(None, "SPO: the noise of a step, without which a pool's members are all equal: DDIM's "
                                   "eta, or a of flow matching's SDE", above=0, at_most=1,
                                   default_text="1; flow matching 0.7", methods=SPO)
    spo_guidance: float = option(5.0, "SPO: guidance scale of sampling and of training", above=0, methods=SPO)
    spo_divert_start_step: int = option(4, "SPO: first step that draws a pool of candidates", at_least=0, methods=SPO)
    spo_k: int = option(4, "SPO: candidates in a pool", at_least=2, methods=SPO)
    spo_num_inner_step: int = option(0, "SPO: steps that each candidate walks on its own before the comparison", at_least=0,
                                     methods=SPO)
    spo_threshold: float = option(0.3, "SPO: keep a pair when P(best) - P(worst) exceeds this", at_least=0, below=1,
                                  methods=SPO)
    spo_clip: float = option(0.1, "SPO: clip the ratios policy/reference to 1 +- this", above=0, below=1, methods=SPO)
    spo_beta: float = option(10.0, "SPO: beta of the loss", above=0, methods=SPO)
    spm_checkpoint: str | None = option(None, "SPO: step-aware preference model: a .bin, or ORG/REPO/FILE on the hub",
                                        methods=SPO)
    spm_clip: str = option("yuvalkirstain/PickScore_v1", "SPO: the CLIP that --spm_checkpoint conditions on the timestep",
                           methods=SPO)
    spm_tokenizer: str = option("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "SPO: that CLIP's tokenizer", methods=SPO)


def check_spo_options(options: TrainOptions) -> None:
    """Refuse what contradicts, before anything is loaded; options.more[0] is the SPOOptions. Raises UserError."""
    if options.objective.train_method != "spo":
        return
    spo, optimizer = options.more[0], options.optimizer
    if spo.spo_prompts is None and options.data.source is None:
        raise UserError("SPO needs prompts: --spo_prompts FILE (.txt or .json), or --dataset_name for its captions")
    if spo.spo_divert_start_step >= spo.spo_num_steps:
        raise UserError(f"--spo_divert_start_step {spo.spo_divert_start_step} is outside the {spo.spo_num_steps} denoising "
                        f"steps: choose one of 0..{spo.spo_num_steps - 1}, or more --spo_num_steps")
    if optimizer.max_train_steps == 0 and optimizer.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise UserError(f"--lr_scheduler {optimizer.lr_scheduler} needs --max_train_steps: how many steps SPO's epochs have "
                        "depends on the pairs that are kept")
    if spo.spm_checkpoint is None:
        warn("no --spm_checkpoint: --spm_clip itself judges the noisy steps, as if they were finished images")
