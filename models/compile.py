"""torch.compile of a UNet, region by region."""

import torch
import torch._functorch.config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from common.errors import UserError, first_line

REGIONS = (BasicTransformerBlock, ResnetBlock2D)
SELECTIVE_BUDGET = 0.5  # of what a region keeps for the backward pass by itself
SHAPES = 64  # a region is compiled once for each shape it meets: SDXL has about 20, in policy and reference alike


def check_compiler(device: torch.device) -> None:
    """Compile a trivial function, so that a missing compiler is told before anything is loaded. Raises UserError."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # inductor's back ends raise many kinds, each for a tool that this machine lacks
        raise UserError(f"--compile: this machine cannot compile ({type(error).__name__}: {first_line(error)[:200]}); "
                        "drop --compile") from None


def compile_blocks(unet: nn.Module, selective: bool = False) -> None:
    """Compile the repeated blocks of `unet` in place; its state dict and its hooks stay as they are.

    selective: keep half as much for the backward pass, and let the compiler recompute what costs it least.

    The whole graph takes minutes to compile and a shape's change repeats that; the blocks hold nearly all operations and
    take a fraction. Rounding to bf16 stays where eager code has it: fused away, it is kept in policy and reference
    at different places (one has a backward pass), and the margin of equal models scatters by tenths of a logit.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    torch._functorch.config.activation_memory_budget = SELECTIVE_BUDGET if selective else 1.0
    for module in unet.modules():
        if isinstance(module, REGIONS):
            module.compile(dynamic=False, options={"emulate_precision_casts": True})
