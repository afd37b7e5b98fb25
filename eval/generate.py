"""Generate the images of prompt groups with a UNet.

    accelerate launch -m eval.generate --unet_path RUN/checkpoint-2000/unet.pth --prompts papv2 hpsv2 partiprompts

Images, manifest and STEM.zip lie beside the UNet (or in --output_dir). An interrupted run goes on where it stopped:
batches are written aside and renamed into place, the manifest comes last. Settings are the published ones by default.
"""

import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser

from common.files import fingerprint, make_folder, make_room, read_json, write_json
from eval.manifest import read_manifest
from eval.sampling import Sampler, SamplingSettings, base_unet_config, is_sdxl, load_pipeline
from prompts import group_path, read_group
from common.train_options import parse_words
from models.compile import check_compiler, compile_blocks
from common.errors import UserError, run_program
from common.locks import LOCK_FILE, hold, release
from models.weights import weights_in

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_VAE = "madebyollin/sdxl-vae-fp16-fix"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
TRAINING_STEPS = 1000  # of SD1.5's and SDXL's schedulers
IMAGE_DESCRIPTION = 0x010E  # the EXIF tag
SETTINGS_FILE = "settings.json"
NAMES = ("pretrained_model_name_or_path", "unet_path", "pretrained_vae_model_name_or_path")  # told, never compared
BASE_PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # besides UNet and VAE


