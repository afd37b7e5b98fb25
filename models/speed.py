"""Speed and memory: torch.compile region by region, selective checkpointing, and a CPU's smallest numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from common.errors import UserError, first_line

SELECTIVE_BUDGET = 0.5  # of what a region keeps for the backward pass by itself
SHAPES = 64  # a region is compiled once for each shape it meets: SDXL has about 20, in policy and reference alike

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default}
COSTLY = PRODUCTS | {
    aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default}
WIDE = 4  # a product this many times wider than what it is made of is recomputed: the first of a feed-forward layer


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """On a CPU, numbers below 1e-38 count as 0, and as before afterwards. Where margins saturate, gradients and Adam's moments
    fall that low, which makes a step 3 to 8 times slower and moves no weight."""
    before = bool(torch.tensor([1e-30]) * 1e-10 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def check_compiler(device: torch.device) -> None:
    """Compile a trivial function, so that a missing compiler is told before anything is loaded. Raises UserError."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # inductor's back ends raise many kinds, each for a tool that this machine lacks
        raise UserError(f"--compile: this machine cannot compile ({type(error).__name__}: {first_line(error, 200)}); "
                        "drop --compile") from None


def compile_blocks(network: nn.Module, blocks: tuple[type, ...], selective: bool = False) -> None:
    """Compile the repeated blocks of a network in place; its state dict and its hooks stay as they are.

    selective: keep half as much for the backward pass, and let the compiler recompute what costs it least.

    The whole graph takes minutes to compile and a shape's change repeats that; the blocks hold nearly all operations and
    take a fraction. Rounding to bf16 stays where eager code has it: fused away, it is kept in policy and reference
    at different places (one has a backward pass), and the margin of equal models scatters by tenths of a logit.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    torch._functorch.config.activation_memory_budget = SELECTIVE_BUDGET if selective else 1.0
    for module in network.modules():
        if isinstance(module, blocks):
            module.compile(dynamic=False, options={"emulate_precision_casts": True})


def recompute_cheap(network: nn.Module) -> None:
    """In every block that diffusers can checkpoint, keep the results of COSTLY operations and of nothing else.

    Norms, activations and casts are half of what SD1.5 keeps and next to none of its operations; the feed-forward layers'
    first products are half of what a transformer block would keep. Changes no bit.
    """
    network.enable_gradient_checkpointing(_checkpoint)


def _checkpoint(function, *args):
    return checkpoint(function, *args, use_reentrant=False,
                      context_fn=partial(create_selective_checkpoint_contexts, _keep_costly))


def _keep_costly(context, operation, *args, **kwargs) -> CheckpointPolicy:
    if operation in PRODUCTS:
        width_in, width_out = args[-1].shape
        return CheckpointPolicy.MUST_SAVE if width_out <= WIDE * width_in else CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if operation in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
