"""LoRA adapters: finding one, merging it into a network, and what its file says of the base that it was trained on."""

import json
import logging
import math
import os
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from common.errors import UserError, first_line, warn
from common.train_options import ModelOptions
from models.family import Family
from models.quantize import is_quantized
from models.weights import unsharded

LORA_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "lora_comfyui.safetensors"  # the same, as for_comfyui() names it
OTHER_BASE = "Is it a checkpoint of another base model?"
ADAPTER = "lora_adapter_metadata"  # diffusers' own entry of a file's metadata
FACTS = ("base", "unet_init", "family", "rank", "alpha", "run")  # what a run adds to its adapter's metadata, besides:
BASE_WEIGHTS = "base_weights"
SAMPLED_WEIGHTS = 32
ROUNDING = 2.0**-8  # twice what rounding to bf16 changes of a weight
SMALLEST = 1e-7  # what fp16 cannot hold
logging.getLogger("diffusers.loaders").setLevel(logging.CRITICAL)  # it prints what merge_lora() raises, on hundreds of lines


def is_lora(keys) -> bool:
    return any("lora" in key for key in keys)


def lora_file(path: str | os.PathLike) -> Path | None:
    """The LoRA weights file that `path` names: the file itself, or a folder with pytorch_lora_weights.safetensors or
    with a single .safetensors file of LoRA keys and no config.json."""
    path = Path(path)
    if path.is_dir():
        if (path / LORA_FILE).is_file():
            return path / LORA_FILE
        weights = list(path.glob("*.safetensors"))
        return lora_file(weights[0]) if len(weights) == 1 and not (path / "config.json").is_file() else None
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt") as handle:
                return path if is_lora(handle.keys()) else None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file ({first_line(error)}): download it again") from None
    return None


# --- what an adapter's file says -----------------------------------------------------------------------------------------

