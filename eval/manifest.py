"""A generation manifest: the JSON list of {"prompt", "gen_image_path", "raw_image_path", "metadata"} beside unet.pth."""

import json
import os
from pathlib import Path

from common.errors import UserError


def read_manifest(path: str | os.PathLike) -> list[dict]:
    """The manifest's entries. Raises UserError when the file is missing, no such list, or empty."""
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no manifest at {path}: eval.generate writes one") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is no JSON manifest ({error}): name one that eval.generate wrote") from None
    if not isinstance(entries, list):
        raise UserError(f"{path} is no manifest: it must be a JSON list of entries, as eval.generate writes it")
    if not entries:
        raise UserError(f"the manifest {path} lists no image: generate its images again")
    for number, entry in enumerate(entries, start=1):
        faults = [key for key in ("prompt", "gen_image_path")
                  if not isinstance(entry, dict) or not isinstance(entry.get(key), str)]
        if faults:
            raise UserError(f"{path}: entry {number} has no {' and no '.join(faults)}, as text")
        if not is_text(entry["prompt"]) or not is_path(entry["gen_image_path"]):
            raise UserError(f"{path}: entry {number} has a prompt or path with characters that no file can hold: mend it there")
    return entries


def is_text(value: str) -> bool:
    """No lone surrogates, which JSON can spell but nothing can write."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_path(value: str) -> bool:
    return is_text(value) and "\0" not in value and len(value.encode()) < 4096 and all(
        len(part.encode()) < 256 for part in value.split("/"))


def image_path(manifest: str | os.PathLike, entry: dict) -> Path:
    """Where an entry's image lies: an absolute path as it is, a relative one from the manifest's folder, then from the
    working directory (the official form)."""
    path = Path(entry["gen_image_path"])
    beside = Path(manifest).parent / path
    return beside if path.is_absolute() or beside.exists() or not path.exists() else path


def model_names(manifests: list[str], labels: list[str] | None, flag: str = "--labels") -> list[str]:
    """Which model each manifest is of: its label, which `flag` gives, else the name of its folder, or the whole folder where
    two end alike. Manifests of one name are one model's. Raises UserError."""
    folders = [str(Path(manifest).absolute().parent) for manifest in manifests]
    if labels is None:
        ends = {folder: Path(folder).name or folder for folder in folders}
        names = list(ends.values())
        labels = [ends[folder] if names.count(ends[folder]) == 1 else folder for folder in folders]
    if len(labels) != len(manifests):
        raise UserError(f"{flag} names {len(labels)} models for {len(manifests)} manifests: give one per manifest, the same "
                        "one again for another prompt group of a model")
    if not all(label.strip() and is_text(label) for label in labels):
        raise UserError(f"{flag} must be UTF-8 text, none of them empty")
    return labels
