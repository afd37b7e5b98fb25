"""The models of a run: policy, frozen reference, VAE, text encoders; and the reference that is exact."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.options import TrainArguments
from common.errors import UserError, warn
from models.compile import check_compiler, compile_blocks
from models.recompute import recompute_cheap
from models.weights import from_hub, load_unet

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TURBO_TIMESTEPS = (249, 499, 749, 999)
REFINER_TIMESTEPS = 200
REFINER_AESTHETIC_SCORE = 6.0


@dataclass
class Models:
    """policy is trained. reference is None where the policy with its adapter off serves (LoRA) or none is needed (sft).
    tokenizers and text_encoders have one entry for SD1.5 and two for SDXL (one for its refiner); text_encoders and vae
    are empty where a cache replaces them. latent_shape: (C, h, w)."""

    scheduler: DDPMScheduler
    tokenizers: list[CLIPTokenizer]
    text_encoders: list[nn.Module] = field(default_factory=list)
    vae: AutoencoderKL | None = None
    policy: UNet2DConditionModel | None = None
    reference: UNet2DConditionModel | None = None
    scaling_factor: float = 1.0
    latent_shape: tuple[int, int, int] | None = None


def is_turbo(args: TrainArguments) -> bool:
    """By the model's own name, as published; not by the folders that it lies in."""
    return "turbo" in Path(args.pretrained_model_name_or_path).name.lower()


def is_refiner(args: TrainArguments) -> bool:
    return args.sdxl and "refiner" in Path(args.pretrained_model_name_or_path).name.lower()


def load_tokenizers_and_scheduler(args: TrainArguments) -> Models:
    """The small files first, so that a wrong model name is told before gigabytes are read. Raises UserError."""
    base, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    scheduler = from_hub(DDPMScheduler, base, "the scheduler", subfolder="scheduler", **hub)
    if is_turbo(args):
        scheduler = DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"{base} predicts '{scheduler.config.prediction_type}': only epsilon and v_prediction are known")
    subfolders = ["tokenizer_2"] if is_refiner(args) else ["tokenizer", "tokenizer_2"] if args.sdxl else ["tokenizer"]
    tokenizers = [from_hub(CLIPTokenizer, base, "the tokenizer (is --sdxl right for this model?)", subfolder=sub, **hub)
                  for sub in subfolders]
    return Models(scheduler, tokenizers)


def load_frozen_encoders(models: Models, args: TrainArguments, dtype: torch.dtype, device: torch.device) -> None:
    """VAE and text encoders, in the compute dtype, without gradient. Raises UserError."""
    base, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    classes = [("text_encoder_2", CLIPTextModelWithProjection)] if args.sdxl else []
    if not is_refiner(args):
        classes.insert(0, ("text_encoder", CLIPTextModel))
    what = "a text encoder (is --sdxl right for this model?)" if args.sdxl else "the text encoder"
    models.text_encoders = [from_hub(cls, base, what, subfolder=subfolder, torch_dtype=dtype, **hub)
                            .requires_grad_(False).eval().to(device) for subfolder, cls in classes]
    vae_name, where = args.pretrained_vae_model_name_or_path, {"cache_dir": args.cache_dir}
    if vae_name is None:
        vae_name, where = base, hub | {"subfolder": "vae"}
    vae = from_hub(AutoencoderKL, vae_name, "the VAE", torch_dtype=dtype, **where)
    if args.sdxl and dtype == torch.float16 and vae.config.force_upcast:
        warn("this VAE overflows in fp16 and is kept in float32; --pretrained_vae_model_name_or_path "
             "madebyollin/sdxl-vae-fp16-fix runs in fp16")
        vae = from_hub(AutoencoderKL, vae_name, "the VAE", torch_dtype=torch.float32, **where)
    models.vae = vae.requires_grad_(False).eval().to(device)
    side = args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    models.latent_shape = (vae.config.latent_channels, side, side)
    models.scaling_factor = vae.config.scaling_factor


