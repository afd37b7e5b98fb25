"""Reading UNet weights of every kind: unet.pth, .safetensors, a diffusers folder, a hub id, LoRA on top of the base."""

import json
import os
import pickle
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from common.errors import UserError, first_line

LORA_FILE = "pytorch_lora_weights.safetensors"
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read a flat state dict from a .safetensors file or a torch file (unet.pth). Nothing is ever unpickled beyond
    tensors and plain containers (weights_only).

    Raises UserError when the file is missing, damaged, or holds anything but a mapping of names to tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: give a unet.pth, a .safetensors file, a diffusers folder or a hub id")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a plain state dict (it asks to run code when loaded, or is damaged); "
                        "it was refused and nothing in it was executed") from None
    except Exception as error:  # torch's reader raises whatever a damaged file makes it stumble over
        raise UserError(f"{path} is damaged or no weights file: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise UserError(f"{path} holds no plain state dict (names to tensors); save one with "
                        "torch.save(unet.state_dict(), 'unet.pth')")
    return state


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Load `state` into `model` with strict=True; what does not fit is reported by key and shape as a UserError."""
    own = model.state_dict()
    faults = [f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]
    faults += [f"unexpected {key} {tuple(state[key].shape)}" for key in state if key not in own]
    faults += [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in state]
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise UserError(f"{source} does not fit this {type(model).__name__} ({shown}). "
                        "Is it a checkpoint of the other base model (SD1.5 or SDXL)?")
    model.load_state_dict(state, strict=True)


def from_hub(model_class, name: str | os.PathLike, what: str, **kwargs):
    """model_class.from_pretrained with its failures told in one line (a wrong path, a hub id without network)."""
    try:
        return model_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, json.JSONDecodeError, SafetensorError, pickle.UnpicklingError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        subfolder = kwargs.get("subfolder")
        where = f"{name} ({subfolder})" if subfolder else f"{name}"
        raise UserError(f"cannot load {what} from {where}: no such folder here, and the hub gave no such model or "
                        f"cannot be reached ({first_line(error)[:200]})") from None


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


def merge_lora(unet: UNet2DConditionModel, state: dict[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Add LoRA weights (diffusers' or Kohya's names, SD1.5 or SDXL) onto `unet` and fuse them, so that it is a plain
    UNet again. Parts for the text encoders are left out. Raises UserError when they do not fit, in part or at all."""
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(state, unet_config=unet.config)
    state = {key: value for key, value in state.items() if not key.startswith(("text_encoder.", "text_encoder_2."))}
    layers = sum(key.endswith((".lora_A.weight", "lora.down.weight", "_lora.down.weight")) for key in state)
    try:
        if layers:
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the LoRA weights {source} do not fit this UNet: {first_line(error)[:300]}") from None
    found = sum(isinstance(module, BaseTunerLayer) for module in unet.modules())
    if not layers or found != layers:
        raise UserError(f"the LoRA weights {source} do not fit this UNet: {found} of their {layers} layers are in it. "
                        "Are they of the other base model (SD1.5 or SDXL)?")
    unet.fuse_lora()
    unet.unload_lora()


def check_same_base(unet: UNet2DConditionModel, base: str | os.PathLike, source: str, **hub) -> None:
    """Raises UserError when a whole UNet is not one for the pipeline `base`, whose text encoders and latents it must
    fit."""
    try:
        config = UNet2DConditionModel.load_config(base, subfolder="unet", **hub)
    except (OSError, ValueError):
        return  # whoever needs the base says so when loading it
    for name in ("cross_attention_dim", "addition_embed_type", "in_channels", "projection_class_embeddings_input_dim"):
        own, expected = unet.config.get(name), config.get(name)
        if own != expected:
            raise UserError(f"{source} does not fit {base}: its {name} is {own}, not {expected}. "
                            "Is it a checkpoint of the other base model (SD1.5 or SDXL)?")


def read_unet_init(progress: Path) -> str | None:
    """--unet_init of the run that wrote this progress.json."""
    try:
        init = json.loads(progress.read_text(encoding="utf-8"))["settings"].get("unet_init")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{progress} is damaged") from None
    return init if isinstance(init, str) else None


def weights_in(folder: Path) -> Path | None:
    """What load_unet reads of a folder: a diffusers UNet's folder, unet.pth, or LoRA weights, in this order, because the
    first two of a LoRA run hold its merged model."""
    if (folder / "unet").is_dir():
        return folder / "unet"
    if (folder / "config.json").is_file():
        return folder
    return folder / "unet.pth" if (folder / "unet.pth").is_file() else lora_file(folder)


def load_unet(base: str | os.PathLike, unet_path: str | os.PathLike | None = None, *, revision: str | None = None,
              cache_dir: str | None = None) -> UNet2DConditionModel:
    """The UNet of the pipeline `base`, with the weights that `unet_path` names put in, in float32.

    `unet_path` is one of: None or "base" (the base model itself); a unet.pth; a .safetensors state dict; a diffusers
    folder, with or without unet/; a hub id; LoRA weights (a file, or a folder that holds one) that are merged into the
    base. Raises UserError naming the key and shape of what does not fit.
    """
    hub = {"revision": revision, "cache_dir": cache_dir}
    path = None if unet_path is None or str(unet_path) == "base" else Path(unet_path)
    init = None  # what LoRA weights are merged into, where it is not the base
    if path is not None and path.is_dir():
        found = weights_in(path)
        if found is None or found.is_dir():
            unet = from_hub(UNet2DConditionModel, found or path, "the UNet")
            check_same_base(unet, base, str(path), **hub)
            return unet
        if found.name != "unet.pth" and (path / "progress.json").is_file():  # a checkpoint of a LoRA run
            init = read_unet_init(path / "progress.json")
        path = found
    if path is not None and not path.exists() and path.suffix not in WEIGHT_FILES:
        return _unet_from_hub_id(base, str(unet_path), hub)  # a pipeline, a bare UNet or LoRA

    unet = (load_unet(base, init, **hub) if init
            else from_hub(UNet2DConditionModel, base, "the UNet", subfolder="unet", **hub))
    if path is None:
        return unet
    state = read_state_dict(lora_file(path) or path)
    if is_lora(state):
        merge_lora(unet, state, path)
    else:
        load_strictly(unet, state, path)
    return unet


def _unet_from_hub_id(base, name: str, hub: dict) -> UNet2DConditionModel:
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    cache_dir = hub["cache_dir"]
    try:
        for filename, subfolder in (("unet/config.json", "unet"), ("config.json", None)):
            try:
                hf_hub_download(name, filename, cache_dir=cache_dir)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            unet = from_hub(UNet2DConditionModel, name, "the UNet", subfolder=subfolder, cache_dir=cache_dir)
            check_same_base(unet, base, name, **hub)
            return unet
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
        raise UserError(f"the hub's {name} holds neither a UNet nor one file of LoRA weights ({LORA_FILE})")
    unet = load_unet(base, None, **hub)
    merge_lora(unet, read_state_dict(path), name)
    return unet
