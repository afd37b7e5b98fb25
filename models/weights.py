"""Reading weight files and hub models of every kind, without running what is in them."""

import json
import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UserError, first_line


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read a flat state dict from a .safetensors file or a torch file (unet.pth). Nothing is ever unpickled beyond
    tensors and plain containers (weights_only).

    Raises UserError when the file is missing, damaged, or holds anything but a mapping of names to tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: give a unet.pth, a .safetensors file, a diffusers folder or a hub id")
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise UserError(f"{path} holds no plain state dict (names to tensors), as "
                        "torch.save(network.state_dict(), FILE) writes one")
    return state


def read_torch_file(path: Path):
    """The content of a .safetensors or torch file, tensors and plain containers alone (weights_only).

    Raises UserError when it is damaged or holds anything else.
    """
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no file of plain tensors (it asks to run code when loaded, or is damaged); it was "
                        "refused and nothing in it was executed") from None
    except Exception as error:  # torch's reader raises whatever a damaged file makes it stumble over
        raise UserError(f"{path} is damaged or no weights file ({first_line(error)}): download or save it again") from None


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str | os.PathLike, hint: str = "") -> None:
    """Load `state` into `model` with strict=True; what does not fit is reported by key and shape as a UserError.

    hint: what may be wrong, as a sentence.
    """
    own = model.state_dict()
    faults = [f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]
    faults += [f"unexpected {key} {tuple(state[key].shape)}" for key in state if key not in own]
    faults += [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in state]
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise UserError(f"{source} does not fit this {type(model).__name__} ({shown}). {hint}".strip())
    model.load_state_dict(state, strict=True)


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 shards: every process must call this then. Others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def from_hub(model_class, name: str | os.PathLike, what: str, method: str = "from_pretrained", **kwargs):
    """model_class.from_pretrained (or another loader of it) with its failures reported in one line."""
    try:
        return getattr(model_class, method)(name, **kwargs)
    except (OSError, ValueError, json.JSONDecodeError, SafetensorError, pickle.UnpicklingError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        subfolder = kwargs.get("subfolder")
        where = f"{name} ({subfolder})" if subfolder else f"{name}"
        raise UserError(f"cannot load {what} from {where}: no such folder here, and the hub gave no such model or "
                        f"cannot be reached ({first_line(error, 200)})") from None