@dataclass
class Arguments:
    unet_path: str = field(metadata={
        "help": "unet.pth, .safetensors, a diffusers folder, a hub id, LoRA weights, or 'base' for the base model."})
    pretrained_model_name_or_path: str | None = field(default=None, metadata={
        "help": f"The base pipeline; default {SD15}, with --sdxl {SDXL}."})
    sdxl: bool = field(default=False, metadata={"help": "Take SDXL's defaults."})
    pretrained_vae_model_name_or_path: str | None = field(default=None, metadata={
        "help": f"Another VAE, or 'base' for the pipeline's own; default: the pipeline's own, for SDXL {SDXL_VAE}."})
    prompts: list[str] = field(default_factory=lambda: ["papv2", "hpsv2", "partiprompts"], metadata={
        "help": "Prompt groups: names of prompts/NAME.json, or files."})
    output_dir: str | None = field(default=None, metadata={
        "help": "Default: the folder of unet_path; for base or a hub id output/NAME."})
    seed: int = field(default=0, metadata={"help": "Every prompt starts from this seed; its image k from seed + k."})
    num_images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt."})
    limit: int | None = field(default=None, metadata={"help": "Only the first prompts of each group."})
    height: int | None = field(default=None, metadata={"help": "Default 512, SDXL 1024."})
    width: int | None = field(default=None, metadata={"help": "Default 512, SDXL 1024."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    cfg: float = field(default=7.5, metadata={"help": "Guidance, in the sense of --cfg_convention."})
    cfg_convention: str = field(default="official", metadata={"choices": ["official", "diffusers"], "help":
        "official: e_cond + cfg (e_cond - e_uncond), as published; diffusers: e_uncond + cfg (e_cond - e_uncond)."})
    empty_prompt: str = field(default="encoded", metadata={"choices": ["encoded", "pipeline"], "help":
        "Guidance's other half: the encoded \"\" as published; pipeline: as the base's model_index.json says (SDXL: zeros)."})
    scheduler: str = field(default="euler", metadata={"choices": ["euler", "default"], "help":
        "euler as published; default: the pipeline's own."})
    mixed_precision: str | None = field(default=None, metadata={"choices": list(DTYPES), "help":
        "Type of UNet and text encoders; default bf16 on a GPU, no (float32) on the CPU."})
    latents_dtype: str = field(default="float32", metadata={"choices": ["float32", "unet"], "help":
        "Type of the latents through all steps; unet: the UNet's, as the official program."})
    vae_dtype: str = field(default="float32", metadata={"choices": ["float32", "unet"], "help":
        "Type of the VAE; float32 as published, unet: the UNet's, faster and less faithful."})
    vae_tiling: bool = field(default=False, metadata={"help": "Decode in tiles, for small GPUs; seams differ slightly."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the UNet: minutes at the start, then faster."})
    batch_size: int | None = field(default=None, metadata={"help": "Images sampled together; default 8, SDXL 4."})
    overwrite: bool = field(default=False, metadata={"help": "Throw away what the folder holds and start anew."})
    no_zip: bool = field(default=False, metadata={"help": "Leave no STEM.zip."})
    manifest_list: str | None = field(default=None, metadata={"help": "Write the manifests' paths here, one a line."})


@dataclass(frozen=True)
class Job:
    """One image to make: image k of the prompt number `index`."""

    index: int
    k: int
    prompt: str
    filename: str


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


def check(args: Arguments) -> None:
    """Refuse what cannot work before anything loads, the defaults still being None."""
    for name in ("num_images_per_prompt", "limit", "num_inference_steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if not args.prompts:
        raise UserError("--prompts names no prompt group")
    stems = [group_path(name).stem for name in args.prompts]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"--prompts names two groups {stem}, whose images would share a folder: rename one, or "
                            "generate them one at a time with an --output_dir each")
    for name in ("height", "width"):
        side = getattr(args, name)
        if side is not None and (side < 8 or side % 8):
            raise UserError(f"--{name} {side} is no multiple of 8 above 0")
    if args.num_inference_steps > TRAINING_STEPS:
        raise UserError(f"--num_inference_steps {args.num_inference_steps} is more than the {TRAINING_STEPS} that the "
                        "models were trained with")
    if not math.isfinite(args.cfg):
        raise UserError(f"--cfg {args.cfg} is no finite number")
    if args.seed < 0 or args.seed + args.num_images_per_prompt > 2**63:
        raise UserError("--seed must not be negative, nor a prompt's last seed above 2**63 - 1")


def fill_defaults(args: Arguments, device: torch.device) -> None:
    """Put the published settings of the base model in where the command line is silent."""
    args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or (SDXL if args.sdxl else SD15)
    sdxl = is_sdxl(base_unet_config(args.pretrained_model_name_or_path))
    if args.sdxl and not sdxl:
        raise UserError(f"--sdxl, but {args.pretrained_model_name_or_path} is no SDXL pipeline: leave --sdxl out")
    args.height, args.width = (side or (1024 if sdxl else 512) for side in (args.height, args.width))
    args.batch_size = args.batch_size or (4 if sdxl else 8)
    args.mixed_precision = args.mixed_precision or ("no" if device.type == "cpu" else "bf16")
    if args.pretrained_vae_model_name_or_path is None and sdxl:
        args.pretrained_vae_model_name_or_path = SDXL_VAE
    elif args.pretrained_vae_model_name_or_path == "base":
        args.pretrained_vae_model_name_or_path = None
    if args.output_dir is None:
        unet = Path(args.unet_path)
        named = re.sub(r"[^\w.-]+", "_", args.unet_path)
        args.output_dir = str(unet if unet.is_dir() else unet.parent if unet.exists() else Path("output") / named)


def identity(source: str, files_of: Callable[[Path], list[Path]]) -> str:
    """What a model name stands for: the content of a local file, or of the files that are loaded from a local folder
    (images and manifests may lie there too), else the name itself."""
    path = Path(source)
    return f"sha256:{fingerprint(path, files_of(path) if path.is_dir() else None)}" if path.exists() else source


def model_files(folder: Path) -> list[Path]:
    """What diffusers reads of a UNet's or VAE's folder."""
    return [folder / "config.json", *folder.glob("diffusion_pytorch_model*")]


def unet_files(folder: Path) -> list[Path]:
    """What models.weights.load_unet reads of a folder."""
    found = weights_in(folder)
    if found is None or found.is_dir():
        return model_files(found or folder)
    return [found] if found.name == "unet.pth" else [found, folder / "progress.json"]  # LoRA's has the base it was trained on


def vae_files(folder: Path) -> list[Path]:
    return model_files(folder / "vae" if (folder / "vae").is_dir() else folder)


def base_files(folder: Path) -> list[Path]:
    """What eval.sampling.load_pipeline reads of a pipeline's folder."""
    return [folder / "model_index.json", *model_files(folder / "unet"), *model_files(folder / "vae"),
            *(file for part in BASE_PARTS for file in (folder / part).glob("*"))]


def settings_record(args: Arguments, settings: SamplingSettings, device: torch.device) -> dict:
    """Everything that the images depend on, as the manifest tells it and resuming compares it."""
    dtype = str(DTYPES[args.mixed_precision]).removeprefix("torch.")
    vae = args.pretrained_vae_model_name_or_path
    return {
        **{name: getattr(args, name) for name in NAMES},
        "base_identity": identity(args.pretrained_model_name_or_path, base_files),
        "unet_identity": identity(args.unet_path, unet_files),
        "vae_identity": identity(vae, vae_files) if vae else "base",
        "seed": args.seed, "num_images_per_prompt": args.num_images_per_prompt, "negative_prompt": "",
        **asdict(settings), "latents_dtype": str(settings.latents_dtype).removeprefix("torch."),
        "guidance_scale_diffusers": settings.guidance_scale, "noise_dtype": dtype, "noise_device": device.type,
        "unet_dtype": dtype, "text_encoder_dtype": dtype, "vae_tiling": args.vae_tiling,
        "vae_dtype": "float32" if args.vae_dtype == "float32" else dtype, "compiled": args.compile,
    }


def plan_group(name: str, args: Arguments) -> Group:
    """The images that a prompt group asks for. Raises UserError for a bad prompt file."""
    prompts = read_group(name)[:args.limit]
    size = f"{args.height}x{args.width}"
    stem = f"{group_path(name).stem}_seed{args.seed}_{size}_{args.num_inference_steps}s_{args.cfg}cfg"
    several = args.num_images_per_prompt > 1
    jobs = [Job(index, k, prompt, f"{index}_{k}_{size}.png" if several else f"{index}_{size}.png")
            for index, prompt in enumerate(prompts) for k in range(args.num_images_per_prompt)]
    return Group(group_path(name).stem, stem, Path(args.output_dir), jobs)


def prepare_folder(group: Group, record: dict, overwrite: bool) -> None:
    """Make a group's folder fit to go on in: its settings are written or compared, what an interruption left is
    finished or thrown away. Raises UserError when it holds images of other settings."""
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
        before = {"empty_prompt": "encoded"} | before  # folders from before that option
        changed = [f"{key} was {before.get(key)}, now {record[key]}" for key in record
                   if key not in NAMES and before.get(key) != record[key]]
        if changed and not any(path for kind in ("*.png", ".batch-*.ready") for path in group.folder.glob(kind)):
            write_json(settings, record)  # it was begun with a mistake, and nothing was made
        elif changed:
            raise UserError(f"{group.folder} holds images of other settings ({'; '.join(changed[:3])}): choose another "
                            "--output_dir, or --overwrite them")
    elif any(group.folder.glob("*.png")):
        raise UserError(f"{group.folder} holds images, but no {SETTINGS_FILE} that says how they were made: choose "
                        "another --output_dir, or --overwrite them")
    else:
        write_json(settings, record)
    for leftover in group.folder.glob(".batch-*"):
        if leftover.suffix == ".ready":
            publish(leftover)
        else:
            shutil.rmtree(leftover)


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


def write_image(image: Image.Image, prompt: str, path: Path) -> None:
    """A PNG with the prompt in EXIF ImageDescription (UTF-8), on the disk when this returns."""
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = prompt.encode()
    with open(path, "wb") as file:
        image.save(file, "PNG", exif=exif)
        file.flush()
        os.fsync(file.fileno())


def read_prompt(path: Path) -> str | None:
    """The prompt that write_image put into a PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.getexif().get(IMAGE_DESCRIPTION)
    except OSError:
        return None
    return text.encode("latin-1").decode() if text is not None else None


def write_batch(folder: Path, number: int, images: list[Image.Image], jobs: list[Job]) -> None:
    """Write a batch aside, commit it by one rename, then move its images into place: killed anywhere, the folder never
    shows half an image, and a batch is either whole (prepare_folder finishes the moving) or was never made."""
    aside = folder / f".batch-{number}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for image, job in zip(images, jobs):
            write_image(image, job.prompt, aside / job.filename)
        ready = aside.rename(aside.with_suffix(".ready"))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    publish(ready)


def publish(ready: Path) -> None:
    for path in ready.iterdir():
        os.replace(path, ready.parent / path.name)
    ready.rmdir()


def generate_group(group: Group, sampler: Sampler, args: Arguments, state: PartialState) -> None:
    """Make this process's share of a group's missing images.

    Batches are cut by position, whatever is missing of them, so that an image is sampled in the same company on any
    number of devices, fresh or resumed, and comes out bit-equal.
    """
    cut = [group.jobs[start:start + args.batch_size] for start in range(0, len(group.jobs), args.batch_size)]
    todo = [(number, batch) for number, batch in enumerate(cut) if any(job.filename in group.missing for job in batch)]
    mine = todo[state.process_index::state.num_processes]
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    total = sum(job.filename in group.missing for _, batch in mine for job in batch)
    writing: Future | None = None
    with (ThreadPoolExecutor(1) as writer,
          tqdm(total=total, desc=f"{group.name}{share}", unit=" images", disable=not state.is_main_process) as bar):
        for number, batch in mine:
            images = sampler.sample([job.prompt for job in batch], [args.seed + job.k for job in batch])
            kept = [(image, job) for image, job in zip(images, batch) if job.filename in group.missing]
            if writing:
                writing.result()  # a full disk stops the run here
            writing = writer.submit(write_batch, group.folder, number, *zip(*kept))
            bar.update(len(kept))
        if writing:
            writing.result()


def finish_group(group: Group, record: dict, args: Arguments) -> None:
    """STEM.zip, then the manifest, last of all. A manifest that already covers these prompts and more is kept; a
    damaged one is written anew."""
    entries = [{"prompt": job.prompt, "gen_image_path": f"{group.stem}/{job.filename}", "raw_image_path": "",
                "metadata": {**record, "index": job.index, "k": job.k, "image_seed": args.seed + job.k}}
               for job in group.jobs]
    try:
        kept = read_manifest(group.manifest)
    except UserError:  # none yet, or damaged
        kept = []
    if [(entry["prompt"], entry["gen_image_path"]) for entry in kept[:len(entries)]] == [
            (entry["prompt"], entry["gen_image_path"]) for entry in entries]:
        return
    if not args.no_zip:
        archive = group.manifest.with_suffix(".zip")
        aside = archive.with_suffix(".zip.partial")
        try:
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as file:  # PNGs do not shrink further
                for job in group.jobs:
                    file.write(group.folder / job.filename, f"{group.stem}/{job.filename}")
            os.replace(aside, archive)
        finally:
            aside.unlink(missing_ok=True)
    write_json(group.manifest, entries)


def made_elsewhere(group: Group) -> bool:
    """A manifest of the published program, which leaves no settings: it is kept as it is."""
    return group.manifest.exists() and not (group.folder / SETTINGS_FILE).exists()


def main(argv: list[str] | None = None) -> None:
    [args] = parse_words(HfArgumentParser(Arguments, description=__doc__), argv)
    several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    state = PartialState(cpu=several_on_cpu, timeout=timedelta(hours=1))  # cpu: else each process would be on its own
    torch.backends.cudnn.deterministic = True
    check(args)
    fill_defaults(args, state.device)
    if state.device.type == "cpu":
        state.print(f"no GPU here: generating on the CPU, UNet in {DTYPES[args.mixed_precision]}")
    unet_dtype = DTYPES[args.mixed_precision]
    settings = SamplingSettings(args.height, args.width, args.num_inference_steps, args.cfg, args.cfg_convention,
                                args.scheduler, torch.float32 if args.latents_dtype == "float32" else unet_dtype,
                                args.empty_prompt)
    record = settings_record(args, settings, state.device)
    groups = [plan_group(name, args) for name in args.prompts]
    if state.is_main_process:
        if args.manifest_list:
            make_room(args.manifest_list, "--manifest_list")
        for group in groups:
            if not args.overwrite and made_elsewhere(group):
                print(f"{group.manifest} exists: its images are kept as they are")
            else:
                prepare_folder(group, record, args.overwrite)
    state.wait_for_everyone()

    ours = [group for group in groups if not made_elsewhere(group)]
    for group in ours:
        group.missing = find_missing(group)
        state.print(f"{group.folder}: {len(group.jobs) - len(group.missing)} of {len(group.jobs)} images are there")
    state.wait_for_everyone()  # nobody writes before everybody has looked
    sampler = None
    if any(group.missing for group in ours):
        if args.compile:
            check_compiler(state.device)
        pipeline = load_pipeline(args.pretrained_model_name_or_path, args.unet_path,
                                 args.pretrained_vae_model_name_or_path, unet_dtype, state.device, args.scheduler)
        if args.vae_dtype == "unet":
            pipeline.vae.to(unet_dtype)
        if args.vae_tiling:
            pipeline.vae.enable_tiling()
        if args.compile:
            compile_blocks(pipeline.unet)
        sampler = Sampler(pipeline, settings)
    for group in ours:
        if group.missing:
            generate_group(group, sampler, args, state)
        state.wait_for_everyone()
        if state.is_main_process:
            finish_group(group, record, args)
            release(group.folder)
            print(f"wrote {group.manifest}")
    if args.manifest_list and state.is_main_process:
        Path(args.manifest_list).write_text("".join(f"{group.manifest}\n" for group in groups))


if __name__ == "__main__":
    run_program(main)
