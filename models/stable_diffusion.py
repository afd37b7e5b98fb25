"""Stable Diffusion 1.5 and SDXL, with SDXL's refiner and the turbo variants of both.

A UNet predicts the noise (or v) of latents at integer timesteps of a DDPM schedule; SD1.5 reads one CLIP text encoder's
last hidden state, SDXL two encoders' hidden_states[-2], a pooled embedding and the image's size.
"""

from functools import cached_property
from pathlib import Path

import diffusers
import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, SchedulerMixin,
                       StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from common.errors import UserError, warn
from common.train_options import ModelOptions
from losses.spo import clean_and_noise, ddim_gaussian
from models.family import Text
from models.parts import PipelineParts, unscaled_latents
from models.tokens import tokenize

TURBO_TIMESTEPS = (249, 499, 749, 999)
REFINER_TIMESTEPS = 200
REFINER_AESTHETIC_SCORE = 6.0


class StableDiffusion15(PipelineParts):
    name, label, license, flow = "sd15", "SD1.5", "creativeml-openrail-m", False
    backbone, network, pipeline = "unet", UNet2DConditionModel, StableDiffusionPipeline
    weights_file = "unet.pth"
    resolution, always_checkpoints = 512, False
    steps, guidance, embeds_guidance, empty_prompt, empty_is_zeros = 50, 7.5, False, "", False
    overflows_in_fp16, sequence_length = False, None
    eta = 1.0
    ignored_options = ("timestep_sampling", "logit_mean", "logit_std", "timestep_shift", "max_sequence_length",
                       "embedded_guidance")
    images_at_once, evaluation_vae = 8, None
    pipeline_parts = {"safety_checker": None, "feature_extractor": None}
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    compiled_blocks = (BasicTransformerBlock, ResnetBlock2D)
    encoder_names, vae_class = ("text_encoder",), AutoencoderKL
    vae_at_once = 8  # more are no faster, and at 1024 px their activations take gigabytes
    longer_text = "no option reads more"

    def __init__(self, options: ModelOptions, index: dict):
        """Read scheduler, tokenizers and the VAE's config: the small files, so that a wrong model is refused before
        gigabytes are read. index: the base's model_index.json. Raises UserError."""
        super().__init__(options, index)
        base = options.pretrained_model_name_or_path
        self.turbo = "turbo" in Path(base).name.lower()  # by the model's own name, as published; not by its folders
        self.scheduler = self.read(DDPMScheduler, "the scheduler", "scheduler")
        if self.turbo:
            self.scheduler = DDPMScheduler.from_config(self.scheduler.config, rescale_betas_zero_snr=True)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"{base} predicts '{self.scheduler.config.prediction_type}': only epsilon and v_prediction are "
                            "known")
        self.scaling_factor = self.vae_config.get("scaling_factor", 0.18215)
        config = self.read(UNet2DConditionModel, "the UNet's config", "unet", method="load_config")
        if isinstance(config.get("sample_size"), int):
            self.resolution = config["sample_size"] * self.latent_factor  # what this base was made for

    def load_vae(self, asked: torch.dtype, device: torch.device) -> None:
        if asked != self.vae_dtype(asked):
            warn("this VAE overflows in fp16 and is kept in float32; --pretrained_vae_model_name_or_path "
                 "madebyollin/sdxl-vae-fp16-fix runs in fp16")
        super().load_vae(asked, device)

    def vae_dtype(self, asked: torch.dtype) -> torch.dtype:
        """The VAE's type where `asked` is asked for: SDXL's own VAE overflows in fp16."""
        overflows = asked == torch.float16 and self.name == "sdxl" and self.vae_config.get("force_upcast", True)
        return torch.float32 if overflows else asked

    @property
    def training_resolution(self) -> int:
        return self.resolution

    # --- text ------------------------------------------------------------------------------------------------------------

    def tokenize(self, captions: list[str]) -> Text:
        """input_ids.N (B, 77) for each tokenizer, padded and truncated."""
        return {f"input_ids.{number}": tokenize(tokenizer, captions)
                for number, tokenizer in enumerate(self.tokenizers.values())}

    def caption_room(self, tokenizer) -> int:
        return tokenizer.model_max_length - 2

    @torch.no_grad()
    def encode_text(self, tokens: Text) -> Text:
        """embeddings (B, 77, D): the last hidden state."""
        return {"embeddings": self.text_encoders[0](tokens["input_ids.0"])[0]}

    # --- images ----------------------------------------------------------------------------------------------------------

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        return unscaled_latents(moments, noise) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_unscaled(latents.float() / self.scaling_factor)

    # --- the network -----------------------------------------------------------------------------------------------------

    def check_network(self, network: nn.Module, source: str) -> None:
        if (network.config.addition_embed_type == "text_time") != (self.name == "sdxl"):
            raise UserError(f"the UNet of {source} is not one of {self.label}, which the base's model_index.json names")
        if network.config.get("dropout"):
            raise UserError(f"{source} has dropout {network.config.dropout}: policy and reference would differ by chance; "
                            "set it to 0 in unet/config.json")

    def times(self, uniform: Tensor) -> Tensor:
        """U{0..T-1}; turbo models have four timesteps."""
        if self.turbo:
            steps = torch.tensor(TURBO_TIMESTEPS).to(uniform.device, non_blocking=True)
            return steps[(uniform * len(TURBO_TIMESTEPS)).long()]
        return (uniform * self.scheduler.config.num_train_timesteps).long()

    def noise(self, latents: Tensor, noise: Tensor, times: Tensor,
              input_noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_t = self.scheduler.add_noise(latents, noise if input_noise is None else input_noise, times)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return x_t, self.scheduler.get_velocity(latents, noise, times) if velocity else noise

    def predict(self, network: nn.Module, x_t: Tensor, times: Tensor, text: Text, size: tuple[int, int]) -> Tensor:
        return network(x_t, times, return_dict=False, **self.network_arguments(text, size))[0]

    def network_arguments(self, text: Text, size: tuple[int, int]) -> dict:
        return {"encoder_hidden_states": text["embeddings"]}

    def sampler(self, kind: str, steps: int, device: torch.device, size: tuple[int, int] | None = None):
        """"euler", from the base's schedule, or "default" for the pipeline's own."""
        own = self._own_scheduler
        scheduler = (EulerDiscreteScheduler if kind == "euler" else type(own)).from_config(own.config)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def walk(self, steps: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """DDIM's timesteps."""
        scheduler = ddim_scheduler(self.scheduler, steps)
        return scheduler.timesteps, (scheduler.timesteps - scheduler.config.num_train_timesteps // steps).clamp(min=0)

    def transition(self, prediction: Tensor, x_t: Tensor, times: Tensor, next_times: Tensor,
                   eta: float) -> tuple[Tensor, Tensor, Tensor]:
        return ddim_gaussian(prediction, x_t, times, next_times, self.scheduler.alphas_cumprod, eta,
                             self.scheduler.config.prediction_type)

    def clean(self, prediction: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        return clean_and_noise(prediction, x_t, times, self.scheduler.alphas_cumprod,
                               self.scheduler.config.prediction_type)[0]

    @cached_property
    def _own_scheduler(self):
        """Read once: a hub would be asked for it at every batch."""
        return self.read(getattr(diffusers, self.index["scheduler"][1]), "the scheduler", "scheduler")


class StableDiffusionXL(StableDiffusion15):
    name, label, license = "sdxl", "SDXL", "openrail++"
    pipeline, resolution, always_checkpoints = StableDiffusionXLPipeline, 1024, True
    images_at_once, evaluation_vae = 4, "madebyollin/sdxl-vae-fp16-fix"
    pipeline_parts = {"add_watermarker": False}

    def __init__(self, options: ModelOptions, index: dict):
        self.refiner = "refiner" in Path(options.pretrained_model_name_or_path).name.lower()
        self.encoder_names = ("text_encoder_2",) if self.refiner else ("text_encoder", "text_encoder_2")
        super().__init__(options, index)
        if self.turbo:
            self.license = "other"  # Stability's non-commercial one

    @torch.no_grad()
    def encode_text(self, tokens: Text) -> Text:
        """embeddings (B, 77, D): both encoders' hidden_states[-2], concatenated; pooled (B, P): the second's."""
        outputs = [encoder(tokens[f"input_ids.{number}"], output_hidden_states=True)
                   for number, encoder in enumerate(self.text_encoders)]
        return {"embeddings": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
                "pooled": outputs[-1].text_embeds}

    @property
    def empty_is_zeros(self) -> bool:
        return self.index.get("force_zeros_for_empty_prompt", True)

    def times(self, uniform: Tensor) -> Tensor:
        """The refiner is trained on the lowest 200 timesteps."""
        times = super().times(uniform)
        return times % REFINER_TIMESTEPS if self.refiner and not self.turbo else times

    def network_arguments(self, text: Text, size: tuple[int, int]) -> dict:
        """Size conditioning: original size, crop corner, target size (refiner: an aesthetic score)."""
        last = [REFINER_AESTHETIC_SCORE] if self.refiner else list(size)
        time_ids = torch.tensor([*size, 0, 0, *last], dtype=torch.float32).to(text["pooled"].device, non_blocking=True)
        return {"encoder_hidden_states": text["embeddings"],
                "added_cond_kwargs": {"text_embeds": text["pooled"], "time_ids": time_ids.expand(len(text["pooled"]), -1)}}


def ddim_scheduler(base_scheduler: SchedulerMixin, num_steps: int) -> DDIMScheduler:
    """DDIM with the base pipeline's noise schedule and `num_steps` denoising steps. Raises UserError for more of them
    than the schedule has room for, its steps_offset moving all of them up, and for timesteps that end at 0."""
    scheduler = DDIMScheduler.from_config(base_scheduler.config)
    trained = scheduler.config.num_train_timesteps
    if num_steps <= trained:
        scheduler.set_timesteps(num_steps)
    if num_steps > trained or int(scheduler.timesteps.max()) >= trained:
        raise UserError(f"--spo_num_steps {num_steps} is too many for the base pipeline's scheduler, whose {trained} "
                        f"timesteps begin at {scheduler.config.steps_offset}: at most "
                        f"{trained - scheduler.config.steps_offset} fit, and the published setting is 20")
    if int(scheduler.timesteps.min()) == 0:
        raise UserError("the base pipeline's timesteps end at 0 (steps_offset 0, or timestep_spacing linspace): SPO's last "
                        "step would add no noise, and so have no probability; SD1.5's and SDXL's scheduler_config.json have "
                        "steps_offset 1 and no linspace")
    return scheduler
