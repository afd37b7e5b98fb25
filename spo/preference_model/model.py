"""The step-aware preference model (SPM) of SPO (arXiv:2406.04314): PickScore's CLIP with a vision tower that knows t.

t -> sinusoid -> MLP -> one adaLN modulation in every vision layer and one after the last LayerNorm, as in DiT
(arXiv:2212.09748, "adaLN-Zero"), but initialised so that the model is exactly the CLIP that it was made from.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoTokenizer, CLIPModel

from common.errors import UserError
from models.weights import from_hub, load_strictly, read_state_dict

EVALUATION_TIMESTEPS = (0, 251, 501, 701, 951)
SINUSOID_SIZE = 256
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's published preprocessing
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_then_clamp(images: torch.Tensor, size: int) -> torch.Tensor:
    """Decoded images (N, 3, H, W) around [-1, 1] -> (N, 3, size, size) in [0, 1], as the SPO program scores them
    (get_preference_score in its step_aware_preference_model.py)."""
    return (_bicubic(images, size) / 2 + 0.5).clamp(0, 1)


def clamp_resize_clamp(images: torch.Tensor, size: int) -> torch.Tensor:
    """The same, as the preference model's training program does (train_step in its spm_task.py)."""
    return _bicubic((images / 2 + 0.5).clamp(0, 1), size).clamp(0, 1)


def _bicubic(images: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False)  # no antialiasing, officially


class TimestepEmbedder(nn.Module):
    """(N,) timesteps -> (N, hidden_size): 256 sinusoids, cosines first, then Linear, SiLU, Linear; the weights start at
    N(0, 0.02), as in DiT."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        for linear in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        half = SINUSOID_SIZE // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep.float()[:, None] * 10000.0 ** -exponents[None]
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


def modulation(hidden_size: int, chunks: int, ones: tuple[int, ...] = ()) -> nn.Sequential:
    """SiLU, Linear to `chunks` vectors that start at 0 whatever t is; those in `ones` (the gates) start at 1."""
    linear = nn.Linear(hidden_size, chunks * hidden_size)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    for chunk in ones:
        linear.bias.data[chunk * hidden_size : (chunk + 1) * hidden_size] = 1.0
    return nn.Sequential(nn.SiLU(), linear)


class StepAwarePreferenceModel(nn.Module):
    """A CLIPModel scoring (image, prompt) at a timestep: exp(logit_scale) * cosine.

    The conditioning modules hang on the CLIP's own modules under the official checkpoints' names
    (model.t_embedder, model.vision_model.encoder.layers.N.adaLN_modulation, model.vision_model.adaLN_modulation).
    Right after construction every score equals the CLIP's own, at every timestep.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        hidden_size = clip.config.vision_config.hidden_size
        self.model = clip
        clip.t_embedder = TimestepEmbedder(hidden_size)
        for layer in clip.vision_model.encoder.layers:
            layer.adaLN_modulation = modulation(hidden_size, chunks=6, ones=(2, 5))
        clip.vision_model.adaLN_modulation = modulation(hidden_size, chunks=2)
        self.image_size = clip.config.vision_config.image_size
        self.gradient_checkpointing = False
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def text_features(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(N, 77) token ids -> (N, D) unit vectors."""
        return F.normalize(self.model.get_text_features(input_ids=input_ids).pooler_output, dim=-1)

    def image_features(self, pixels: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """(N, 3, image_size, image_size) pixels in [0, 1] and (N,) timesteps -> (N, D) unit vectors."""
        tower = self.model.vision_model
        condition = self.model.t_embedder(timestep)
        hidden = tower.pre_layrnorm(tower.embeddings((pixels - self.pixel_mean) / self.pixel_std))
        for layer in tower.encoder.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = recompute(_conditioned_layer, layer, hidden, condition, use_reentrant=False)
            else:
                hidden = _conditioned_layer(layer, hidden, condition)
        shift, scale = tower.adaLN_modulation(condition).chunk(2, dim=-1)
        pooled = tower.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def score(self, pixels: torch.Tensor, timestep: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Scores (N,) in float32 of (N, 3, image_size, image_size) pixels in [0, 1] at (N,) timesteps for (N, D) text
        features."""
        cosine = (self.image_features(pixels, timestep).float() * text_features.float()).sum(dim=-1)
        return self.model.logit_scale.float().exp() * cosine

    def forward(self, pixels: torch.Tensor, timestep: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Scores (m * P,) of (m * P, 3, image_size, image_size) pixels for P prompts' (P, 77) token ids, the prompts in
        turn m times."""
        text_features = self.text_features(input_ids)
        return self.score(pixels, timestep, text_features.repeat(len(pixels) // len(input_ids), 1))


def _conditioned_layer(layer: nn.Module, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """A CLIP encoder layer with adaLN: (N, tokens, hidden_size) -> the same."""
    chunks = layer.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = chunks
    normed = layer.layer_norm1(hidden) * (1 + scale_attention) + shift_attention
    hidden = hidden + gate_attention * layer.self_attn(hidden_states=normed, attention_mask=None)[0]
    normed = layer.layer_norm2(hidden) * (1 + scale_mlp) + shift_mlp
    return hidden + gate_mlp * layer.mlp(normed)


def load_spm(clip_path: str | os.PathLike, checkpoint: str | os.PathLike | None = None,
             cache_dir: str | None = None) -> StepAwarePreferenceModel:
    """The model made from the CLIP `clip_path` (PickScore), with a checkpoint's weights put in, in float32.

    checkpoint: an official .bin, a file written by `python -m spo.preference_model.train`, or ORG/REPO/FILE.bin on the hub;
    None leaves the identity initialisation. Raises UserError for a missing or damaged file and for one of another size.
    """
    spm = StepAwarePreferenceModel(from_hub(CLIPModel, clip_path, "the CLIP of the step-aware preference model",
                                            cache_dir=cache_dir))
    if checkpoint is not None:
        load_strictly(spm, _without_buffers(read_state_dict(_local_file(checkpoint, cache_dir))), checkpoint)
    return spm


def load_spm_tokenizer(name: str | os.PathLike, cache_dir: str | None = None):
    """PickScore's tokenizer (any CLIP tokenizer's folder or hub id)."""
    return from_hub(AutoTokenizer, name, "the step-aware preference model's tokenizer", cache_dir=cache_dir)


def _without_buffers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Older transformers saved the position ids, which are no weights and which CLIPModel does not take any more."""
    return {key: value.float() for key, value in state.items() if not key.endswith(".position_ids")}


def _local_file(checkpoint: str | os.PathLike, cache_dir: str | None) -> str | os.PathLike:
    """`checkpoint` itself, or the local copy of ORG/REPO/FILE when there is no such file here."""
    parts = str(checkpoint).split("/")
    if os.path.exists(checkpoint) or len(parts) != 3 or str(checkpoint).startswith((".", "/")):
        return checkpoint
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download("/".join(parts[:2]), parts[2], cache_dir=cache_dir)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"no step-aware preference model at {checkpoint}: no such file here, and the hub gave none "
                        f"({type(error).__name__})") from None
