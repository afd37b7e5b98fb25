"""What is trained, the policy, and the frozen reference that it is compared with; the reference is exact."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import nn

from common.errors import UserError, first_line, warn
from common.train_options import MemoryOptions, TrainOptions
from models.family import Family
from models.networks import load_network
from models.quantize import is_quantized, quantization_config
from models.speed import check_compiler, compile_blocks, recompute_cheap


@dataclass
class Policy:
    """network is trained: whole, or its LoRA adapter. reference is None where the network with its adapter off serves
    (LoRA) or none is needed (sft)."""

    network: nn.Module
    reference: nn.Module | None
    lora: bool

    @property
    def has_reference(self) -> bool:
        return self.lora or self.reference is not None

    def in_words(self, options: TrainOptions) -> str:
        if not self.lora:
            return "whole network, float32 weights"
        base = options.memory.quantize_base
        return (f"LoRA rank {options.model.lora_rank}, alpha {options.model.lora_alpha:g}"
                + (f", on a base in {base}" if base != "none" else ""))

    @contextmanager
    def as_reference(self, device: torch.device):
        """The network to call for the reference's predictions."""
        if self.reference is not None:
            with on_device(self.reference, device) as reference:  # nothing moves where it is at home there
                yield reference
        else:
            self.network.disable_adapters()
            try:
                yield self.network
            finally:
                self.network.enable_adapters()


class MovingReference:
    """The reference as a float32 exponential moving average of the policy, for --reference_ema.

    The average is kept beside the reference, whose compute weights are rounded: averaging those would lose half of a slow
    movement.
    """

    def __init__(self, policy: Policy, decay: float):
        self.policy, self.decay = policy, decay
        self.average = {name: value.detach().float().clone() for name, value in policy.network.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: average = decay * average + (1 - decay) * policy."""
        for name, value in self.policy.network.named_parameters():
            self.average[name].lerp_(value.detach().float(), 1.0 - self.decay)
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        """Put the average into the reference."""
        for name, value in self.policy.reference.named_parameters():
            value.data.copy_(self.average[name])

    def load(self, average: dict[str, torch.Tensor]) -> None:
        """A checkpoint's average. Raises UserError where it does not fit."""
        if {name: value.shape for name, value in average.items()} != {n: v.shape for n, v in self.average.items()}:
            raise UserError("the checkpoint's reference is of another model: name an earlier one with "
                            "--resume_from_checkpoint")
        for name, value in average.items():
            self.average[name].copy_(value)
        self.show()


def load_policy(family: Family, memory: MemoryOptions, dtype: torch.dtype, device: torch.device, needs_reference: bool,
                resolution: int | None = None) -> Policy:
    """The base's network, or what --unet_init names, as policy and reference. Raises UserError."""
    if memory.compile:
        check_compiler(device)
    quantization = quantization_config(memory.quantize_base, dtype)
    once = quantization or family.options.lora_rank > 0 and family.backbone == "transformer"  # UNets are small: cast below
    network = load_network(family, family.options.unet_init, dtype if once else torch.float32, quantization=quantization)
    family.check_network(network, family.options.unet_init or family.options.pretrained_model_name_or_path)
    if resolution is not None and not family.flow:  # those take any size
        native, side = network.config.sample_size, family.latent_shape(resolution, resolution)[-1]
        if isinstance(native, int) and side != native:
            warn(f"--resolution {resolution} makes latents of {side} a side, and the base was made for {native}: it draws "
                 f"at {resolution * native // side} pixels")
    return make_policy(family, network, memory, dtype, device, needs_reference)


def make_policy(family: Family, network: nn.Module, memory: MemoryOptions, dtype: torch.dtype, device: torch.device,
                needs_reference: bool) -> Policy:
    """The trained network in float32 (LoRA: its frozen base in `dtype`, the adapter in float32) and its exact reference."""
    rank, reference = family.options.lora_rank, None
    if rank:
        network.requires_grad_(False)
        cast_compute_weights(network, dtype)
        add_adapter(network, family)
    elif needs_reference:
        reference = make_reference(network, dtype)
    for name in family.without_gradient(network):
        network.get_submodule(name).requires_grad_(False)
    if memory.selective_checkpointing and not memory.compile:  # a compiler divides its regions itself
        recompute_cheap(network)
    elif (memory.gradient_checkpointing or family.always_checkpoints) and not memory.selective_checkpointing:
        network.enable_gradient_checkpointing()
    if is_quantized(network):  # no data parallelism sends such weights around: they come from one file everywhere
        frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
        network._ddp_params_and_buffers_to_ignore = frozen
    network.train().to(device)
    networks = [network] if reference is None else [network, reference]
    if memory.channels_last:
        for each in networks:
            each.to(memory_format=torch.channels_last)
    if reference is not None:
        keep_on_host(reference, device) if memory.offload_reference else reference.to(device)
    if memory.compile:
        for each in networks:
            compile_blocks(each, family.compiled_blocks, selective=memory.selective_checkpointing)
    return Policy(network, reference, lora=rank > 0)


def add_adapter(network: nn.Module, family: Family) -> None:
    """Put the LoRA that the options describe into a network, in float32. Its B is 0, so the policy equals the reference at
    first, with dropout too: that acts on what A reads. Raises UserError for targets that the network has none of."""
    options = family.options
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha or options.lora_rank,
                        lora_dropout=options.lora_dropout, target_modules=options.lora_targets or family.lora_targets,
                        init_lora_weights="gaussian")
    try:
        network.add_adapter(config)
    except ValueError as error:  # peft's, for a name that no module has or one that is no layer
        raise UserError(f"--lora_targets {' '.join(options.lora_targets)} does not fit {family.label} "
                        f"({first_line(error, 200)}): name layers as {' '.join(family.lora_targets)} does") from None
    cast_training_params(network, torch.float32)


def cast_compute_weights(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convolution and linear weights to `dtype` (quantised ones were loaded so), everything else (norms) to float32, where
    it is already as a rule.

    Under autocast to the same dtype this changes no output bit: autocast would round exactly these weights at each
    use, and runs norms in float32 from float32 weights.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if not is_quantized(network):
                module.to(dtype)
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return network


def make_reference(policy: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy whose predictions equal the policy's bit for bit under the same autocast, at half the memory.

    With a reference cast to bf16 as a whole the margin of two identical models scatters by 0.5 to 5 logits at beta
    5000; with this one it is exactly 0. It stays in training mode as the policy is: diffusers' blocks lay out memory
    differently in evaluation mode, which picks kernels that round differently (a base's dropout is refused).
    """
    reference = copy.deepcopy(policy).requires_grad_(False).train()
    return cast_compute_weights(reference, dtype)


def keep_on_host(module: nn.Module, device: torch.device) -> None:
    """Leave a frozen module's weights on the host, in pinned memory, for on_device to fetch."""
    if device.type == "cuda":
        for parameter in module.parameters():
            parameter.data = parameter.data.pin_memory()


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
