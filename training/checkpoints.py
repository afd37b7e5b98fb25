"""Checkpoints that are whole or absent: written aside, synced, digested, renamed; the newest good one is resumed.

    OUTPUT_DIR/checkpoint-STEP/
        unet.pth                            float32 state dict of the policy (or pytorch_lora_weights.safetensors)
        optimizer.bin, random_states_N.pkl  what resuming needs, as accelerate writes it (FSDP, DeepSpeed: their shards)
        progress.json                       step, learning-rate schedule, counts, the settings the run was made with
        manifest.json                       size and SHA-256 of every file above

This file knows folders alone; training/state.py puts a run's state into them.
"""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import UserError, first_line, printable, warn
from common.files import digest, read_json, sync, write_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"


# --- what makes a folder a checkpoint -------------------------------------------------------------------------------------

def write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)

    def describe(path: Path) -> dict:
        sync(path)
        return {"bytes": path.stat().st_size, "sha256": digest(path)}

    with ThreadPoolExecutor() as pool:
        entries = dict(zip((path.relative_to(folder).as_posix() for path in files), pool.map(describe, files)))
    write_json(folder / MANIFEST, entries)
    sync(folder)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file of its manifest is there with its digest."""

    def file_fault(name: str) -> str | None:
        path, entry = folder / name, entries[name]
        if folder.resolve() not in path.resolve().parents:
            return f"{MANIFEST} names {name!r}, which lies outside the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        return f"{name} is damaged" if digest(path) != entry["sha256"] else None

    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        with ThreadPoolExecutor() as pool:
            problem = next(map(printable, filter(None, pool.map(file_fault, entries))), None)
        if problem is None and PROGRESS not in entries:
            problem = f"{PROGRESS} is missing"
        if problem is None:
            read_progress(folder)
        return problem
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end"
    except UserError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is damaged ({first_line(error)})"


def read_progress(folder: Path) -> dict:
    """A checkpoint's progress.json: step, lr_scheduler, settings, and `record`, what the run remembers besides. Raises
    UserError."""
    progress, kinds = read_json(folder / PROGRESS), {"step": int, "lr_scheduler": dict, "settings": dict, "record": dict}
    if (isinstance(progress, dict) and all(type(progress.get(name)) is kind for name, kind in kinds.items())
            and progress["step"] >= 0):
        return progress
    raise UserError(f"{folder / PROGRESS} is damaged")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-STEP folders, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*")
             if path.is_dir() and re.fullmatch(r"checkpoint-(\d+)", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


# --- putting one in place -------------------------------------------------------------------------------------------------

def put_in_place(aside: Path, final: Path) -> None:
    """Rename the finished folder; one of the same step, if it is there, makes way only then."""
    if final.exists():
        final.rename(final.with_name(f".{final.name}.old"))
    aside.rename(final)
    sync(final.parent)
    remove_leftovers(final.parent)


def remove_older(newest: Path, step: int, limit: int) -> None:
    """Keep `limit` checkpoints, the newest included, once its files have been read back as they were written."""
    problem = fault(newest)
    if problem:
        raise OSError(f"{newest} reads back damaged ({problem})")
    older = [path for path in list_checkpoints(newest.parent) if step_of(path) < step]
    for path in older[:max(len(older) - limit + 1, 0)]:
        path.rename(path.with_name(f".{path.name}.old"))  # so that no half-deleted folder looks like a checkpoint
    remove_leftovers(newest.parent)


def remove_leftovers(output_dir: Path) -> None:
    """What a killed process left of a checkpoint that it was writing or removing."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.old"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


# --- choosing one ---------------------------------------------------------------------------------------------------------

def continuing(wanted: str | None) -> str:
    """How the run that has just been saved is continued."""
    again = (wanted or "").strip() == "latest"
    return "the same command continues from it" if again else "--resume_from_checkpoint latest continues from it"


def starts_over(wanted: str | None) -> bool:
    return (wanted or "").strip().lower() in ("", "none")


def choose_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    if starts_over(wanted):
        return None
    wanted = wanted.strip()
    if wanted != "latest":
        folder = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
        if not folder.is_dir():
            raise UserError(f"--resume_from_checkpoint {wanted}: no such folder, here or in {output_dir}")
        problem = fault(folder)
        if problem:
            raise UserError(f"--resume_from_checkpoint {folder} cannot be used: {problem}")
        return folder
    folders = list_checkpoints(output_dir)
    for folder in reversed(folders):
        problem = fault(folder)
        if problem is None:
            return folder
        warn(f"{folder} is skipped: {problem}")
    if folders:
        raise UserError(f"none of the {len(folders)} checkpoints in {output_dir} can be used: name another --output_dir, or "
                        "start over with --resume_from_checkpoint none")
    return None
