"""Small Stable Diffusion pipelines of the real diffusers classes, built offline.

build_pipeline writes an untrained one, SD1.5-shaped or SDXL-shaped, in seconds: for tests and for trying commands.
base_pipeline opens the trained one that is shipped in shapes/base; draw_images draws with either.
"""

import hashlib
import os
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.errors import UserError

KINDS = ("sd15", "sdxl")
SHIPPED = Path(__file__).parent / "base"
OPENED = Path(__file__).parents[1] / "output" / "shapes_base"
GUIDANCE_SCALE = 1.5  # where the base's drawings still vary; it draws cleanest at 2
NOISE_OFFSET = 0.1  # of the base's last training pass; tuning without it moves brightness before anything else


def build_pipeline(folder: str | os.PathLike, kind: str = "sd15", seed: int = 0,
                   prediction_type: str = "epsilon") -> Path:
    """Write a tiny untrained diffusers pipeline into `folder` and return it as a Path.

    kind "sd15" opens as StableDiffusionPipeline, "sdxl" as StableDiffusionXLPipeline. Native resolution 64, latents
    4x8x8; the tokenizer is CLIP's own. prediction_type: "epsilon" or "v_prediction". The same seed gives the same
    weights. Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: one of {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _sd15(prediction_type) if kind == "sd15" else _sdxl(prediction_type)
    pipeline.save_pretrained(folder)
    return Path(folder)


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's BPE tokenizer (49,408 entries, 77 tokens), made from the vocabulary that open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer

    source = SimpleTokenizer()
    ours = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {ours.get(word, word): index for word, index in source.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(source.bpe_ranks), pad_token=pad_token, model_max_length=77)


def text_config(width: int, layers: int, **kwargs) -> CLIPTextConfig:
    """CLIP's text encoder over the real vocabulary, small."""
    return CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                          num_attention_heads=max(1, width // 16), vocab_size=49408, bos_token_id=49406,
                          eos_token_id=49407, pad_token_id=1, projection_dim=width, **kwargs)


def sd15_scheduler(prediction_type: str = "epsilon") -> PNDMScheduler:
    """The scheduler of SD1.5's published pipeline."""
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    scheduler.register_to_config(clip_sample=False)  # as published: not PNDM's own, read by DDIM and DDPM
    return scheduler


def assemble(vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of these parts, CLIP's tokenizer and SD1.5's scheduler."""
    return StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=clip_tokenizer(), unet=unet,
                                   scheduler=sd15_scheduler(), safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)


def base_pipeline(folder: str | os.PathLike = OPENED) -> Path:
    """The trained base as a diffusers folder in float32 (native resolution 32); made from the shipped float16 weights
    on the first call and when those change. Raises UserError where the weights are not there."""
    folder, weights = Path(folder), sorted(SHIPPED.rglob("*.safetensors"))
    if len(weights) != 3:
        raise UserError(f"the base's weights are not in {SHIPPED}: bash scripts/build_base.sh makes them")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    stamp = folder / "made_from"
    if not stamp.is_file() or stamp.read_text() != digest:
        parts = [cls.from_pretrained(SHIPPED / name).float()
                 for name, cls in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel),
                                   ("unet", UNet2DConditionModel))]
        assemble(*parts).save_pretrained(folder)
        stamp.write_text(digest)
    return folder


def draw_images(pipeline: StableDiffusionPipeline, prompts: list[str], first_seed: int = 0,
                num_inference_steps: int = 30, guidance_scale: float = GUIDANCE_SCALE,
                batch_size: int = 50) -> list[Image.Image]:
    """One image a prompt by DDIM; image i starts from the noise of seed first_seed + i, whatever the batch size."""
    scheduler, pipeline.scheduler = pipeline.scheduler, DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size]
        noise = [torch.Generator().manual_seed(first_seed + start + index) for index in range(len(batch))]
        images += pipeline(batch, generator=noise, num_inference_steps=num_inference_steps,
                           guidance_scale=guidance_scale).images
    pipeline.scheduler = scheduler
    return images


def _vae(scaling_factor):
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8, latent_channels=4,
                         sample_size=64, scaling_factor=scaling_factor, force_upcast=False)


def _sd15(prediction_type):
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                                cross_attention_dim=32, attention_head_dim=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    pipeline = assemble(_vae(0.18215), CLIPTextModel(text_config(32, 1)), unet)
    pipeline.register_modules(scheduler=sd15_scheduler(prediction_type))
    return pipeline


def _sdxl(prediction_type):
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                                cross_attention_dim=48, attention_head_dim=(2, 4), use_linear_projection=True,
                                transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
                                addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       steps_offset=1, timestep_spacing="leading", prediction_type=prediction_type)
    return StableDiffusionXLPipeline(vae=_vae(0.13025), text_encoder=CLIPTextModel(text_config(32, 2)),
                                     text_encoder_2=CLIPTextModelWithProjection(text_config(16, 2)),
                                     tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(pad_token="!"), unet=unet,
                                     scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False)
