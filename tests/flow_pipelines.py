"""Tiny untrained pipelines of the flow-matching families, of the real classes; 32 pixels are 16 latents or 64 tokens a side."""

import string
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, FluxPipeline,
                       FluxTransformer2DModel, QwenImagePipeline, QwenImageTransformer2DModel, SD3Transformer2DModel,
                       StableDiffusion3Pipeline, ZImagePipeline, ZImageTransformer2DModel)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel,
                          T5TokenizerFast)

BYTES = sorted(ByteLevel.alphabet())
TEMPLATE = ("{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_flow_pipeline(folder: Path, kind: str) -> Path:
    """Write a pipeline of one of KINDS into `folder`."""
    torch.manual_seed(0)
    pipeline = KINDS[kind]()
    with torch.no_grad():  # untrained norms' ones and zeros would survive any rounding
        for parameter in pipeline.transformer.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn_like(parameter)
    pipeline.save_pretrained(folder)
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *BYTES, *(letter + "</w>" for letter in BYTES)]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    letters = string.ascii_letters + string.digits + string.punctuation
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=special + [(letter, -3.0) for letter in letters], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    words = {word: number for number, word in enumerate(["<|endoftext|>", *BYTES])}
    tokenizer = Qwen2Tokenizer(vocab=words, merges=[], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=514, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
                          projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=77,
                          hidden_act="quick_gelu")


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
                                   feed_forward_proj="gated-gelu", tie_word_embeddings=False))


def kl_vae(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    return AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                         block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
                         use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scaling_factor, shift_factor=shift_factor)


def sd3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=32, qk_norm="rms_norm",
        dual_attention_layers=(0,))
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), kl_vae(1.5305, 0.0609),
        CLIPTextModelWithProjection(clip_config()), clip_tokenizer(), CLIPTextModelWithProjection(clip_config()),
        clip_tokenizer(), t5(64) if with_t5 else None, t5_tokenizer() if with_t5 else None)


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(scheduler, kl_vae(0.3611, 0.1159), CLIPTextModel(clip_config()), clip_tokenizer(), t5(32), t5_tokenizer(),
                        transformer)


def qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    last = len(tokenizer) - 1
    transformer = QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                                              num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
                                 latents_mean=[0.1, 0.2, -0.1, 0.0], latents_std=[1.5, 1.2, 0.9, 1.0])
    text = dict(vocab_size=last + 1, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]))
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=last, video_token_id=last,
                              vision_start_token_id=last, vision_end_token_id=last)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9,
                                                max_image_seq_len=8192, shift_terminal=0.02)
    return QwenImagePipeline(scheduler, vae, Qwen2_5_VLForConditionalGeneration(config), tokenizer, transformer)


def z_image() -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32])
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), kl_vae(0.3611, 0.1159), Qwen3Model(config), tokenizer,
                          transformer)


KINDS = {"sd3": sd3, "flux": flux, "qwen_image": qwen_image, "z_image": z_image}
