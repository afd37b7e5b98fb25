"""Selective checkpointing recomputes what is cheap, and changes no bit."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import make_unet
from common.train_options import parse_arguments
from common.errors import UserError
from models.recompute import recompute_cheap


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step(prepare) -> tuple[torch.Tensor, list[torch.Tensor], Counter]:
    """The prediction, the gradients, and what the backward pass calls."""
    torch.manual_seed(0)
    unet = make_unet("tiny").train()
    prepare(unet)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, 32)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        prediction = unet(*inputs).sample
    with Calls() as calls:
        prediction.float().square().mean().backward()
    return prediction, [parameter.grad for parameter in unet.parameters()], calls.count


def test_costly_operations_run_once_and_no_bit_changes():
    prediction, gradients, plain = step(lambda unet: None)
    selective_prediction, selective_gradients, selective = step(recompute_cheap)
    _, _, full = step(lambda unet: unet.enable_gradient_checkpointing())
    assert torch.equal(prediction, selective_prediction)
    assert all(map(torch.equal, gradients, selective_gradients))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert plain["convolution"] == plain["native_group_norm"] == plain[attention] == 0
    assert selective["convolution"] == selective[attention] == 0 < min(full["convolution"], full[attention])
    assert selective["native_group_norm"] > 0 and selective["gelu"] > 0
    transformer_blocks = sum(type(module).__name__ == "GEGLU" for module in make_unet("tiny").modules())
    assert selective["addmm"] == transformer_blocks  # their first feed-forward product, and no other


def test_it_does_not_go_with_two_backward_passes():
    with pytest.raises(UserError, match="parameter does not go with --selective_checkpointing"):
        parse_arguments(["--pretrained_model_name_or_path=base", "--train_data_dir=pairs", "--use_winner_preserving",
                         "--winner_preserving_space=parameter", "--selective_checkpointing"])
