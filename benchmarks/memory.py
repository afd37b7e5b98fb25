"""What a training step needs of a GPU's memory, counted without a GPU.

    python -m benchmarks.memory [--models sd15 sdxl]

The policy's forward and backward and the reference's forward are run on tensors that have shapes and a device but no
content (FakeTensor), under the autocast of training and with flash attention, and every storage that lives is counted,
for 1 and for 2 pairs, from which more follow; weights, gradients and the optimizer's moments are added.

This is a computation, not a measurement: what it leaves out are the CUDA context (about 0.5 GiB), workspaces of the
libraries and fragmentation, which --margin stands for.
"""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import HfArgumentParser

from benchmarks.models import RESOLUTIONS, UNETS, make_unet
from training.arguments import parse_words
from training.errors import UserError, run_program
from training.models import LORA_TARGETS

CARDS = (16, 24, 40, 80)
MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0.02}  # a parameter; Adafactor keeps rows and columns


@dataclass
class Arguments:
    models: list[str] = field(default_factory=lambda: ["sd15", "sdxl"], metadata={"help": "sd15, sdxl, tiny"})
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "pairs in a micro-step"})
    margin: float = field(default=1.5, metadata={"help": "GiB left for the context, workspaces and fragmentation"})


@dataclass
class Setting:
    """A row of the table."""

    model: str
    optimizer: str
    lora: bool = False
    checkpointing: bool = False
    offload: bool = False

    def __str__(self) -> str:
        flags = ["--sdxl" if self.model == "sdxl" else "", "--lora_rank 16" if self.lora else "",
                 "" if self.lora or self.model == "sdxl" else {"adamw8bit": "--use_8bit_adam"}.get(self.optimizer, ""),
                 "--gradient_checkpointing" if self.checkpointing and self.model != "sdxl" else "",
                 "--offload_reference" if self.offload else ""]
        return " ".join(filter(None, flags)) or "published"


class LiveBytes(TorchDispatchMode):
    """live: bytes of all storages that operations inside have made and that still exist; peak: their maximum."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


@contextmanager
def as_on_a_gpu():
    """What CUDA's autocast does and the CPU's does not: norms in float32, attention in bf16 (so by flash attention)."""
    def norm(function):
        return lambda input, *args, **kwargs: function(input.float(), *args, **kwargs)

    def attend(query, key, value, **kwargs):
        return attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), **kwargs)

    attention = F.scaled_dot_product_attention
    with mock.patch.multiple(F, group_norm=norm(F.group_norm), layer_norm=norm(F.layer_norm),
                             scaled_dot_product_attention=attend):
        yield


def halve(unet: nn.Module) -> nn.Module:
    """What make_reference and LoRA do to a UNet's weights, for tensors without content."""
    unet.requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                half = torch.empty_like(parameter, dtype=torch.bfloat16)
                setattr(module, name, nn.Parameter(half, requires_grad=False))
    return unet


def count_step(setting: Setting, batch: int) -> dict[str, float]:
    """GiB by part of a micro-step of `batch` pairs with gradients already there, as while accumulating."""
    config, samples, side = UNETS[setting.model], 2 * batch, RESOLUTIONS[setting.model] // 8
    gib = 2.0**30
    with FakeTensorMode():
        policy = make_unet(setting.model).train()
        if setting.lora:
            halve(policy)
            with mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self):  # not for such tensors
                policy.add_adapter(LoraConfig(r=16, target_modules=LORA_TARGETS))
            reference = policy
        else:
            reference = halve(make_unet(setting.model).train())
        if setting.checkpointing:
            policy.enable_gradient_checkpointing()
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        added = {"text_embeds": torch.empty(samples, 1280), "time_ids": torch.empty(samples, 6)}
        inputs = (torch.empty(samples, 4, side, side), torch.empty(samples, dtype=torch.long),
                  torch.empty(samples, 77, config["cross_attention_dim"]))
        added = added if setting.model == "sdxl" else None
        with LiveBytes() as bytes_, as_on_a_gpu():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                reference(*inputs, added_cond_kwargs=added, return_dict=False)
            reference_peak, bytes_.peak = bytes_.peak, bytes_.live
            with torch.autocast("cpu", torch.bfloat16):  # which ends before the backward pass, as accelerate's does
                prediction = policy(*inputs, added_cond_kwargs=added, return_dict=False)[0]
            loss = prediction.float().square().mean()
            kept = bytes_.live
            loss.backward()
        size = {name: sum(tensor.numel() * tensor.element_size() for tensor in tensors) / gib for name, tensors in (
            ("policy", policy.parameters()), ("reference", [] if setting.lora else reference.parameters()),
            ("gradients", trainable))}
    size["moments"] = sum(parameter.numel() for parameter in trainable) * MOMENT_BYTES[setting.optimizer] / gib
    reference_weights = size.pop("reference")
    weights = size["policy"] + size["gradients"] + size["moments"]
    in_policy, in_reference = bytes_.peak / gib, reference_peak / gib + (reference_weights if setting.offload else 0)
    total = weights + max(in_policy, in_reference) + (0 if setting.offload else reference_weights)
    size["reference"] = 0.0 if setting.offload else reference_weights
    return size | {"activations": kept / gib, "total": total}


def settings(model: str) -> list[Setting]:
    if model == "sdxl":
        return [Setting(model, "adafactor", checkpointing=True),
                Setting(model, "adafactor", checkpointing=True, offload=True),
                Setting(model, "adamw", lora=True, checkpointing=True)]
    return [Setting(model, "adamw"), Setting(model, "adamw", checkpointing=True), Setting(model, "adamw8bit"),
            Setting(model, "adamw8bit", checkpointing=True, offload=True), Setting(model, "adamw", lora=True),
            Setting(model, "adamw", lora=True, checkpointing=True)]


def main() -> None:
    [options] = parse_words(HfArgumentParser(Arguments, prog="python -m benchmarks.memory"))
    if any(model not in UNETS for model in options.models):
        raise UserError(f"--models are {', '.join(UNETS)}")
    print(f"GiB a GPU, computed, bf16, with a cache; fits: pairs in a micro-step with {options.margin} GiB to spare\n")
    print("| model | settings | policy | gradients | moments | reference | "
          + " | ".join(f"total, {batch} pairs" for batch in options.batches) + " | "
          + " | ".join(f"fits {card} GB" for card in CARDS) + " |")
    print("|---|---|" + "---:|" * (4 + len(options.batches) + len(CARDS)))
    for setting in [setting for model in options.models for setting in settings(model)]:
        one, two = count_step(setting, 1), count_step(setting, 2)
        totals = {batch: one["total"] + (batch - 1) * (two["total"] - one["total"]) for batch in options.batches}
        fits = [max((batch for batch, total in totals.items() if total + options.margin <= card), default=0)
                for card in CARDS]
        cells = [setting.model, str(setting),
                 *(f"{one[name]:.1f}" for name in ("policy", "gradients", "moments", "reference")),
                 *(f"{total:.1f}" for total in totals.values()), *(str(fit) if fit else "no" for fit in fits)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_program(main)
