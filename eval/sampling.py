"""Sampling images from a diffusers pipeline (SD1.5 or SDXL), many prompts at a time.

An image depends on its seed, its prompt and the settings alone: its noise comes from a generator of its own, seeded
anew for every image, so neither the batch it is in nor the device's number matters.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from PIL import Image

from common.errors import UserError
from models.weights import from_hub, load_unet


@dataclass(frozen=True)
class SamplingSettings:
    """Everything besides seed, prompt and weights that an image depends on."""

    height: int
    width: int
    num_inference_steps: int
    cfg: float
    cfg_convention: str  # "official": e_cond + cfg (e_cond - e_uncond); "diffusers": e_uncond + cfg (e_cond - e_uncond)
    scheduler: str  # "euler", or "default" for the pipeline's own
    latents_dtype: torch.dtype  # of the latents through all steps; the noise is drawn in the UNet's
    empty_prompt: str = "encoded"  # the unconditional embedding: "encoded" "", or "pipeline": zeros where the base says so

    @property
    def guidance_scale(self) -> float:
        """s of the usual convention e_uncond + s (e_cond - e_uncond)."""
        return self.cfg + 1 if self.cfg_convention == "official" else self.cfg


def is_sdxl(unet_config: dict) -> bool:
    return unet_config.get("addition_embed_type") == "text_time"


def base_unet_config(base: str) -> dict:
    """The UNet config of the pipeline `base`, without its weights. Raises UserError when there is no such pipeline."""
    try:
        return UNet2DConditionModel.load_config(base, subfolder="unet")
    except (OSError, ValueError) as error:
        raise UserError(f"no diffusers pipeline at {base}: it has no unet/config.json here, and the hub gave none "
                        f"({' '.join(str(error).split())[:120]})") from None


def load_pipeline(base: str, unet_path: str, vae: str | None, unet_dtype: torch.dtype, device: torch.device,
                  scheduler: str) -> DiffusionPipeline:
    """The pipeline `base` with the UNet that `unet_path` names (see models.weights.load_unet) and, if given, another
    VAE (a folder, with or without vae/, or a hub id). UNet and text encoders in `unet_dtype`, the VAE in float32.

    Raises UserError when something cannot be loaded or the UNet is one of another base model.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    unet = load_unet(base, unet_path).to(unet_dtype)
    vae_folder = "vae" if vae is None or (Path(vae) / "vae").is_dir() else None
    parts = {"unet": unet, "vae": from_hub(AutoencoderKL, vae or base, "the VAE", subfolder=vae_folder),
             "dtype": unet_dtype}  # for what is loaded besides: unet and vae stay as they are
    if is_sdxl(unet.config):
        pipeline = from_hub(StableDiffusionXLPipeline, base, "the SDXL pipeline", add_watermarker=False, **parts)
    else:
        pipeline = from_hub(StableDiffusionPipeline, base, "the SD1.5 pipeline", safety_checker=None,
                            feature_extractor=None, requires_safety_checker=False, **parts)
    if scheduler == "euler":
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    return pipeline.to(device)


class Sampler:
    """Samples batches of images from a pipeline under fixed settings."""

    def __init__(self, pipeline: DiffusionPipeline, settings: SamplingSettings):
        self.pipeline, self.settings = pipeline, settings
        self.device, self.sdxl = pipeline.unet.device, is_sdxl(pipeline.unet.config)
        self.unconditional = self._encode([""])  # as the Diffusion-SDPO evaluation has it, also for SDXL
        if settings.empty_prompt == "pipeline" and pipeline.config.get("force_zeros_for_empty_prompt"):
            self.unconditional = tuple(torch.zeros_like(embedding) for embedding in self.unconditional)

    def _encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompt embeddings (N, 77, D) and, for SDXL, pooled embeddings (N, P)."""
        with torch.inference_mode():
            encoded = self.pipeline.encode_prompt(prompts, device=self.device, num_images_per_prompt=1,
                                                  do_classifier_free_guidance=False)
        return encoded[0], (encoded[2] if self.sdxl else None)

    def _conditioning(self, prompts: list[str]) -> dict:
        """The UNet's keyword arguments for N unconditional rows followed by N conditional ones."""
        both = [torch.cat([empty.expand_as(full), full]) if full is not None else None
                for empty, full in zip(self.unconditional, self._encode(prompts))]
        if not self.sdxl:
            return {"encoder_hidden_states": both[0]}
        height, width = self.settings.height, self.settings.width
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=both[0].dtype, device=self.device)
        return {"encoder_hidden_states": both[0],
                "added_cond_kwargs": {"text_embeds": both[1], "time_ids": time_ids.expand(2 * len(prompts), -1)}}

    @torch.inference_mode()
    def sample(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """One image for each prompt and its seed."""
        settings, unet, scheduler = self.settings, self.pipeline.unet, self.pipeline.scheduler
        conditioning = self._conditioning(prompts)
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        factor = self.pipeline.vae_scale_factor
        shape = (1, unet.config.in_channels, settings.height // factor, settings.width // factor)
        noise = [torch.randn(shape, generator=generator, device=self.device, dtype=unet.dtype)
                 for generator in generators]
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_arguments = {"generator": generators} if takes_generator else {}

        scheduler.set_timesteps(settings.num_inference_steps, device=self.device)
        latents = torch.cat(noise).to(settings.latents_dtype) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep).to(unet.dtype)
            prediction = unet(torch.cat([scaled, scaled]), timestep, **conditioning, return_dict=False)[0]
            unconditional, conditional = prediction.to(settings.latents_dtype).chunk(2)
            start = conditional if settings.cfg_convention == "official" else unconditional
            guided = start + settings.cfg * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents, **step_arguments, return_dict=False)[0]
        return [self._decode(latent) for latent in latents.split(1)]

    def _decode(self, latent: torch.Tensor) -> Image.Image:
        """One image at a time: the VAE's memory stays that of one, and no image depends on its batch."""
        vae = self.pipeline.vae
        pixels = vae.decode(latent.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
