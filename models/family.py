"""What a model family must bring, and which family a base pipeline is.

A family is one file of models/ with one class: everything that depends on the architecture of the trained network and on
nothing else. Training, caching, validation, generation, SPO and its preference model know a family by this interface
alone. To add one: write the class, add its line to FAMILIES, give it a preset and scripts: docs/models.md walks through it.
"""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from common.errors import UserError, first_line
from common.train_options import ModelOptions

if TYPE_CHECKING:  # torch costs seconds, and a wrong path should be refused before them
    import numpy as np
    import torch
    from torch import Tensor, nn

Text = dict[str, "Tensor"]  # rows first: embeddings (B, L, D), pooled (B, P), mask (B, L); what a cache keeps


class Family(Protocol):
    """One base model, opened: its small files are read, its encoders once load_encoders was called.

    N samples stand for B pairs with winners first (N = 2B; for sft N = B). Latents are (N, C, h, w) float32 everywhere
    outside of a family; packing, ids, signs and further axes stay inside.
    """

    name: str  # "sd15", "sdxl", ...; defaults are looked up by it
    flow: bool  # flow matching: the network predicts velocities, which have recipes of their own
    label: str  # as people call it
    license: str  # of the base's weights, for a model card
    backbone: str  # "unet" or "transformer": the pipeline's folder of the trained network
    network: type  # the class of the trained network
    weights_file: str  # what a whole trained network is called in a checkpoint
    pipeline: type  # the diffusers pipeline that a result opens with
    lora_targets: list[str]
    compiled_blocks: tuple[type, ...]  # repeated blocks, compiled and sharded one by one
    resolution: int  # pixels that the base was made for
    training_resolution: int  # the published training's, unless --resolution says otherwise
    images_at_once: int  # that eval.generate samples together
    evaluation_vae: str | None  # hub id of the VAE that the published evaluation decodes with, where not the base's own
    always_checkpoints: bool  # the published runs recompute activations whatever is asked
    empty_prompt: str  # what the pipeline's unconditional prediction reads
    empty_is_zeros: bool  # whether the base's own pipeline takes zeros for the empty prompt instead of encoding it
    embeds_guidance: bool  # guidance is an input of the network: predict() takes it, and no second prediction is made
    steps: int  # of the pipeline's sampler, as published; guidance: its scale in the pipeline's own convention
    guidance: float
    overflows_in_fp16: bool
    ignored_options: tuple[str, ...]  # options of the model that mean nothing for this family
    eta: float  # how much noise transition() adds unless --spo_eta says otherwise
    sequence_length: int | None  # tokens of the text that --max_sequence_length sets; None where they are fixed
    options: ModelOptions
    index: dict  # the base's model_index.json
    vae: "nn.Module | None"
    text_encoders: "list[nn.Module]"

    def load_encoders(self, dtype: "torch.dtype", device: "torch.device", vae_dtype: "torch.dtype | None" = None) -> None:
        """VAE (in vae_dtype, where that differs) and text encoders, frozen, on the device. Raises UserError."""

    def load_vae(self, asked: "torch.dtype", device: "torch.device") -> None:
        """The VAE alone, in the type that vae_dtype gives. Raises UserError."""

    def vae_dtype(self, asked: "torch.dtype") -> "torch.dtype":
        """The type that the VAE is loaded in where `asked` is asked for: some overflow in fp16."""

    def encoder_sources(self) -> dict[str, tuple[str, str | None, str | None, str | None]]:
        """(name, subfolder, revision, cache_dir) of each part that a cache's content depends on."""

    def drop_encoders(self) -> None:
        """Give their memory back."""

    def check_network(self, network: "nn.Module", source: str) -> None:
        """Raise UserError where a trained network is not one of this family."""

    def without_gradient(self, network: "nn.Module") -> list[str]:
        """Names of modules that no prediction depends on; they stay frozen."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents. Raises UserError for a size that the family cannot take."""

    def tokenize(self, captions: list[str]) -> Text:
        """Token ids, on the host: done in the data workers."""

    longer_text: str  # what to do about captions that are cut

    def tokens_read(self, captions: list[str]) -> "tuple[np.ndarray, np.ndarray]":
        """Each caption's tokens, and how many of them the text encoder reads: (B,) each."""

    def encode_text(self, tokens: Text) -> Text:
        """What the network reads of B prompts; the prompt's rows first."""

    def encode_images(self, pixels: "Tensor") -> "Tensor":
        """The VAE's moments (N, 2C, h, w) of images (N, 3, H, W) in [-1, 1], contiguous, in its dtype."""

    def latents(self, moments: "Tensor", noise: "Tensor") -> "Tensor":
        """Latents (N, C, h, w) float32, sampled from the moments with normal noise (N, C, h, w), scaled."""

    def decode(self, latents: "Tensor") -> "Tensor":
        """Pixels (N, 3, H, W) float32, in [-1, 1] and beyond. Not to be called under autocast."""

    def times(self, uniform: "Tensor") -> "Tensor":
        """Uniforms (B,) in [0, 1) to the family's own times (B,)."""

    def noise(self, latents: "Tensor", noise: "Tensor", times: "Tensor",
              input_noise: "Tensor | None" = None) -> "tuple[Tensor, Tensor]":
        """(x_t, target), each (N, C, h, w) float32. input_noise replaces the noise in x_t alone."""

    def predict(self, network: "nn.Module", x_t: "Tensor", times: "Tensor", text: Text, size: tuple[int, int]) -> "Tensor":
        """The network's prediction (N, C, h, w); size: the images' (height, width) in pixels. A family that embeds guidance
        takes it as a last argument; without it, --embedded_guidance."""

    def guide(self, unconditional: "Tensor", conditional: "Tensor", scale: float, official: bool) -> "Tensor":
        """Classifier-free guidance. scale: in the family's own pipeline's convention; official: in that of the official
        evaluation, conditional + scale (conditional - unconditional)."""

    def sampler(self, kind: str, steps: int, device: "torch.device", size: tuple[int, int] | None = None) -> Any:
        """A diffusers scheduler with its timesteps set; kind "default" is the pipeline's own. size: of the images in
        pixels, where the steps depend on it; None: the base's own."""

    def walk(self, steps: int, size: tuple[int, int]) -> "tuple[Tensor, Tensor]":
        """For SPO: the times of as many denoising steps, the noisiest first, and the times that they lead to, (steps,) each,
        on the host. Raises UserError for steps that cannot all be random."""

    def transition(self, prediction: "Tensor", x_t: "Tensor", times: "Tensor", next_times: "Tensor",
                   eta: float) -> "tuple[Tensor, Tensor, Tensor]":
        """A random denoising step's mean (N, C, h, w), its standard deviation (N, 1, 1, 1), and the clean latents that the
        (guided) prediction amounts to, in float32; times and next_times: (N,)."""

    def clean(self, prediction: "Tensor", x_t: "Tensor", times: "Tensor") -> "Tensor":
        """The last of these alone."""


