"""The parts around the trained network that a base pipeline brings: tokenizers, text encoders, VAE."""

from functools import wraps
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from common.errors import UserError
from common.train_options import ModelOptions
from models.family import Text
from models.tokens import cut
from models.weights import from_hub


def each_alone(encode):
    """A family's encode_text, one prompt at a time, as images are encoded too: kernels round differently for another batch
    size, and a cache, made in larger batches, has to hold what training would compute. Encoders this large are as fast."""

    @wraps(encode)
    @torch.no_grad()
    def encode_each(self, tokens: Text) -> Text:
        rows = len(next(iter(tokens.values())))
        parts = [encode(self, {name: ids[row:row + 1] for name, ids in tokens.items()}) for row in range(rows)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return encode_each


class PipelineParts:
    """A family with encoder_names (those that a base may have, in order), vae_class, vae_in_float32 and caption_room().

    vae_at_once: how many images the VAE takes together. patch: latents along a side of what the network reads as one.
    """

    vae_at_once = patch = 1

    def __init__(self, options: ModelOptions, index: dict):
        """Read tokenizers and the VAE's configuration. index: the base's model_index.json. Raises UserError."""
        self.options, self.index = options, index
        self.text_encoders, self.vae = [], None
        self.encoder_names = tuple(name for name in self.encoder_names if self.class_name(name))
        self.tokenizers = {name: self.read(self.class_of(tokenizer_of(name)), "the tokenizer", tokenizer_of(name))
                           for name in self.encoder_names}
        for tokenizer in self.tokenizers.values():
            tokenizer.padding_side = "right"
        source, where = self._vae_source
        self.vae_config = from_hub(self.vae_class, source, "the VAE's config", method="load_config", **where)

    def class_name(self, part: str) -> str | None:
        """What model_index.json says that a part is; None where the base has none."""
        named = self.index.get(part)
        return named[1] if isinstance(named, list) and len(named) == 2 else None

    def class_of(self, part: str) -> type:
        name = self.class_name(part)
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if kind is None:
            raise UserError(f"the model_index.json of {self.options.pretrained_model_name_or_path} names {name} for {part}, "
                            "which the installed transformers does not know")
        return kind

    def read(self, kind: type, what: str, subfolder: str, **settings):
        """A part of the base pipeline. Raises UserError."""
        return from_hub(kind, self.options.pretrained_model_name_or_path, what, subfolder=subfolder, **self._hub, **settings)

    @property
    def _hub(self) -> dict:
        return {"revision": self.options.revision, "cache_dir": self.options.cache_dir}

    @property
    def _vae_source(self) -> tuple[str, dict]:
        other = self.options.pretrained_vae_model_name_or_path
        if other is None:
            return self.options.pretrained_model_name_or_path, self._hub | {"subfolder": "vae"}
        return other, {"cache_dir": self.options.cache_dir} | ({"subfolder": "vae"} if Path(other, "vae").is_dir() else {})

    def load_encoders(self, dtype: torch.dtype, device: torch.device, vae_dtype: torch.dtype | None = None) -> None:
        if dtype == torch.float16 and self.overflows_in_fp16:
            raise UserError(f"{self.label} overflows in fp16: use --mixed_precision bf16")
        self.text_encoders = [self.read(self.class_of(name), "a text encoder", name, torch_dtype=dtype)
                              .requires_grad_(False).eval().to(device) for name in self.encoder_names]
        self.load_vae(vae_dtype or dtype, device)

    def load_vae(self, asked: torch.dtype, device: torch.device) -> None:
        """The VAE alone, in `asked` or what vae_dtype makes of it."""
        self.vae = self.read_vae(self.vae_dtype(asked)).requires_grad_(False).eval().to(device)

    def vae_dtype(self, asked: torch.dtype) -> torch.dtype:
        return torch.float32 if self.vae_in_float32 else asked

    def read_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        source, where = self._vae_source
        return from_hub(self.vae_class, source, "the VAE", torch_dtype=dtype, **where)

    def encoder_sources(self) -> dict[str, tuple[str, str | None, str | None, str | None]]:
        base, (vae, where) = self.options.pretrained_model_name_or_path, self._vae_source
        names = [*self.encoder_names, *map(tokenizer_of, self.encoder_names)]
        return {"vae": (vae, where.get("subfolder"), where.get("revision"), where["cache_dir"]),
                **{name: (base, name, self.options.revision, self.options.cache_dir) for name in names}}

    def drop_encoders(self) -> None:
        self.text_encoders, self.vae = [], None

    # --- images, as an image VAE has them --------------------------------------------------------------------------------

    @property
    def latent_factor(self) -> int:
        """Pixels along a side of a latent."""
        return 2 ** (len(self.vae_config.get("block_out_channels", (64,))) - 1)

    @property
    def latent_channels(self) -> int:
        return self.vae_config.get("latent_channels", 4)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        needed = self.patch * self.latent_factor
        if height % needed or width % needed:
            raise UserError(f"{height}x{width} is no size for {self.label}: both must be multiples of {needed}")
        return self.latent_channels, height // self.latent_factor, width // self.latent_factor

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Contiguous, as a cache gives them: from channels-last latents UNets would pick kernels that round otherwise."""
        parts = pixels.to(self.vae.dtype).split(self.vae_at_once)
        return torch.cat([self.vae.encode(part).latent_dist.parameters for part in parts]).contiguous()

    @torch.no_grad()
    def decode_unscaled(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) float32 of latents as the VAE gave them, before a family scales them."""
        parts = latents.to(self.vae.dtype).split(self.vae_at_once)
        return torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in parts])

    # --- the network and its text ----------------------------------------------------------------------------------------

    def without_gradient(self, network: nn.Module) -> list[str]:
        return []

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, official: bool) -> Tensor:
        return (conditional if official else unconditional) + scale * (conditional - unconditional)

    def tokens_read(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = self.tokenizers[self.encoder_names[-1]]
        lengths = [len(ids) for ids in tokenizer(cut(captions), add_special_tokens=False, verbose=False).input_ids]
        return np.array(lengths), np.minimum(lengths, self.caption_room(tokenizer))


def unscaled_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents (N, C, h, w) float32 sampled from an image VAE's moments (N, 2C, h, w) with normal noise, as it gives them."""
    distribution = DiagonalGaussianDistribution(moments)
    return distribution.mean.float() + distribution.std.float() * noise


def tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def lengths(mask: Tensor) -> list[int]:
    """How many tokens of each row (B, L) count; the host waits for it."""
    return mask.sum(dim=1).tolist()
