"""Stable Diffusion's parts at their published sizes, with random weights: for measuring, where no weights are at hand."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common.train_options import ModelOptions
from models.family import Family
from models.stable_diffusion import StableDiffusion15, StableDiffusionXL
from shapes.pipeline import clip_tokenizer

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

# The fields in which the published config.json files differ from the classes' defaults.
UNETS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
             "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
             "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
             "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"], "use_linear_projection": True,
             "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
             "projection_class_embeddings_input_dim": 2816},
    "tiny": {"sample_size": 16, "cross_attention_dim": 32, "attention_head_dim": 4, "block_out_channels": [32, 64],
             "layers_per_block": 1, "norm_num_groups": 8, "down_block_types": [CROSS_DOWN, "DownBlock2D"],
             "up_block_types": ["UpBlock2D", CROSS_UP]},
}
VAE = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAES = {
    "sd15": VAE | {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512,
                   "scaling_factor": 0.18215},
    "sdxl": VAE | {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 1024,
                   "scaling_factor": 0.13025},
    "tiny": VAE | {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 8,
                   "sample_size": 128},
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768, "hidden_act": "quick_gelu", "vocab_size": 49408}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
              "projection_dim": 1280, "hidden_act": "gelu", "vocab_size": 49408}
CLIP_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "projection_dim": 32, "vocab_size": 49408}
TEXT_ENCODERS = {"sd15": [(CLIPTextModel, CLIP_L)], "tiny": [(CLIPTextModel, CLIP_TINY)],
                 "sdxl": [(CLIPTextModel, CLIP_L), (CLIPTextModelWithProjection, CLIP_BIG_G)]}
RESOLUTIONS = {"tiny": 128, "sd15": 512, "sdxl": 1024}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_unet(name: str) -> UNet2DConditionModel:
    """The UNet, float32, on torch's default device (under torch.device("meta") it takes no memory)."""
    return UNet2DConditionModel.from_config(UNETS[name])


class RandomWeights:
    """The half of a family that reads files: random weights at the published sizes, in its place."""

    def __init__(self, model: str, options: ModelOptions):
        self.model, self.options, self.index = model, options, {}
        self.turbo = self.refiner = False
        self.scheduler = DDPMScheduler(**NOISE)
        self.tokenizers = {name: clip_tokenizer() for name in self.encoder_names}
        self.vae_config, self.resolution = VAES[model], RESOLUTIONS[model]
        self.scaling_factor = self.vae_config.get("scaling_factor", 0.18215)
        self.drop_encoders()

    def load_encoders(self, dtype: torch.dtype, device: torch.device, vae_dtype: torch.dtype | None = None) -> None:
        with torch.device(device):
            self.vae = frozen(AutoencoderKL.from_config(self.vae_config), vae_dtype or dtype)
            self.text_encoders = [frozen(kind(CLIPTextConfig(**config, bos_token_id=49406, eos_token_id=49407)), dtype)
                                  for kind, config in TEXT_ENCODERS[self.model]]

    def encoder_sources(self) -> dict:
        return {}

    def sampler(self, kind: str, steps: int, device: torch.device, size=None) -> EulerDiscreteScheduler:
        scheduler = EulerDiscreteScheduler(**NOISE)
        scheduler.set_timesteps(steps, device=device)
        return scheduler


class RandomSD15(RandomWeights, StableDiffusion15):
    pass


class RandomSDXL(RandomWeights, StableDiffusionXL):
    pass


def make_family(model: str, options: ModelOptions | None = None) -> Family:
    """The family of a model, without files; its encoders come with load_encoders, its network from make_unet."""
    return (RandomSDXL if model == "sdxl" else RandomSD15)(model, options or ModelOptions(model))


def network_inputs(family: Family, samples: int, resolution: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """x_t, times and text of so many samples, without content, on torch's default device."""
    text = {"embeddings": torch.empty(samples, 77, UNETS[family.model]["cross_attention_dim"])}
    if family.model == "sdxl":
        text["pooled"] = torch.empty(samples, 1280)
    return torch.empty(samples, *family.latent_shape(resolution, resolution)), torch.empty(samples, dtype=torch.long), text


def frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype).requires_grad_(False).eval()
