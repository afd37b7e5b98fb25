"""What flow-matching families share: times, noising, guidance, sampler, a KL VAE.

A transformer predicts the velocity, noise - x0, of x_t = (1 - sigma) x0 + sigma noise. Times are 1000 sigma, as the
schedulers count them, in float32 up to the network; a family's file says what its network rounds.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from common.errors import UserError, warn
from common.train_options import ModelOptions
from losses.spo import flow_gaussian
from models.parts import PipelineParts, unscaled_latents


class FlowSampler(FlowMatchEulerDiscreteScheduler):
    init_noise_sigma = 1.0  # what diffusers' other schedulers have

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


class FlowFamily(PipelineParts):
    flow, backbone, weights_file = True, "transformer", "transformer.safetensors"
    vae_class, patch = AutoencoderKL, 2
    packing = 4  # channels that the transformer reads per channel of the latents
    resolution, images_at_once, evaluation_vae, always_checkpoints = 1024, 4, None, False
    empty_prompt, empty_is_zeros, embeds_guidance = "", False, False
    overflows_in_fp16, vae_in_float32 = True, False
    distilled_names, distilled_sampling = ("turbo",), (4, 1.0)  # steps and guidance: of the conditional prediction alone
    encoder_names, ignored_options = ("text_encoder",), ("embedded_guidance",)
    timestep_sampling, sampler_starts_at_one, eta = "uniform", True, 0.7
    longer_text = "a higher --max_sequence_length reads more"

    def __init__(self, options: ModelOptions, index: dict):
        """Read the small files: scheduler, tokenizers, configurations. Raises UserError."""
        super().__init__(options, index)
        self.scheduler = self.read(FlowMatchEulerDiscreteScheduler, "the scheduler", "scheduler")
        self.config = self.read(self.network, "the transformer's config", self.backbone, method="load_config")
        self.sequence_length = options.max_sequence_length or self.default_sequence
        if self.sequence_length > self.longest_sequence:
            raise UserError(f"--max_sequence_length {self.sequence_length}: {self.label} reads {self.longest_sequence} at "
                            "most")
        if self.is_distilled:
            self.steps, self.guidance = self.distilled_sampling
            warn(f"{options.pretrained_model_name_or_path} is distilled to few steps without guidance, and preference "
                 f"training undoes that: its images at few steps get worse. Train {self.label}'s undistilled base instead")

    @property
    def is_distilled(self) -> bool:
        return any(word in Path(self.options.pretrained_model_name_or_path).name.lower() for word in self.distilled_names)

    @property
    def training_resolution(self) -> int:
        return min(self.resolution, 512)  # as the published recipes

    # --- images ----------------------------------------------------------------------------------------------------------

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        return (unscaled_latents(moments, noise) - self.vae_config["shift_factor"]) * self.vae_config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_unscaled(latents.float() / self.vae_config["scaling_factor"] + self.vae_config["shift_factor"])

    # --- the network -----------------------------------------------------------------------------------------------------

    def check_network(self, network: nn.Module, source: str) -> None:
        expected = self.latent_channels * self.packing
        if network.config.in_channels != expected:
            raise UserError(f"the transformer of {source} reads {network.config.in_channels} channels, and the base's VAE "
                            f"gives it {expected}: it is of another base")

    def times(self, uniform: Tensor) -> Tensor:
        """Through the inverse CDF, so that a time is a function of its pair's uniform alone."""
        options, sigma = self.options, uniform
        if (options.timestep_sampling or self.timestep_sampling) == "logit_normal":
            sigma = torch.sigmoid(options.logit_mean + options.logit_std * torch.special.ndtri(uniform))
        own = 1.0 if self.scheduler.config.use_dynamic_shifting else self.scheduler.config.shift
        return (1000 * shifted(sigma, options.timestep_shift or own)).float()

    def noise(self, latents: Tensor, noise: Tensor, times: Tensor,
              input_noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sigma = (times / 1000).reshape(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * (noise if input_noise is None else input_noise), noise - latents

    def sampler(self, kind: str, steps: int, device: torch.device, size: tuple[int, int] | None = None) -> FlowSampler:
        """The pipeline's own Euler schedule, whatever the kind; size: the images', which a dynamic shift depends on."""
        scheduler, config = FlowSampler.from_config(self.scheduler.config), self.scheduler.config
        if steps == 1 and config.shift_terminal:
            raise UserError(f"{self.label}'s schedule ends at {config.shift_terminal:g} and needs 2 steps or more")
        _, height, width = self.latent_shape(*(size or (self.resolution, self.resolution)))
        sigmas = np.linspace(1.0, 1 / steps, steps) if self.sampler_starts_at_one else None
        scheduler.set_timesteps(steps, device=device, sigmas=sigmas, mu=dynamic_shift(config, height * width // 4))
        scheduler.set_begin_index(0)
        return scheduler

    # --- SPO's walk ------------------------------------------------------------------------------------------------------

    def walk(self, steps: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        times = 1000 * self.sampler("default", steps, torch.device("cpu"), size).sigmas
        return times[:-1], times[1:]

    def transition(self, prediction: Tensor, x_t: Tensor, times: Tensor, next_times: Tensor,
                   eta: float) -> tuple[Tensor, Tensor, Tensor]:
        return flow_gaussian(prediction, x_t, times / 1000, next_times / 1000, eta)

    def clean(self, prediction: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        return x_t.float() - (times / 1000).reshape(-1, 1, 1, 1) * prediction.float()


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """More noise for a shift above 1: s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_shift(config: dict, tokens: int) -> float | None:
    """mu, the log of the shift that an image of so many tokens is sampled with; None where the shift is static."""
    if not config.use_dynamic_shifting:
        return None
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def pack(latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h/2 * w/2, 4C): a token for each 2x2 patch, channels outermost."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of pack; height and width of the latents."""
    n, _, channels = tokens.shape
    patches = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, channels // 4, height, width)