class Known(NamedTuple):
    module: str
    name: str  # of the class


FAMILIES = {  # by the pipeline class that a base's model_index.json names
    "StableDiffusionPipeline": Known("models.stable_diffusion", "StableDiffusion15"),
    "StableDiffusionXLPipeline": Known("models.stable_diffusion", "StableDiffusionXL"),
    "StableDiffusionXLImg2ImgPipeline": Known("models.stable_diffusion", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": Known("models.sd3", "StableDiffusion3"),
    "FluxPipeline": Known("models.flux", "Flux"),
    "QwenImagePipeline": Known("models.qwen_image", "QwenImage"),
    "ZImagePipeline": Known("models.z_image", "ZImage"),
}


def read_model_index(base: str, revision: str | None = None, cache_dir: str | None = None) -> dict:
    """A pipeline's model_index.json, of a folder or from the hub. Raises UserError; imports neither torch nor diffusers."""
    if Path(base).exists():
        path = Path(base, "model_index.json")
        if not path.is_file():
            raise UserError(f"{base} is no diffusers pipeline: it has no model_index.json; name the folder that has one, or "
                            "a .safetensors file of SD1.5 or SDXL")
    elif base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise UserError(f"no base model at {base}: no such folder here, and no hub id (ORG/NAME) either")
    else:
        path = _from_hub(base, revision, cache_dir)
    try:
        index = json.loads(Path(path).read_text(encoding="utf-8"))
        index["_class_name"]
        return index
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the model_index.json of {base} is damaged ({first_line(error)}): download it again") from None


def _from_hub(base: str, revision: str | None, cache_dir: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(base, "model_index.json", revision=revision, cache_dir=cache_dir)
    except GatedRepoError:
        raise UserError(f"the hub gives {base} only to those who accepted its terms: accept them at "
                        f"https://huggingface.co/{base}, then `hf auth login`") from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"no base model {base}: no such folder here, and the hub gave no such model or cannot be reached "
                        f"({first_line(error, 160)})") from None


def unpacked(options: ModelOptions) -> ModelOptions:
    """The same options, naming a diffusers folder where they name a single checkpoint file. Raises UserError."""
    path = Path(options.pretrained_model_name_or_path)
    if not path.is_file():
        return options
    from models.single_file import as_folder
    return replace(options, pretrained_model_name_or_path=str(as_folder(path, options.cache_dir)))


def find_family(options: ModelOptions) -> tuple[type, dict]:
    """The family's class of --pretrained_model_name_or_path, and the base's model_index.json. Raises UserError for a path
    that does not exist, a pipeline of an unknown family, and --sdxl beside another family."""
    base = options.pretrained_model_name_or_path
    index = read_model_index(base, options.revision, options.cache_dir)
    known = FAMILIES.get(index["_class_name"])
    if known is None:
        raise UserError(f"{base} is a {index['_class_name']}, which is no known family: {', '.join(sorted(FAMILIES))}")
    kind = getattr(importlib.import_module(known.module), known.name)
    if options.sdxl and kind.name != "sdxl":
        raise UserError(f"--sdxl, but {base} is {kind.label}: leave --sdxl out")
    return kind, index


def open_family(options: ModelOptions) -> Family:
    """The family of --pretrained_model_name_or_path with its small files read. Raises UserError."""
    options = unpacked(options)
    kind, index = find_family(options)
    return kind(options, index)
