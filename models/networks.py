"""The trained network of a base, with weights of every kind put in: unet.pth, .safetensors, a diffusers folder, a hub id,
LoRA on top of the base."""

import json
import os
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from common.errors import UserError, first_line
from models.family import Family
from models.weights import from_hub, load_strictly, read_state_dict

LORA_FILE = "pytorch_lora_weights.safetensors"
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
OTHER_BASE = "Is it a checkpoint of another base model?"
BASE_SETTINGS = ("cross_attention_dim", "addition_embed_type", "in_channels", "projection_class_embeddings_input_dim",
                 "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "cap_feat_dim")


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
            raise UserError(f"{path} is damaged or no safetensors file: {first_line(error)}") from None
    return None


def merge_lora(family: Family, network: torch.nn.Module, state: dict[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Add LoRA weights (diffusers' or Kohya's names) onto a network and fuse them, so that it is a plain one again.

    Parts for the text encoders are left out. Raises UserError when they do not fit, in part or at all.
    """
    alphas, metadata = None, adapter_metadata(source)
    if family.backbone == "unet":
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(state, unet_config=network.config)
    else:
        state = family.pipeline.lora_state_dict(state)
    state = {key: value for key, value in state.items() if not key.startswith(("text_encoder.", "text_encoder_2."))}
    layers = sum(key.endswith((".lora_A.weight", "lora.down.weight", "_lora.down.weight")) for key in state)
    try:
        if layers and family.backbone == "unet":
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, network, metadata=None if alphas else metadata)
        elif layers:
            network.load_lora_adapter(state, prefix=family.backbone, metadata=metadata)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the LoRA weights {source} do not fit {family.label}: {first_line(error)[:300]}") from None
    found = sum(isinstance(module, BaseTunerLayer) for module in network.modules())
    if not layers or found != layers:
        raise UserError(f"the LoRA weights {source} do not fit {family.label}: {found} of their {layers} layers are in it. "
                        f"{OTHER_BASE}")
    network.fuse_lora()
    network.unload_lora()


def adapter_metadata(source: str | os.PathLike) -> dict | None:
    """What diffusers keeps of an adapter in its file: rank, alpha and targets; None where it says nothing."""
    try:
        with safe_open(source, framework="pt") as handle:
            return json.loads((handle.metadata() or {})["lora_adapter_metadata"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def check_same_base(family: Family, network: torch.nn.Module, source: str) -> None:
    """Raise UserError when a whole network is not one for the family's base, whose text and latents it must fit."""
    options = family.options
    try:
        config = family.network.load_config(options.pretrained_model_name_or_path, subfolder=family.backbone,
                                            revision=options.revision, cache_dir=options.cache_dir)
    except (OSError, ValueError):
        return  # whoever needs the base says so when loading it
    for name in BASE_SETTINGS:
        own, expected = network.config.get(name), config.get(name)
        if own != expected:
            raise UserError(f"{source} does not fit {options.pretrained_model_name_or_path}: its {name} is {own}, not "
                            f"{expected}. {OTHER_BASE}")


def read_init(progress: Path) -> str | None:
    """--unet_init of the run that wrote this progress.json."""
    try:
        init = json.loads(progress.read_text(encoding="utf-8"))["settings"].get("unet_init")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{progress} is damaged") from None
    return init if isinstance(init, str) else None


def weights_in(folder: Path, backbone: str = "unet") -> Path | None:
    """What load_network reads of a folder: a diffusers network's folder, a checkpoint's whole weights, or LoRA weights, in
    this order, because the first two of a LoRA run hold its merged model."""
    if (folder / backbone).is_dir():
        return folder / backbone
    if (folder / "config.json").is_file():
        return folder
    whole = folder / ("unet.pth" if backbone == "unet" else f"{backbone}.safetensors")
    return whole if whole.is_file() else lora_file(folder)


def load_network(family: Family, source: str | os.PathLike | None = None,
                 dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network of the family's base, with the weights that `source` names put in.

    source: None or "base" (the base itself); a unet.pth; a .safetensors state dict; a diffusers folder, with or without
    unet/; a hub id; LoRA weights (a file, or a folder that holds one) that are merged into the base. dtype: of the
    weights, which are read in no other unless LoRA has to be merged, in float32. Raises UserError naming the key and
    shape of what does not fit.
    """
    path = None if source is None or str(source) == "base" else Path(source)
    init = None  # what LoRA weights are merged into, where it is not the base
    if path is not None and path.is_dir():
        found = weights_in(path, family.backbone)
        if found is None or found.is_dir():
            return open_network(family, found or path, dtype)
        if lora_file(found) and (path / "progress.json").is_file():  # a checkpoint of a LoRA run
            init = read_init(path / "progress.json")
        path = found
    if path is not None and not path.exists() and path.suffix not in WEIGHT_FILES:
        return _from_hub_id(family, str(source), dtype)  # a pipeline, a bare network or LoRA

    options = family.options
    state = None if path is None else read_state_dict(lora_file(path) or path)
    merged = state is not None and is_lora(state)
    first = torch.float32 if merged else dtype
    network = load_network(family, init, first) if init else from_hub(
        family.network, options.pretrained_model_name_or_path, f"the {family.backbone}", subfolder=family.backbone,
        revision=options.revision, cache_dir=options.cache_dir, torch_dtype=first)
    if merged:
        merge_lora(family, network, state, lora_file(path) or path)
    elif state is not None:
        load_strictly(network, state, path, OTHER_BASE)
    return network if first == dtype else network.to(dtype)


def open_network(family: Family, name: str | os.PathLike, dtype: torch.dtype, **where) -> torch.nn.Module:
    """A diffusers network, of a folder or the hub, that is one for the family's base. Raises UserError."""
    what = f"the {family.backbone}"
    kind = from_hub(family.network, name, what, method="load_config", **where).get("_class_name")
    if kind != family.network.__name__:
        raise UserError(f"{name} is a {kind}, and {family.label} takes a {family.network.__name__}")
    network = from_hub(family.network, name, what, torch_dtype=dtype, **where)
    check_same_base(family, network, str(name))
    return network


def _from_hub_id(family: Family, name: str, dtype: torch.dtype) -> torch.nn.Module:
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    cache_dir = family.options.cache_dir
    try:
        for filename, subfolder in ((f"{family.backbone}/config.json", family.backbone), ("config.json", None)):
            try:
                hf_hub_download(name, filename, cache_dir=cache_dir)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            return open_network(family, name, dtype, subfolder=subfolder, cache_dir=cache_dir)
        weights = [file for file in list_repo_files(name) if file.endswith(".safetensors")]
        filename = LORA_FILE if LORA_FILE in weights else weights[0] if len(weights) == 1 else None
        path = hf_hub_download(name, filename, cache_dir=cache_dir) if filename else None
    except LocalEntryNotFoundError as error:
        raise UserError(f"no file or folder {name} here, and the hub cannot be reached for it "
                        f"({first_line(error)[:120]})") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"no file or folder {name} here, and the hub does not give it "
                        f"({first_line(error)[:160]})") from None
    if path is None:
        raise UserError(f"the hub's {name} holds neither a {family.backbone} nor one file of LoRA weights ({LORA_FILE})")
    network = load_network(family)
    merge_lora(family, network, read_state_dict(path), path)
    return network.to(dtype)
