"""The flow-matching families at their published sizes, without files: for counting what they need."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from common.train_options import ModelOptions
from models.family import FAMILIES, Family

# Of a base's transformer/config.json where it differs from the class's defaults; its scheduler does not matter here.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd3": {"base": "SD3.5-medium", "pipeline": "StableDiffusion3Pipeline", "config": {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}},
    "flux": {"base": "FLUX.1-dev", "pipeline": "FluxPipeline", "config": {"guidance_embeds": True}},
    "qwen_image": {"base": "Qwen-Image", "pipeline": "QwenImagePipeline", "config": {}},
    "z_image": {"base": "Z-Image", "pipeline": "ZImagePipeline", "config": {"axes_lens": [1536, 512, 512]}},
}
VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "shift_factor": 0.1159, "scaling_factor": 0.3611,
       "temperal_downsample": [False, True, True], "z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
CLIP_TOKENS = 77


def make_flow_family(model: str, options: ModelOptions | None = None) -> Family:
    """A family as open_family gives it, without what only files tell: encoders, tokenizers, the sampler's shift."""
    known = FAMILIES[PUBLISHED[model]["pipeline"]]
    family = object.__new__(getattr(import_module(known.module), known.name))
    family.options, family.index = options or ModelOptions(PUBLISHED[model]["base"]), {}
    family.vae_config, family.text_encoders, family.vae = VAE, [], None
    family.scheduler = SimpleNamespace(config=SimpleNamespace(use_dynamic_shifting=False, shift=3.0))
    with torch.device("meta"):
        family.config = make_transformer(model, family).config
    family.sequence_length = family.options.max_sequence_length or family.default_sequence
    return family


def make_transformer(model: str, family: Family) -> nn.Module:
    """The transformer with random weights, in torch's default type on its default device."""
    return family.network(**PUBLISHED[model]["config"])


def text_of(family: Family, prompts: int) -> dict[str, torch.Tensor]:
    """What a cache holds of so many prompts, each as long as can be, in bf16 and without content."""
    config, length = family.config, family.sequence_length
    width = config.get("joint_attention_dim") or config["cap_feat_dim"]
    if family.name == "sd3":
        length += CLIP_TOKENS
    text = {"embeddings": torch.empty(prompts, length, width, dtype=torch.bfloat16)}
    if "pooled_projection_dim" in config:
        text["pooled"] = torch.empty(prompts, config["pooled_projection_dim"], dtype=torch.bfloat16)
    else:
        text["mask"] = torch.empty(prompts, length, dtype=torch.bool)
    return text
