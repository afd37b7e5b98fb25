"""Reading UNet weights of every kind: unet.pth, .safetensors, a diffusers folder, a hub id, LoRA on top of the base."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from training.errors import UserError, first_line

LORA_FILE = "pytorch_lora_weights.safetensors"


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
    except (SafetensorError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
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
    faults = [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in state]
    faults += [f"unexpected {key} {tuple(state[key].shape)}" for key in state if key not in own]
    faults += [f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
               for key in own if key in state and state[key].shape != own[key].shape]
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


def is_lora(state: dict[str, torch.Tensor]) -> bool:
    return any("lora" in key for key in state)


def lora_file(path: str | os.PathLike) -> Path | None:
    """The LoRA weights file that `path` names: the file itself, or a folder with pytorch_lora_weights.safetensors."""
    path = Path(path)
    if path.is_dir() and (path / LORA_FILE).is_file():
        return path / LORA_FILE
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt") as handle:
                return path if any("lora" in key for key in handle.keys()) else None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file: {first_line(error)}") from None
    return None


def merge_lora(unet: UNet2DConditionModel, path: str | os.PathLike) -> None:
    """Add LoRA weights (diffusers format, SD1.5 or SDXL) onto `unet` and fuse them, so that it is a plain UNet again."""
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(path))
    state = {key: value for key, value in state.items() if not key.startswith(("text_encoder.", "text_encoder_2."))}
    try:
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the LoRA weights {path} do not fit this UNet: {first_line(error)[:300]}") from None
    unet.fuse_lora()
    unet.unload_lora()


def load_unet(base: str | os.PathLike, unet_path: str | os.PathLike | None = None, *, revision: str | None = None,
              cache_dir: str | None = None) -> UNet2DConditionModel:
    """The UNet of the pipeline `base`, with the weights that `unet_path` names put in, in float32.

    `unet_path` is one of: None or "base" (the base model itself); a unet.pth; a .safetensors state dict; a diffusers
    folder, with or without unet/; a hub id; LoRA weights (a file, or a folder with pytorch_lora_weights.safetensors)
    that are merged into the base. Raises UserError naming the key and shape of what does not fit.
    """
    if unet_path is not None and str(unet_path) != "base" and Path(unet_path).is_dir() and lora_file(unet_path) is None:
        folder = Path(unet_path)
        if (folder / "unet.pth").is_file() and not (folder / "config.json").is_file() and not (folder / "unet").is_dir():
            unet_path = folder / "unet.pth"  # a checkpoint-STEP folder
        else:
            subfolder = "unet" if (folder / "unet").is_dir() else None
            return from_hub(UNet2DConditionModel, folder, "the UNet", subfolder=subfolder)
    is_file = unet_path is not None and (Path(unet_path).suffix in (".pth", ".pt", ".bin", ".safetensors")
                                         or Path(unet_path).exists())
    if unet_path is not None and str(unet_path) != "base" and not is_file:  # a hub id: a pipeline, a bare UNet or LoRA
        return _unet_from_hub_id(base, str(unet_path), revision, cache_dir)

    unet = from_hub(UNet2DConditionModel, base, "the UNet", subfolder="unet", revision=revision, cache_dir=cache_dir)
    if unet_path is None or str(unet_path) == "base":
        return unet
    lora = lora_file(unet_path)
    if lora is not None:
        merge_lora(unet, lora)
    else:
        load_strictly(unet, read_state_dict(unet_path), unet_path)
    return unet


def _unet_from_hub_id(base, name: str, revision, cache_dir) -> UNet2DConditionModel:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for filename, subfolder in (("unet/config.json", "unet"), ("config.json", None), (LORA_FILE, None)):
        try:
            path = hf_hub_download(name, filename, cache_dir=cache_dir)
        except LocalEntryNotFoundError as error:
            raise UserError(f"no file or folder {name} here, and the hub cannot be reached for it "
                            f"({first_line(error)[:120]})") from None
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise UserError(f"no file or folder {name} here, and the hub does not give it "
                            f"({first_line(error)[:160]})") from None
        if filename == LORA_FILE:
            unet = load_unet(base, None, revision=revision, cache_dir=cache_dir)
            merge_lora(unet, path)
            return unet
        return from_hub(UNet2DConditionModel, name, "the UNet", subfolder=subfolder, cache_dir=cache_dir)
    raise UserError(f"the hub's {name} holds neither a UNet nor {LORA_FILE}")
