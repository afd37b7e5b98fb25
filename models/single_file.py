"""A base as people have it: one .safetensors file of SD1.5 or SDXL, turned once into a diffusers folder and kept."""

import os
import shutil
from pathlib import Path

from filelock import FileLock

from common.errors import UserError, first_line
from common.files import fingerprint, make_folder

SDXL_KEY = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
SD15_KEY = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"


def as_folder(path: Path, cache_dir: str | None = None) -> Path:
    """The diffusers folder made of a checkpoint file, named after it and its content; made on the first call.

    Raises UserError for a file that is no such checkpoint, and where the hub does not give the configs that it lacks.
    """
    kept = Path(cache_dir or os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "single_files"
    folder = kept / f"{path.stem}-{fingerprint(path)}"
    make_folder(kept, "--cache_dir")
    with FileLock(kept / f".{folder.name}.lock"):  # of a run's processes one makes it, and the others wait
        if not (folder / "model_index.json").is_file():
            print(f"Turning {path} into a diffusers folder, once: {folder}", flush=True)
            _unpack(path, folder)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        pipeline_class(path).from_single_file(str(path), safety_checker=None).save_pretrained(aside)
    except UserError:
        raise
    except Exception as error:  # diffusers' readers raise many kinds
        raise UserError(f"{path} cannot be opened as a checkpoint file ({first_line(error, 160)}): it holds weights alone, "
                        "and its configs come from the hub on the first call; without a network give a diffusers "
                        "folder") from None
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def pipeline_class(path: Path) -> type:
    """The pipeline that a file's keys name. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no .safetensors file ({first_line(error)}): download it again") from None
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if SDXL_KEY in keys:
        return StableDiffusionXLPipeline
    if SD15_KEY in keys:
        return StableDiffusionPipeline
    raise UserError(f"{path} is no checkpoint file of SD1.5 or SDXL with its text encoders (it has {len(keys)} tensors, "
                    f"such as {min(keys, default='none')}): weights of the UNet alone go to --unet_init, beside a base")
