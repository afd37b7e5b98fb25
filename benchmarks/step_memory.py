"""The memory of a training step, counted with tensors that have shapes but no content; see benchmarks/memory.py."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from benchmarks.models import RESOLUTIONS, TEXT_ENCODERS, VAES, make_family, make_unet, network_inputs
from common.train_checks import parse_options
from common.train_options import MemoryOptions, TrainOptions
from models.family import Family
from models.speed import recompute_cheap
from models.stable_diffusion import StableDiffusion15
from training.defaults import settle_defaults

GIB = 2.0**30
MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0.02}  # a parameter; Adafactor keeps rows and columns


@dataclass
class Setting:
    """A row of the table: train.py's flags, from which optimizer, checkpointing and all else follow."""

    model: str
    flags: str = ""
    official: bool = False

    def __str__(self) -> str:
        return "official" if self.official else self.flags or "(none)"

    def options(self) -> TrainOptions:
        options = parse_options([f"--pretrained_model_name_or_path={self.model}", "--dataset_name=none", *self.flags.split()])
        settle_defaults(options, make_family(self.model, options.model))
        return options


class LiveBytes(TorchDispatchMode):
    """live: bytes of all storages that operations inside have made and that still exist; peak: their maximum.

    outside: tensors that were there before; an operation that writes into one, or views it, makes nothing.
    """

    def __init__(self, outside: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in outside)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # two of three calls, and nothing is made
            return args[0].fake_device
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


def storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a quantised weight; others as they are."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from storages(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def gib(tensors: Iterable[torch.Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in storages(tensors)) / GIB


@contextmanager
def as_on_a_gpu():
    """What CUDA's autocast does and the CPU's does not: norms in float32, attention in bf16 (so by flash attention)."""
    def norm(function):
        return lambda input, *args, **kwargs: function(input.float(), *args, **kwargs)

    def attend(query, key, value, **kwargs):
        return attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), **kwargs)

    attention = F.scaled_dot_product_attention
    with mock.patch.multiple(F, group_norm=norm(F.group_norm), layer_norm=norm(F.layer_norm), rms_norm=norm(F.rms_norm),
                             scaled_dot_product_attention=attend):
        yield


def halve(network: nn.Module, kinds: tuple[type, ...] = (nn.Conv2d, nn.Linear)) -> nn.Module:
    """What make_reference and LoRA do to a UNet's weights, for tensors without content; kinds: of which modules."""
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, kinds):
            for name, parameter in list(module.named_parameters(recurse=False)):
                half = torch.empty_like(parameter, dtype=torch.bfloat16)
                setattr(module, name, nn.Parameter(half, requires_grad=False))
    return network


def recompute(unet: nn.Module, family: Family, memory: MemoryOptions) -> None:
    """What make_policy sets up, to keep less for the backward pass."""
    if memory.selective_checkpointing:
        recompute_cheap(unet)
    elif memory.gradient_checkpointing or family.always_checkpoints:
        unet.enable_gradient_checkpointing()


def count_step(setting: Setting, batch: int) -> dict[str, float]:
    """GiB by part of a micro-step of `batch` pairs with gradients already there, as while accumulating."""
    options, samples, side = setting.options(), 2 * batch, RESOLUTIONS[setting.model]
    family, lora = make_family(setting.model, options.model), options.model.lora_rank
    with FakeTensorMode():
        policy = make_unet(setting.model).train()
        if lora:
            halve(policy)
            with mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self):  # not for such tensors
                policy.add_adapter(LoraConfig(r=lora, target_modules=family.lora_targets))
            reference = policy
        else:
            reference = halve(make_unet(setting.model).train())
        recompute(policy, family, options.memory)
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        x_t, times, text = network_inputs(family, samples, side)
        gradients = [parameter.grad for parameter in trainable]
        with LiveBytes([*policy.parameters(), *reference.parameters(), *gradients, x_t, times, *text.values()]) as bytes_, \
                as_on_a_gpu():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                family.predict(reference, x_t, times, text, (side, side))
            reference_peak, bytes_.peak = bytes_.peak, bytes_.live
            # Autocast ends before the backward pass, as accelerate's does.
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=setting.official):
                prediction = family.predict(policy, x_t, times, text, (side, side))
            loss = prediction.float().square().mean()
            kept = bytes_.live
            loss.backward()
        size = {"policy": gib(policy.parameters()), "gradients": gib(trainable)}
        reference_weights = 0.0 if lora else gib(reference.parameters())
    size["moments"] = sum(parameter.numel() for parameter in trainable) * MOMENT_BYTES[options.optimizer.optimizer] / GIB
    offload = options.memory.offload_reference
    in_policy, in_reference = bytes_.peak / GIB, reference_peak / GIB + (reference_weights if offload else 0)
    size["reference"] = 0.0 if offload else reference_weights
    size["encoders"], in_vae = count_encoders(setting.model, samples) if setting.official else (0.0, 0.0)
    total = sum(size.values()) + max(in_policy, in_reference, in_vae)
    return size | {"activations": kept / GIB, "total": total}


def recomputed_share(setting: Setting) -> float:
    """Operations of products, convolutions and attention done again in the backward pass, over a forward pass's."""
    options, counts, side = setting.options(), [], RESOLUTIONS[setting.model]
    family = make_family(setting.model, options.model)
    for prepared in (False, True):
        with torch.device("meta"):
            unet = make_unet(setting.model).train()
            if prepared:
                recompute(unet, family, options.memory)
            x_t, times, text = network_inputs(family, 1, side)
            with FlopCounterMode(display=False) as counter:
                prediction = family.predict(unet, x_t, times, text, (side, side))
                forward = counter.get_total_flops()
                prediction.sum().backward()
        counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / forward


def count_encoders(model: str, images: int) -> tuple[float, float]:
    """GiB of the weights of VAE and text encoders in bf16, and of what encoding the images adds at its highest."""
    side = RESOLUTIONS[model]
    with FakeTensorMode():
        vae = halve(AutoencoderKL.from_config(VAES[model]), (nn.Module,))
        texts = [kind(CLIPTextConfig(**config)) for kind, config in TEXT_ENCODERS[model]]
        pixels = torch.empty(min(images, StableDiffusion15.vae_at_once), 3, side, side, dtype=torch.bfloat16)
        with LiveBytes([pixels, *vae.parameters()]) as bytes_, torch.no_grad():
            vae.encode(pixels)
        weights = sum(parameter.numel() for module in (vae, *texts) for parameter in module.parameters())
    return 2 * weights / GIB, bytes_.peak / GIB


def settings(model: str) -> list[Setting]:
    selective, whole, lora = "--selective_checkpointing", "--gradient_checkpointing", "--lora_rank 16"
    flags = ["", "--offload_reference", selective, lora] if model == "sdxl" else [
        "", selective, whole, f"--use_8bit_adam {selective}", f"--use_8bit_adam {whole} --offload_reference", lora,
        f"{lora} {selective}", f"{lora} {whole}"]
    return [Setting(model, official=True), *(Setting(model, each) for each in flags)]
