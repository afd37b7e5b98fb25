"""Small Stable Diffusion pipelines of the real diffusers classes, built offline.

build_pipeline writes an untrained one, SD1.5-shaped or SDXL-shaped, in seconds: for tests and for trying commands.
base_pipeline opens a trained one: SD1.5-shaped, in shapes/base, or SD3-shaped, in shapes/base_sd3; draw_images draws with any.
"""

import hashlib
import os
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                       PNDMScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.errors import UserError

KINDS = ("sd15", "sdxl")
SHIPPED, SHIPPED_SD3 = Path(__file__).parent / "base", Path(__file__).parent / "base_sd3"
NETWORKS = {"sd15": (UNet2DConditionModel, SHIPPED / "unet"), "sd3": (SD3Transformer2DModel, SHIPPED_SD3 / "transformer")}
OPENED = {"sd15": Path(__file__).parents[1] / "output" / "shapes_base", "sd3": Path(__file__).parents[1] / "output" / "shapes_base_sd3"}
GUIDANCE_SCALE = 1.5  # where the base's drawings still vary; it draws cleanest at 2
NOISE_OFFSET = 0.1  # of the base's last training pass; tuning without it moves brightness before anything else
WORDS = 21  # tokens of the longest caption, to which the SD3-shaped base's are cut: the rest would be padding
BASE_OPTIONS = {"sd15": {"noise_offset": NOISE_OFFSET}, "sd3": {"max_sequence_length": 1}}  # of train.py, on each base; no T5 is there


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


def assemble_sd3(vae: AutoencoderKL, text_encoder: CLIPTextModel, transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline of these parts, without T5. SD3 reads its encoders' last layer but one: the first shows
    it the text encoder's first layer, the second, which has one more that changes nothing, its last."""
    vae.register_to_config(shift_factor=0.0)
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = WORDS
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, with_projection(text_encoder), tokenizer,
                                    with_projection(text_encoder, more_layers=1), tokenizer, None, None)


def with_projection(encoder: CLIPTextModel, more_layers: int = 0) -> CLIPTextModelWithProjection:
    """The text encoder with an identity for a projection, and with further layers that change nothing."""
    width, layers = encoder.config.hidden_size, encoder.config.num_hidden_layers
    longer = CLIPTextModelWithProjection(text_config(width, layers + more_layers))
    prefixed = {"text_model." + name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    longer.load_state_dict(prefixed, strict=False)
    nn.init.eye_(longer.text_projection.weight)
    for parameter in longer.text_model.encoder.layers[layers:].parameters():
        nn.init.zeros_(parameter)
    return longer.eval()


def base_pipeline(folder: str | os.PathLike | None = None, kind: str = "sd15") -> Path:
    """A trained base, "sd15" or "sd3", as a diffusers folder in float32 (native resolution 32); made from the shipped float16
    weights on the first call and when those change. folder: by default OPENED[kind]. Raises UserError where the weights are
    not there."""
    folder = Path(folder or OPENED[kind])
    parts = [(AutoencoderKL, SHIPPED / "vae"), (CLIPTextModel, SHIPPED / "text_encoder"), NETWORKS[kind]]
    weights = sorted(path for _, part in parts for path in part.glob("*.safetensors"))
    if len(weights) != len(parts):
        raise UserError(f"the base's weights are not in {SHIPPED} and {NETWORKS[kind][1]}: bash scripts/build_base.sh "
                        f"{kind} makes them")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    stamp = folder / "made_from"
    if not stamp.is_file() or stamp.read_text() != digest:
        build = assemble if kind == "sd15" else assemble_sd3
        build(*(cls.from_pretrained(part).float() for cls, part in parts)).save_pretrained(folder)
        stamp.write_text(digest)
    return folder


def open_base(kind: str = "sd15", folder: str | os.PathLike | None = None) -> DiffusionPipeline:
    """base_pipeline's folder, opened; diffusers has to be told that there is no T5."""
    absent = {"sd15": {}, "sd3": {"text_encoder_3": None, "tokenizer_3": None}}
    return DiffusionPipeline.from_pretrained(base_pipeline(folder, kind), **absent[kind])


def draw_images(pipeline: DiffusionPipeline, prompts: list[str], first_seed: int = 0,
                num_inference_steps: int = 30, guidance_scale: float = GUIDANCE_SCALE,
                batch_size: int = 50) -> list[Image.Image]:
    """One image a prompt, by DDIM or along the flow; image i starts from the noise of seed first_seed + i, whatever the batch
    size."""
    flow, own = isinstance(pipeline, StableDiffusion3Pipeline), pipeline.scheduler
    if not flow:
        pipeline.scheduler = DDIMScheduler.from_config(own.config)
    settings = {"max_sequence_length": BASE_OPTIONS["sd3"]["max_sequence_length"]} if flow else {}
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size]
        noise = [torch.Generator().manual_seed(first_seed + start + index) for index in range(len(batch))]
        images += pipeline(batch, generator=noise, num_inference_steps=num_inference_steps,
                           guidance_scale=guidance_scale, **settings).images
    pipeline.scheduler = own
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
