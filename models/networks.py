"""The trained network of a base, with weights of every kind put in: unet.pth, .safetensors, a diffusers folder, a hub id,
LoRA on top of the base."""

import os
from pathlib import Path

import torch

from common.errors import UserError, first_line
from common.files import read_json
from models.family import Family
from models.lora import LORA_FILE, OTHER_BASE, is_lora, lora_file, merge_lora, rank_of, read_facts
from models.weights import from_hub, load_strictly, read_state_dict

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
BASE_SETTINGS = ("cross_attention_dim", "addition_embed_type", "in_channels", "projection_class_embeddings_input_dim",
                 "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "cap_feat_dim")


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
    content = read_json(progress)
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise UserError(f"{progress} is damaged: name the weights file itself")
    init = content["settings"].get("unet_init")
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


def merged_into(source: Path, file: Path) -> str | None:
    """What the LoRA weights of `file` are merged into, where it is not the base: the --unet_init of their run. Its checkpoint's
    folder `source` says so, or the file, where that is still there; merge_lora warns where it is missed."""
    init = read_init(source / "progress.json") if (source / "progress.json").is_file() else None
    told = read_facts(file).get("unet_init")
    return init or (told if told and Path(told).exists() else None)


def what_is_loaded(family: Family, source: str) -> str:
    """What load_network loads of `source`, in words."""
    base, path = family.options.pretrained_model_name_or_path, Path(source)
    if source == "base":
        return f"the base {base}"
    found = (weights_in(path, family.backbone) or path) if path.is_dir() else path
    if not found.exists():
        return f"the hub's {source}, for {base}"
    if found.is_file() and lora_file(found):
        init = merged_into(path, found)
        return f"LoRA of rank {rank_of(found)} ({found}) on " + (f"{init}, of {base}" if init else str(base))
    return f"{'weights' if found.suffix in ('.pt', '.bin') else 'whole network'} of {found}"


def load_network(family: Family, source: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32,
                 inside: tuple[Path, ...] = (), quantization=None) -> torch.nn.Module:
    """The network of the family's base, with the weights that `source` names put in.

    source: None or "base" (the base itself); a unet.pth; a .safetensors state dict; a diffusers folder, with or without
    unet/; a hub id; LoRA weights (a file, or a folder that holds one) that are merged into the base, or into the
    --unet_init of the run that trained them. dtype: of the weights, which are read in no other unless LoRA has to be
    merged, in float32. inside: the adapters whose --unet_init this is. quantization: diffusers' configuration of it, for a
    base or a diffusers folder. Raises UserError naming the key and shape of what does not fit.
    """
    path = None if source is None or str(source) == "base" else Path(source)
    if path in inside:
        raise UserError(f"{path} names itself as the weights that it was trained on: merge it into its base by hand")
    if path is not None and path.is_dir():
        found = weights_in(path, family.backbone)
        if found is None or found.is_dir():
            return open_network(family, found or path, dtype, quantization)
        path = found
    if path is not None and not path.exists() and path.suffix not in WEIGHT_FILES:
        return _from_hub_id(family, str(source), dtype, quantization)  # a pipeline, a bare network or LoRA

    options = family.options
    if path is not None and quantization is not None:
        raise _not_quantized(source)
    state = None if path is None else read_state_dict(path)
    merged = state is not None and is_lora(state)
    first = torch.float32 if merged else dtype
    init = merged_into(Path(source), path) if merged else None
    network = load_network(family, init, first, (*inside, Path(source))) if init else from_hub(
        family.network, options.pretrained_model_name_or_path, f"the {family.backbone}", subfolder=family.backbone,
        revision=options.revision, cache_dir=options.cache_dir, torch_dtype=first, quantization_config=quantization)
    if merged:
        merge_lora(family, network, state, path)
    elif state is not None:
        load_strictly(network, state, path, OTHER_BASE)
    return network if first == dtype else network.to(dtype)


def _not_quantized(source) -> UserError:
    return UserError(f"--quantize_base takes a base or a diffusers folder, and {source} holds a state dict or LoRA weights: "
                     "leave a pipeline of it first (--merge_lora), or drop --quantize_base")


def open_network(family: Family, name: str | os.PathLike, dtype: torch.dtype, quantization=None, **where) -> torch.nn.Module:
    """A diffusers network, of a folder or the hub, that is one for the family's base. Raises UserError."""
    what = f"the {family.backbone}"
    kind = from_hub(family.network, name, what, method="load_config", **where).get("_class_name")
    if kind != family.network.__name__:
        raise UserError(f"{name} is a {kind}, and {family.label} takes a {family.network.__name__}")
    network = from_hub(family.network, name, what, torch_dtype=dtype, quantization_config=quantization, **where)
    check_same_base(family, network, str(name))
    return network


def _from_hub_id(family: Family, name: str, dtype: torch.dtype, quantization=None) -> torch.nn.Module:
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
            return open_network(family, name, dtype, quantization, subfolder=subfolder, cache_dir=cache_dir)
        weights = [file for file in list_repo_files(name) if file.endswith(".safetensors")]
        filename = LORA_FILE if LORA_FILE in weights else weights[0] if len(weights) == 1 else None
        path = hf_hub_download(name, filename, cache_dir=cache_dir) if filename else None
    except LocalEntryNotFoundError as error:
        raise UserError(f"no file or folder {name} here, and the hub cannot be reached for it "
                        f"({first_line(error, 120)})") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"no file or folder {name} here, and the hub does not give it "
                        f"({first_line(error, 160)})") from None
    if path is None:
        raise UserError(f"the hub's {name} holds neither a {family.backbone} nor one file of LoRA weights ({LORA_FILE})")
    if quantization is not None:
        raise _not_quantized(name)
    network = load_network(family)
    merge_lora(family, network, read_state_dict(path), path)
    return network.to(dtype)
