"""What a LoRA step of the flow-matching families needs of a GPU's memory: their part of benchmarks.memory.

The step is train.py's own, PreferenceTask.loss, on a cached micro-batch without content: noising, the reference's and the
policy's predictions at the published sizes, errors, safeguard and the backward pass.
"""

import warnings
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.flow_models import PUBLISHED, make_flow_family, make_transformer, text_of
from benchmarks.step_memory import GIB, MOMENT_BYTES, LiveBytes, as_on_a_gpu, gib, storages
from common.train_checks import parse_options
from common.train_options import TrainOptions
from models.family import Family
from models.policy import Policy, make_policy
from training.defaults import settle_defaults
from training.preference import PreferenceTask, loss_config

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight: 4 bits, an 8-bit scale per 64, and a float per 256 of those


def step_options(model: str, flags: str) -> tuple[TrainOptions, Family]:
    """train.py's options for the family's Diffusion-DPO with the safeguard, and the family."""
    words = [f"--pretrained_model_name_or_path={PUBLISHED[model]['base']}", "--cached_dataset=none", "--use_winner_preserving",
             *flags.split()]
    options = parse_options(words)
    family = make_flow_family(model, options.model)
    with mock.patch("training.defaults.check_quantization"):  # what a machine has installed does not matter here
        settle_defaults(options, family)
    return options, family


# --- the frozen base without content -------------------------------------------------------------------------------------

class Nf4Memory(torch.autograd.Function):
    """bitsandbytes' product as its memory goes: the weight exists in the compute type only while it is used."""

    @staticmethod
    def forward(ctx, x, shape):
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.shape), None


class Nf4Linear(nn.Linear):
    def forward(self, x):
        product = Nf4Memory.apply(x.bfloat16(), (self.out_features, self.in_features))
        return product if self.bias is None else product + self.bias


def quantize(network: nn.Module, kind: str) -> None:
    """What models.quantize asks diffusers for, done to weights without content."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(network, Int8WeightOnlyConfig())
    elif kind == "nf4":
        for module in network.modules():
            if type(module) is nn.Linear:
                packed = torch.empty(int(module.weight.numel() * NF4_BITS / 8), dtype=torch.uint8)
                module.weight, module.__class__ = nn.Parameter(packed, requires_grad=False), Nf4Linear
    network.is_quantized = kind != "none"


def norms_in_float32(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """cast_compute_weights, for weights that were made in dtype and have no content."""
    for module in network.modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                module._parameters[name] = nn.Parameter(parameter.detach().float(), requires_grad=False)
    return network


def make_lora_policy(model: str, family: Family, options: TrainOptions) -> Policy:
    """make_policy on a base loaded once in bf16, or quantised; inside FakeTensorMode."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = make_transformer(model, family).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    quantize(network, options.memory.quantize_base)
    with (warnings.catch_warnings(action="ignore"),  # peft's, that such weights could not be merged
          mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self),  # not for weights without content
          mock.patch("models.policy.cast_compute_weights", norms_in_float32)):
        return make_policy(family, network, options.memory, torch.bfloat16, torch.device("cpu"), needs_reference=True)


# --- the step ------------------------------------------------------------------------------------------------------------

def cached_batch(family: Family, pairs: int, side: int) -> dict[str, torch.Tensor]:
    """A micro-batch as training/preference.py takes it from a cache."""
    channels, height, width = family.latent_shape(side, side)
    text = {f"text.{name}": rows for name, rows in text_of(family, pairs).items()}
    return text | {"moments": torch.empty(pairs, 2, 2 * channels, height, width, dtype=torch.bfloat16),
                   "vae_noise": torch.empty(pairs, 2, channels, height, width), "timestep": torch.empty(pairs, dtype=torch.float64),
                   "noise": torch.empty(pairs, channels, height, width)}


def make_task(family: Family, policy: Policy, options: TrainOptions) -> PreferenceTask:
    """The task without its data: what loss() reads of it."""
    task = object.__new__(PreferenceTask)
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    task.run = SimpleNamespace(accelerator=accelerator, device=torch.device("cpu"), options=options)
    task.family, task.policy, task.cache, task.results = family, policy, True, []
    task.size = (options.data.resolution, options.data.resolution)
    task.config = loss_config(options.objective, family.name)
    return task


def count_lora_step(model: str, flags: str, pairs: int) -> dict[str, float]:
    """GiB by part of a micro-step, with gradients already there, as while accumulating."""
    options, family = step_options(model, flags)
    full = [family.sequence_length] * (2 * pairs)
    with FakeTensorMode(), as_on_a_gpu(), mock.patch("models.parts.lengths", lambda mask: full):
        policy = make_lora_policy(model, family, options)
        trained = [parameter for parameter in policy.network.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in policy.network.parameters() if not parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        batch, task = cached_batch(family, pairs, options.data.resolution), make_task(family, policy, options)
        there = [*frozen, *trained, *(parameter.grad for parameter in trained), *policy.network.buffers(), *batch.values()]
        with LiveBytes(storages(there)) as bytes_:
            result = task.loss(policy.network, batch)
            kept = bytes_.live
            result.loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        sizes = {"base": gib(frozen), "adapter": gib(trained), "gradients": gib(trained)}
    sizes["moments"] = sum(parameter.numel() for parameter in trained) * MOMENT_BYTES[options.optimizer.optimizer] / GIB
    return sizes | {"activations": kept / GIB, "total": sum(sizes.values()) + bytes_.peak / GIB}


# --- the table -----------------------------------------------------------------------------------------------------------

KINDS = (("none", ""), ("none", "--gradient_checkpointing"), ("int8", "--gradient_checkpointing"),
         ("nf4", "--gradient_checkpointing"))


def print_table(models: list[str], sides: list[int], cards: tuple[int, ...], margin: float) -> None:
    """A row a base, size and setting. What a further pair adds is counted for the base that is not quantised."""
    print("| LoRA on | px | quantised | recomputed | frozen weights | adapter, gradients, moments | 1 pair | each further | "
          + " | ".join(f"fits {card} GB" for card in cards) + " |")
    print("|---|---:|---|---|" + "---:|" * (4 + len(cards)))
    for model in models:
        for side in sides:
            further = {}
            for kind, recompute in KINDS:
                flags = f"--resolution {side} --quantize_base {kind} {recompute}"
                count = count_lora_step(model, flags, 1)
                if recompute not in further:
                    further[recompute] = count_lora_step(model, flags, 2)["total"] - count["total"]
                rooms = [card - margin - count["total"] for card in cards]
                fits = [1 + int(room / further[recompute]) if room >= 0 else "no" for room in rooms]
                cells = [PUBLISHED[model]["base"], side, kind, "all" if recompute else "nothing", f"{count['base']:.1f}",
                         f"{count['adapter'] + count['gradients'] + count['moments']:.1f}", f"{count['total']:.1f}",
                         f"{further[recompute]:.1f}", *fits]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
