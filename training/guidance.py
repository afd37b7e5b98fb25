"""Classifier-free guidance and decoding for programs that sample while they train (SPO and its preference model)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.data import tokenize
from training.diffusion import encode_prompts, size_ids
from training.models import Models

DECODED_AT_ONCE = 8  # images: the VAE's activations at full resolution, not its speed, are the limit


@dataclass
class PromptConditioning:
    """Embeddings of P prompts and of the empty one: embeddings (P, L, D), empty (1, L, D); for SDXL also pooled (P, E),
    empty_pooled (1, E) and time_ids (1, 6), else None."""

    embeddings: Tensor
    empty: Tensor
    pooled: Tensor | None = None
    empty_pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def unet_arguments(self, prompts: Tensor) -> dict:
        """The UNet's keyword arguments for N samples without their prompts, then for the same N with them."""
        count = len(prompts)
        arguments = {"encoder_hidden_states": _both(self.empty, self.embeddings[prompts])}
        if self.pooled is not None:
            arguments["added_cond_kwargs"] = {"text_embeds": _both(self.empty_pooled, self.pooled[prompts]),
                                              "time_ids": self.time_ids.expand(2 * count, -1)}
        return arguments


def _both(empty: Tensor, conditional: Tensor) -> Tensor:
    return torch.cat([empty.expand_as(conditional), conditional])


def condition_on_prompts(models: Models, args, prompts: list[str], device: torch.device) -> PromptConditioning:
    """Encode P prompts. The unconditional embedding is the encoded "" for SD1.5 and zeros for SDXL, as published."""
    texts = prompts if args.sdxl else [*prompts, ""]
    input_ids = [tokenize(tokenizer, texts).to(device) for tokenizer in models.tokenizers]
    embeddings, pooled = encode_prompts(models.text_encoders, input_ids, args.sdxl)
    if not args.sdxl:
        return PromptConditioning(embeddings[:-1], embeddings[-1:])
    return PromptConditioning(embeddings, torch.zeros_like(embeddings[:1]), pooled, torch.zeros_like(pooled[:1]),
                              size_ids(args, 1, device))


def guided_prediction(unet, latents: Tensor, timesteps: Tensor, conditioning: PromptConditioning, prompts: Tensor,
                      guidance: float) -> Tensor:
    """u + guidance * (c - u) of the predictions without and with the prompt, float32, in one pass over 2N samples.

    latents: (N, C, h, w); timesteps: (N,); prompts: (N,) rows of `conditioning`.
    """
    both = unet(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), return_dict=False,
                **conditioning.unet_arguments(prompts))[0]
    unconditional, conditional = both.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def decode_latents(vae, latents: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) -> images (N, 3, H, W) around [-1, 1], float32, as the VAE gives them: not clamped. Not
    to be called under autocast: a VAE kept in float32 is so because it overflows."""
    decoded = [vae.decode(part.to(vae.dtype), return_dict=False)[0].float()
               for part in (latents / vae.config.scaling_factor).split(DECODED_AT_ONCE)]
    return torch.cat(decoded)