def load_policy_and_reference(models: Models, args: TrainArguments, dtype: torch.dtype, device: torch.device) -> None:
    """The base's UNet as policy and reference. Raises UserError."""
    if args.compile:
        check_compiler(device)
    policy = load_unet(args.pretrained_model_name_or_path, args.unet_init, revision=args.revision,
                       cache_dir=args.cache_dir)
    check_conditioning(policy, args)
    native, side = policy.config.sample_size, models.latent_shape[-1] if models.latent_shape else None
    if isinstance(native, int) and side not in (native, None):
        warn(f"--resolution {args.resolution} makes latents of {side} a side, and the base's UNet was made for {native}: it "
             f"draws at {args.resolution * native // side} pixels")
    set_up_policy_and_reference(models, policy, args, dtype, device)


def set_up_policy_and_reference(models: Models, policy: UNet2DConditionModel, args: TrainArguments, dtype: torch.dtype,
                                device: torch.device) -> None:
    """The trained UNet in float32 (LoRA: its frozen base in `dtype`, the adapter in float32) and its exact reference."""
    if args.lora_rank:
        policy.requires_grad_(False)
        cast_compute_weights(policy, dtype)
        policy.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, init_lora_weights="gaussian",
                                      target_modules=LORA_TARGETS))
        cast_training_params(policy, torch.float32)
    elif args.needs_reference:
        models.reference = make_reference(policy, dtype)
    if args.selective_checkpointing and not args.compile:  # a compiler divides its regions itself
        recompute_cheap(policy)
    elif (args.gradient_checkpointing or args.sdxl) and not args.selective_checkpointing:
        policy.enable_gradient_checkpointing()
    models.policy = policy.train().to(device)
    if args.channels_last:
        for unet in filter(None, (policy, models.reference)):
            unet.to(memory_format=torch.channels_last)
    if models.reference is not None:
        keep_on_host(models.reference, device) if args.offload_reference else models.reference.to(device)
    if args.compile:
        for unet in filter(None, (policy, models.reference)):
            compile_blocks(unet, selective=args.selective_checkpointing)


def check_conditioning(unet: UNet2DConditionModel, args: TrainArguments) -> None:
    is_sdxl = unet.config.addition_embed_type == "text_time"
    if is_sdxl != args.sdxl:
        raise UserError(f"{args.pretrained_model_name_or_path} is {'an SDXL' if is_sdxl else 'no SDXL'} model: "
                        f"{'add' if is_sdxl else 'drop'} --sdxl")
    if unet.config.get("dropout"):
        raise UserError(f"{args.pretrained_model_name_or_path} has dropout {unet.config.dropout}: policy and reference "
                        "would differ by chance; set it to 0 in unet/config.json")


def cast_compute_weights(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convolution and linear weights to `dtype`, everything else (norms) stays float32.

    Under autocast to the same dtype this changes no output bit: autocast would round exactly these weights at each
    use, and runs norms in float32 from float32 weights.
    """
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return unet


def make_reference(policy: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """A frozen copy whose predictions equal the policy's bit for bit under the same autocast, at half the memory.

    With a reference cast to bf16 as a whole the margin of two identical models scatters by 0.5 to 5 logits at beta
    5000; with this one it is exactly 0. It stays in training mode as the policy is: diffusers' blocks lay out memory
    differently in evaluation mode, which picks kernels that round differently (no dropout is at stake: refused).
    """
    reference = copy.deepcopy(policy).requires_grad_(False).train()
    return cast_compute_weights(reference, dtype)


def keep_on_host(module: nn.Module, device: torch.device) -> None:
    """Leave a frozen module's weights on the host, in pinned memory, for on_device to fetch."""
    for parameter in module.parameters():
        parameter.data = parameter.data.pin_memory() if device.type == "cuda" else parameter.data


@contextmanager
def on_device(module: nn.Module, device: torch.device):
    """A frozen module's weights on the device for a moment; what was fetched is dropped, never copied back."""
    home = {parameter: parameter.data for parameter in module.parameters() if parameter.device != device}
    for parameter in home:
        parameter.data = parameter.data.to(device, non_blocking=True)
    try:
        yield module
    finally:
        for parameter, data in home.items():
            parameter.data = data


@contextmanager
def adapters_off(unet: UNet2DConditionModel):
    """The policy without its LoRA, which is the reference."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()
