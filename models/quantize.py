"""LoRA's frozen base with quantised weights, by diffusers' backends: torchao's int8, bitsandbytes' nf4.

Every linear layer's weight is quantised, as diffusers does where nothing else is said; convolutions, norms and biases not.
The reference is the same quantised weights with the adapter off.
"""

from importlib.util import find_spec

import torch
from torch import nn

from common.errors import UserError, first_line, warn
from common.train_options import TrainOptions
from models.family import Family

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_quantization(options: TrainOptions, family: Family) -> None:
    """Raises UserError for --quantize_base without LoRA, or without what it needs here; before anything is loaded."""
    memory = options.memory
    if memory.quantize_base == "none":
        return
    flag, package = f"--quantize_base {memory.quantize_base}", PACKAGES[memory.quantize_base]
    if not options.model.lora_rank:
        raise UserError(f"{flag} freezes the base: train LoRA on it with --lora_rank, or drop it")
    if find_spec(package) is None:
        raise UserError(f"{flag}: the package {package} is not installed: pip install {package}")
    if memory.quantize_base == "nf4" and not torch.cuda.is_available():
        raise UserError(f"{flag} needs a GPU: on the CPU take int8")
    recomputes = memory.gradient_checkpointing or memory.selective_checkpointing or family.always_checkpoints
    if memory.quantize_base == "int8" and not recomputes:
        warn(f"{flag} without --gradient_checkpointing keeps a {memory.mixed_precision} copy of every layer's weights until "
             "the backward pass, and saves nothing then")


def quantization_config(kind: str, dtype: torch.dtype):
    """What diffusers' from_pretrained takes as quantization_config; None for "none". dtype: computed in. Raises
    UserError."""
    try:
        if kind == "int8":
            from diffusers import TorchAoConfig
            from torchao.quantization import Int8WeightOnlyConfig
            return TorchAoConfig(Int8WeightOnlyConfig())
        if kind == "nf4":
            from diffusers import BitsAndBytesConfig
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=dtype)
    except (ImportError, ValueError, RuntimeError) as error:  # another version than diffusers takes
        raise UserError(f"--quantize_base {kind} cannot be used here ({first_line(error)[:160]}): pip install -U "
                        f"{PACKAGES[kind]}") from None
    return None


def is_quantized(network: nn.Module) -> bool:
    return getattr(network, "is_quantized", False)