def read_metadata(source: str | os.PathLike) -> dict[str, str]:
    """A safetensors file's metadata; {} where there is none."""
    try:
        with safe_open(source, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def adapter_metadata(source: str | os.PathLike) -> dict | None:
    """What diffusers keeps of an adapter in its file: rank, alpha and targets; None where it says nothing."""
    try:
        return json.loads(read_metadata(source)[ADAPTER])
    except (KeyError, ValueError, RecursionError):
        return None


def read_facts(source: str | os.PathLike) -> dict[str, str]:
    """What the run that trained an adapter wrote of it (FACTS) besides the base's weights; {} for others' adapters."""
    metadata = read_metadata(source)
    return {name: metadata[name] for name in FACTS if name in metadata} if BASE_WEIGHTS in metadata else {}


def rank_of(file: str | os.PathLike) -> int:
    """An adapter's rank, the largest where its layers have several."""
    with safe_open(file, framework="pt") as handle:
        shapes = [handle.get_slice(key).get_shape() for key in handle.keys() if "lora" in key]
    return max(min(shape[:2]) for shape in shapes if len(shape) > 1)


def facts_of(family: Family, network: torch.nn.Module, options: ModelOptions, run: dict) -> dict[str, str]:
    """The facts of an adapter in training, for its file. run: which one it is."""
    config = network.peft_config["default"]
    return {"base": options.pretrained_model_name_or_path, "unet_init": options.unet_init or "", "family": family.name,
            "rank": str(config.r), "alpha": f"{config.lora_alpha:g}", "run": json.dumps(run),
            BASE_WEIGHTS: json.dumps(sample_weights(network))}


def sample_weights(network: torch.nn.Module) -> dict[str, float]:
    """Some single weights of a network, by name, without those of an adapter. They tell one trained base from another
    wherever it lies, in every file format and precision, which neither a name nor a file's digest does. Of a quantised base
    norms and biases, which are as they were. A collective call where it is sharded."""
    quantized = is_quantized(network)
    named = {name.replace(".base_layer", ""): parameter for name, parameter in network.named_parameters()
             if "lora_" not in name and (type(parameter) is torch.nn.Parameter if quantized else parameter.dim() > 1)}
    names = sorted(named)
    chosen = names[::max(1, len(names) // SAMPLED_WEIGHTS)][:SAMPLED_WEIGHTS]
    return {name: float(unsharded(named[name].detach()).flatten()[named[name].numel() // 2]) for name in chosen}


def is_on_own_base(network: torch.nn.Module, told: dict) -> bool:
    """Whether a network, without an adapter, has the weights that an adapter's file names, up to rounding."""
    own = dict(network.named_parameters())
    for name, value in told.items():
        if name not in own or not isinstance(value, (int, float)):
            return False
        weight = own[name].detach().flatten()
        if not math.isclose(float(weight[len(weight) // 2]), value, rel_tol=ROUNDING, abs_tol=SMALLEST):
            return False
    return True


def check_base(family: Family, network: torch.nn.Module, source: str | os.PathLike) -> None:
    """Warn where an adapter's file says that it was trained on other weights than the network's. Raises UserError where
    they are another family's."""
    facts = read_facts(source)
    if not facts:
        return
    if facts.get("family") not in (None, family.name):
        raise UserError(f"the LoRA weights {source} are of a {facts['family']} base, and {family.label} is none: name the "
                        f"base that they were trained on ({facts.get('base')})")
    try:
        told = json.loads(read_metadata(source)[BASE_WEIGHTS])
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        warn(f"{source} does not say which base it was trained on: its metadata is damaged")
    elif not is_on_own_base(network, told):
        init = f" with the weights {facts['unet_init']}" if facts.get("unet_init") else ""
        warn(f"the LoRA weights {source} were trained on {facts.get('base')}{init}, and the network here has other weights: "
             "its images will be other ones. Name the base that they were trained on")


def for_comfyui(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """An adapter of LORA_FILE as ComfyUI reads it, and of UNets A1111: UNets' layers in Kohya's names, and scale, alpha over
    rank, multiplied in, since they take it for 1 where a file has no alpha of its own."""
    named = {}
    for key, weight in state.items():
        layer, end = key.split(".lora", 1)
        if layer.startswith("unet."):  # lora.down.weight is called lora_down.weight there
            layer = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
            end = end.replace(".", "_", 1)
        named[f"{layer}.lora{end}"] = weight * scale if end.startswith(("_up", "_B")) else weight
    return named


# --- putting one in ------------------------------------------------------------------------------------------------------

def merge_lora(family: Family, network: torch.nn.Module, state: dict[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Add LoRA weights (diffusers' or Kohya's names) onto a network and fuse them, so that it is a plain one again.

    Parts for the text encoders are left out. Warns of another base than the adapter's own. Raises UserError when they do
    not fit, in part or at all.
    """
    check_base(family, network, source)
    alphas, metadata = None, adapter_metadata(source)
    if family.backbone == "unet":
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(state, unet_config=network.config)
    else:
        state = family.pipeline.lora_state_dict(state)
    state = {key: value for key, value in state.items() if not key.startswith(("text_encoder.", "text_encoder_2."))}
    layers = sum(key.endswith((".lora_A.weight", "lora.down.weight")) for key in state)
    try:
        if layers and family.backbone == "unet":
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, network, metadata=None if alphas else metadata)
        elif layers:
            network.load_lora_adapter(state, prefix=family.backbone, metadata=metadata)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the LoRA weights {source} do not fit {family.label} ({first_line(error, 200)}). "
                        f"{OTHER_BASE}") from None
    found = sum(isinstance(module, BaseTunerLayer) for module in network.modules())
    if not layers or found != layers:
        raise UserError(f"the LoRA weights {source} do not fit {family.label}: {found} of their {layers} layers are in it. "
                        f"{OTHER_BASE}")
    network.fuse_lora()
    network.unload_lora()
