"""Selective checkpointing: the costly operations' results are kept for the backward pass, the rest is recomputed in it."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default}
COSTLY = PRODUCTS | {
    aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default}
WIDE = 4  # a product this many times wider than what it is made of is recomputed: the first of a feed-forward layer


def recompute_cheap(unet: nn.Module) -> None:
    """In every block that diffusers can checkpoint, keep the results of COSTLY operations and of nothing else.

    Norms, activations and casts are half of what SD1.5 keeps and next to none of its operations; the feed-forward layers'
    first products are half of what a transformer block would keep. Changes no bit.
    """
    unet.enable_gradient_checkpointing(_checkpoint)


def _checkpoint(function, *args):
    return checkpoint(function, *args, use_reentrant=False,
                      context_fn=partial(create_selective_checkpoint_contexts, _keep_costly))


def _keep_costly(context, operation, *args, **kwargs) -> CheckpointPolicy:
    if operation in PRODUCTS:
        width_in, width_out = args[-1].shape
        return CheckpointPolicy.MUST_SAVE if width_out <= WIDE * width_in else CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if operation in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
