"""What generation leaves on the disk: a folder of images for each prompt group, its settings, and the manifest beside it.

An interrupted run goes on where it stopped: images are written aside and renamed into place, the manifest comes last.
"""

import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from common.errors import UserError
from common.files import make_folder, read_json, whole_file, write_json
from common.locks import LOCK_FILE, hold, release
from eval.manifest import read_manifest
from eval.options import GenerateOptions
from prompts import group_path

IMAGE_DESCRIPTION = 0x010E  # the EXIF tag
SETTINGS_FILE = "settings.json"
NAMES = ("pretrained_model_name_or_path", "unet_path", "pretrained_vae_model_name_or_path")
RECORDED = (*NAMES, "lora")  # and never compared: identities are


@dataclass(frozen=True)
class Job:
    """One image to make: image k of the prompt number `index`."""

    index: int
    k: int
    prompt: str
    filename: str
    seed: int


@dataclass
class Group:
    """One prompt group's images, `folder`, and its manifest beside them."""

    name: str
    stem: str
    output_dir: Path
    jobs: list[Job]
    missing: set[str] = field(default_factory=set)  # filenames still to be made

    @property
    def folder(self) -> Path:
        return self.output_dir / self.stem

    @property
    def manifest(self) -> Path:
        return self.output_dir / f"{self.stem}.json"

    @property
    def made_elsewhere(self) -> bool:
        """Whether the manifest is of the published program, which leaves no settings: it is kept as it is."""
        return self.manifest.exists() and not (self.folder / SETTINGS_FILE).exists()


def plan_group(name: str, prompts: list[str], options: GenerateOptions) -> Group:
    """The images that a prompt group asks for, once all options have their values."""
    group = group_path(name).stem
    size = f"{options.height}x{options.width}"
    stem = f"{group}_seed{options.seed}_{size}_{options.num_inference_steps}s_{options.cfg}cfg"
    several = options.num_images_per_prompt > 1
    first = [options.seed + index * options.num_images_per_prompt * options.seed_per_prompt for index in range(len(prompts))]
    jobs = [Job(index, k, prompt, f"{index}_{k}_{size}.png" if several else f"{index}_{size}.png", first[index] + k)
            for index, prompt in enumerate(prompts) for k in range(options.num_images_per_prompt)]
    return Group(group, stem, Path(options.output_dir), jobs)


# --- before --------------------------------------------------------------------------------------------------------------

def prepare_folder(group: Group, record: dict, overwrite: bool) -> None:
    """Make a group's folder fit to go on in: its settings are written or compared, half an image that an
    interruption left is thrown away. Raises UserError when it holds images of other settings."""
    make_folder(group.folder, "--output_dir")
    hold(group.folder)
    if overwrite:
        for path in group.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
        for path in (group.manifest, group.manifest.with_suffix(".zip")):
            path.unlink(missing_ok=True)
    settings = group.folder / SETTINGS_FILE
    if settings.exists():
        before = read_json(settings)
        if not isinstance(before, dict):
            raise UserError(f"{settings} is damaged: choose another --output_dir, or --overwrite what is there")
        before = {"empty_prompt": "encoded", "seed_per_prompt": False} | before  # folders from before these options
        changed = [f"{key} was {before.get(key)}, now {record[key]}" for key in record
                   if key not in RECORDED and before.get(key) != record[key]]
        if changed and not any(group.folder.glob("*.png")):
            write_json(settings, record)  # it was begun with a mistake, and nothing was made
        elif changed:
            raise UserError(f"{group.folder} holds images of other settings ({'; '.join(changed[:3])}): choose another "
                            "--output_dir, or --overwrite them")
    elif any(group.folder.glob("*.png")):
        raise UserError(f"{group.folder} holds images, but no {SETTINGS_FILE} that says how they were made: choose "
                        "another --output_dir, or --overwrite them")
    else:
        write_json(settings, record)
    for leftover in group.folder.glob(".*.png.*.partial"):
        leftover.unlink()


def abandon_folder(group: Group) -> None:
    """Leave nothing of a group whose first image could not be made: its settings would name a model that is not there."""
    if any(path.name not in (SETTINGS_FILE, LOCK_FILE) for path in group.folder.iterdir()) or group.manifest.exists():
        return
    release(group.folder)
    shutil.rmtree(group.folder)
    if not any(group.output_dir.iterdir()):
        group.output_dir.rmdir()


def find_missing(group: Group) -> set[str]:
    """Filenames that are not there yet. Raises UserError when an image answers another prompt than the group's."""
    missing = set()
    for job in group.jobs:
        path = group.folder / job.filename
        if not path.exists():
            missing.add(job.filename)
        elif (prompt := read_prompt(path)) is None:
            raise UserError(f"{path} is damaged, or no image of this program: delete it, and the same command makes it again")
        elif prompt != job.prompt:
            raise UserError(f"{path} was made for the prompt {prompt!r}, the group now asks for "
                            f"{job.prompt!r}: choose another --output_dir, or --overwrite")
    return missing


# --- images --------------------------------------------------------------------------------------------------------------

def write_image(image: Image.Image, prompt: str, path: Path) -> None:
    """A PNG with the prompt in EXIF ImageDescription (UTF-8)."""
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = prompt.encode()
    image.save(path, "PNG", exif=exif)


def read_prompt(path: Path) -> str | None:
    """The prompt that write_image put into a PNG; None of a damaged one, and of another program's."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.getexif().get(IMAGE_DESCRIPTION)
        return text.encode("latin-1").decode() if text is not None else None
    except (OSError, ValueError, SyntaxError):  # what Pillow raises on broken files, or no UTF-8
        return None


def write_images(folder: Path, images: list[Image.Image], jobs: list[Job]) -> None:
    """Write the images of a batch, each whole or absent wherever the program is killed."""
    for image, job in zip(images, jobs):
        with whole_file(folder / job.filename) as aside:
            write_image(image, job.prompt, aside)


# --- after ---------------------------------------------------------------------------------------------------------------

def finish_group(group: Group, record: dict, options: GenerateOptions) -> None:
    """STEM.zip, then the manifest, last of all. A manifest that already covers these prompts and more is kept; a
    damaged one is written again."""
    entries = [{"prompt": job.prompt, "gen_image_path": f"{group.stem}/{job.filename}", "raw_image_path": "",
                "metadata": {**record, "index": job.index, "k": job.k, "image_seed": job.seed}}
               for job in group.jobs]
    try:
        kept = read_manifest(group.manifest)
    except UserError:  # none yet, or damaged
        kept = []
    if [(entry["prompt"], entry["gen_image_path"]) for entry in kept[:len(entries)]] == [
            (entry["prompt"], entry["gen_image_path"]) for entry in entries]:
        return
    if not options.no_zip:
        with (whole_file(group.manifest.with_suffix(".zip")) as aside,
              zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as file):  # PNGs do not shrink further
            for job in group.jobs:
                file.write(group.folder / job.filename, f"{group.stem}/{job.filename}")
    write_json(group.manifest, entries)
