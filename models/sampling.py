"""Sampling images from any family's network, many prompts at a time.

An image depends on its seed, its prompt and the settings alone: its noise comes from a generator of its own, seeded
anew for every image, so neither the batch it is in nor the device's number matters.
"""

import inspect
from dataclasses import dataclass

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn

from models.family import Family, Text
from models.guidance import guided


@dataclass(frozen=True)
class SamplingSettings:
    """Everything besides seed, prompt and weights that an image depends on."""

    height: int
    width: int
    num_inference_steps: int
    cfg: float
    cfg_convention: str  # "official": e_cond + cfg (e_cond - e_uncond); "diffusers": as the family's own pipeline has it
    scheduler: str  # "euler", or "default" for the pipeline's own
    latents_dtype: torch.dtype  # of the latents through all steps; the noise is drawn in the network's

    @property
    def guidance_scale(self) -> float:
        """s of the usual convention e_uncond + s (e_cond - e_uncond)."""
        return self.cfg + 1 if self.cfg_convention == "official" else self.cfg


@torch.no_grad()
def sample(family: Family, network: nn.Module, text: Text, empty: Text, seeds: list[int], settings: SamplingSettings,
           noise_device: torch.device | None = None) -> list[Image.Image]:
    """One image for each row of `text` and its seed. empty: the one row of the unconditional prediction.

    noise_device: where the noise is drawn; None: where the network is.
    """
    device, dtype = next(network.parameters()).device, getattr(network, "dtype", torch.float32)
    size = (settings.height, settings.width)
    shape = (1, *family.latent_shape(*size))
    noise_device = noise_device or device
    generators = [torch.Generator(noise_device).manual_seed(seed) for seed in seeds]
    noise = [torch.randn(shape, generator=generator, device=noise_device, dtype=dtype) for generator in generators]

    scheduler = family.sampler(settings.scheduler, settings.num_inference_steps, device, size)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_arguments = {"generator": generators} if takes_generator else {}
    latents = torch.cat(noise).to(device, settings.latents_dtype) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep).to(dtype)
        times = timestep.expand(len(latents))
        prediction = guided(family, network, scaled, times, text, empty, size, settings.cfg,
                            settings.cfg_convention == "official", settings.latents_dtype)
        latents = scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]
    return [decode(family, latent) for latent in latents.split(1)]


def decode(family: Family, latent: torch.Tensor) -> Image.Image:
    """One image at a time: the VAE's memory stays that of one, and no image depends on its batch."""
    with torch.autocast(latent.device.type, enabled=False):
        return VaeImageProcessor().postprocess(family.decode(latent), output_type="pil")[0]
