"""The evaluation programs' options, and their checks. Imports no torch."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.files import MODEL_FILES
from common.options import option
from eval.manifest import is_text
from eval.metrics import METRICS, PUBLISHED, canonical_name, read_config
from prompts import group_path

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"  # as published:
# the two bases that the published programs evaluate, so that their commands need no base named


MOST_PROMPTS = 2**32  # of a group, where each has a seed of its own


@dataclass
class GenerateOptions:
    title = "generation"

    unet_path: str = option(MISSING, "unet.pth, .safetensors, a diffusers folder, a hub id, LoRA weights, or 'base' for the "
                                     "base model")
    pretrained_model_name_or_path: str | None = option(None, "the base pipeline", default_text=f"{SD15}, with --sdxl {SDXL}")
    sdxl: bool = option(False, "the base is SDXL: take its published one, refuse any other")
    pretrained_vae_model_name_or_path: str | None = option(
        None, "another VAE, or 'base' for the pipeline's own",
        default_text="the pipeline's own, for SDXL madebyollin/sdxl-vae-fp16-fix")
    prompts: list[str] = option(["papv2", "hpsv2", "partiprompts"], "prompt groups: names of prompts/NAME.json, or files",
                                default_text="papv2 hpsv2 partiprompts")
    output_dir: str | None = option(None, "where the images go",
                                    default_text="the folder of unet_path; for base or a hub id output/NAME")
    seed: int = option(0, "every prompt starts from this seed; its image k from seed + k", at_least=0)
    seed_per_prompt: bool = option(False, "image k of prompt i starts from seed + i * num_images_per_prompt + k instead, for "
                                          "galleries: the published evaluation has one noise for all prompts")
    num_images_per_prompt: int = option(1, "images of each prompt", at_least=1)
    limit: int | None = option(None, "only the first prompts of each group", at_least=1)
    height: int | None = option(None, "in pixels", at_least=8, default_text="the base's own: SD1.5 512, SDXL 1024")
    width: int | None = option(None, "in pixels", at_least=8, default_text="the base's own: SD1.5 512, SDXL 1024")
    max_sequence_length: int | None = option(None, "tokens of a prompt that a flow-matching base reads", at_least=16,
                                             default_text="SD3 256, others 512; SD1.5 and SDXL read 77, always")
    num_inference_steps: int | None = option(None, "denoising steps", at_least=1, at_most=1000,
                                             default_text="as published for the base: SD1.5 and SDXL 50")
    cfg: float | None = option(None, "guidance, in the sense of --cfg_convention",
                               default_text="as published for the base: SD1.5 and SDXL 7.5")
    cfg_convention: Literal["official", "diffusers"] | None = option(
        None, "official: e_cond + cfg (e_cond - e_uncond), as published; diffusers: as the base's own pipeline has it, mostly "
        "e_uncond + cfg (e_cond - e_uncond)", default_text="official; flow matching diffusers")
    empty_prompt: Literal["encoded", "pipeline"] = option(
        "encoded", "guidance's other half: the encoded \"\" as published; pipeline: as the base's model_index.json says "
        "(SDXL: zeros)")
    scheduler: Literal["euler", "default"] | None = option(None, "euler as published; default: the pipeline's own",
                                                           default_text="euler; flow matching default")
    mixed_precision: Literal["bf16", "fp16", "no"] | None = option(
        None, "type of network and text encoders", default_text="bf16 on a GPU, no (float32) on the CPU")
    latents_dtype: Literal["float32", "unet"] = option(
        "float32", "type of the latents through all steps; unet: the network's, as the official program")
    vae_dtype: Literal["float32", "unet"] = option(
        "float32", "type of the VAE; float32 as published, unet: the network's, faster and less faithful")
    vae_tiling: bool = option(False, "decode in tiles, for small GPUs; seams differ slightly")
    compile: bool = option(False, "torch.compile the network: minutes at the start, then faster")
    batch_size: int | None = option(None, "images sampled together", at_least=1, default_text="8, SDXL 4")
    overwrite: bool = option(False, "throw away what the folder holds and start over")
    no_zip: bool = option(False, "leave no STEM.zip")
    manifest_list: str | None = option(None, "write the manifests' paths here, one a line")


def check_generate_options(options: GenerateOptions) -> None:
    """Refuse what cannot work before anything loads, the defaults still being None. Raises UserError."""
    stems = [group_path(name).stem for name in options.prompts]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"--prompts names two groups {stem}, whose images would share a folder: rename one, or "
                            "generate them one at a time with an --output_dir each")
    for name in ("height", "width"):
        side = getattr(options, name)
        if side is not None and side % 8:
            raise UserError(f"--{name} must be a multiple of 8 (the VAE's downsampling), not {side}")
    if options.seed + options.num_images_per_prompt * (MOST_PROMPTS if options.seed_per_prompt else 1) > 2**63:
        raise UserError("--seed: the last image's seed must not be above 2**63 - 1")
    unet = Path(options.unet_path)
    if (unet.suffix in MODEL_FILES or options.unet_path.startswith((".", "/", "~"))) and not unet.exists():
        raise UserError(f"no weights at {unet}: give a unet.pth, a .safetensors file, a diffusers folder or a hub id")


@dataclass
class ScoringOptions:
    """How images are scored; shared by eval.score, eval.compare and eval.leaderboard."""

    title = "scoring"

    metrics: list[str] = option(list(PUBLISHED), f"which metrics, of {', '.join(METRICS)}",
                                default_text=" ".join(PUBLISHED))
    metrics_config: str | None = option(None, "where the models come from", default_text="configs/metrics.yaml")
    device: str | None = option(None, "cuda or cpu", default_text="cuda where there is one")
    batch_size: int = option(64, "images a model looks at together", at_least=1)
    num_workers: int = option(8, "threads that read images", at_least=1)
    skip_missing: bool = option(False, "leave missing or unreadable images out, with a count")

    def __post_init__(self):
        read_config(self.metrics_config)  # which names the metrics of one's own
        self.metrics = list(dict.fromkeys(canonical_name(name) for name in self.metrics))


ALLOW_DIFFERENT = "compare images whose seed, steps, guidance, size, scheduler, types or base differ; the page says so"


@dataclass
class ScoreOptions:
    title = "what is scored"

    manifests: list[str] = option(MISSING, "generation manifests (JSON)")
    log_file: str | None = option(None, "write the results here too (joint_test_512.log)")


@dataclass
class CompareOptions:
    title = "what is compared"

    json_a: str = option(MISSING, "generation manifest of model A")
    json_b: str = option(MISSING, "generation manifest of model B")
    label_a: str = option("A", "name of model A")
    label_b: str = option("B", "name of model B")
    outdir: str = option("output/vs_eval", "where the comparison's folder is made")
    pair_by: Literal["prompt", "index"] = option(
        "prompt", "prompt: same prompts, repeated ones in order; index: same position in the manifests")
    ties_policy: Literal["half", "exclude"] = option("half", "a tie counts one half, or is left out of the win rate")
    votes: list[str] | None = option(None, "votes.json of eval.judge's pages, of one judge or several: a Human row")
    allow_different_settings: bool = option(False, ALLOW_DIFFERENT)
    no_report: bool = option(False, "write no report.html")


def check_compare_options(options: CompareOptions) -> None:
    labels = options.label_a, options.label_b
    if not all(labels) or labels[0] == labels[1] or "tie" in labels:
        raise UserError("--label_a and --label_b must be two different names, neither of them 'tie'")
    if not all(map(is_text, labels)):
        raise UserError("--label_a and --label_b must be UTF-8 text")
