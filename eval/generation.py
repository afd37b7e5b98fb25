"""Images of prompt groups from any family's network, shared by the processes and written batch by batch."""

import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState
from PIL import Image

from common.errors import UserError, warn
from common.files import fingerprint, make_room, write_text
from common.locks import release
from common.progress import progress_bar
from eval.folders import NAMES, Group, abandon_folder, find_missing, finish_group, plan_group, prepare_folder, write_images
from eval.options import GenerateOptions
from models.devices import COMPUTE_DTYPES
from models.family import Family
from models.guidance import encode_prompts
from models.lora import lora_file, read_facts
from models.networks import load_network, weights_in, what_is_loaded
from models.sampling import SamplingSettings, sample
from models.speed import check_compiler, compile_blocks

Draw = Callable[[list[str], list[int]], list[Image.Image]]  # prompts and their seeds to images


def generate(options: GenerateOptions, family: Family, prompts: dict[str, list[str]]) -> None:
    """Make what is missing of each prompt group's images, with the processes that were launched. Raises UserError."""
    several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    state = PartialState(cpu=several_on_cpu, timeout=timedelta(hours=1))  # cpu: else each process would be on its own
    torch.backends.cudnn.deterministic = True
    state.print(settle_defaults(options, family, state.device))
    dtype = COMPUTE_DTYPES[options.mixed_precision]
    if state.device.type == "cpu":
        state.print(f"no GPU here: generating on the CPU, network in {dtype}")
    settings = SamplingSettings(options.height, options.width, options.num_inference_steps, options.cfg,
                                options.cfg_convention, options.scheduler,
                                torch.float32 if options.latents_dtype == "float32" else dtype)
    record = settings_record(options, family, settings, state.device)
    groups = [plan_group(name, of_group, options) for name, of_group in prompts.items()]
    if state.is_main_process:
        if options.manifest_list:
            make_room(options.manifest_list, "--manifest_list")
        for group in groups:
            if not options.overwrite and group.made_elsewhere:
                print(f"{group.manifest} exists: its images are kept as they are")
            else:
                prepare_folder(group, record, options.overwrite)
    state.wait_for_everyone()

    ours = [group for group in groups if not group.made_elsewhere]
    for group in ours:
        group.missing = find_missing(group)
        state.print(f"{group.folder}: {len(group.jobs) - len(group.missing)} of {len(group.jobs)} images are there")
    state.wait_for_everyone()  # nobody writes before everybody has looked
    try:
        draw = None
        if any(group.missing for group in ours):
            draw = load_models(options, family, settings, state.device)
            state.print(f"loaded {what_is_loaded(family, options.unet_path)}")
    except UserError:
        for group in ours if state.is_main_process else []:
            abandon_folder(group)
        raise
    for group in ours:
        if group.missing:
            generate_group(group, draw, options, state)
        state.wait_for_everyone()
        if state.is_main_process:
            finish_group(group, record, options)
            release(group.folder)
            print(f"wrote {group.manifest}")
    if options.manifest_list and state.is_main_process:
        write_text(options.manifest_list, "".join(f"{group.manifest}\n" for group in groups))


def settle_defaults(options: GenerateOptions, family: Family, device: torch.device) -> str:
    """Put the base's values in where the command line is silent; how images are sampled, in words. Raises UserError for a size
    that the base cannot take."""
    options.pretrained_model_name_or_path = options.pretrained_model_name_or_path or family.options.pretrained_model_name_or_path
    options.pretrained_vae_model_name_or_path = family.options.pretrained_vae_model_name_or_path
    options.height, options.width = (side or family.resolution for side in (options.height, options.width))
    family.latent_shape(options.height, options.width)
    if family.flow and options.cfg_convention == "official" and options.cfg is None:
        raise UserError(f"--cfg_convention official: give --cfg too; {family.label}'s own {family.guidance:g} is in its "
                        "pipeline's sense")
    if options.max_sequence_length and family.sequence_length is None:
        warn(f"--max_sequence_length means nothing for {family.label}")
    convention, scheduler = ("diffusers", "default") if family.flow else ("official", "euler")
    sampling = {"num_inference_steps": family.steps, "cfg": family.guidance, "cfg_convention": convention, "scheduler": scheduler}
    origin = {name: " (default)" if getattr(options, name) is None else "" for name in sampling}
    for name, value in sampling.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.batch_size = options.batch_size or family.images_at_once
    options.mixed_precision = options.mixed_precision or ("no" if device.type == "cpu" else "bf16")
    if options.output_dir is None:
        unet = Path(options.unet_path)
        named = re.sub(r"[^\w.-]+", "_", options.unet_path)
        options.output_dir = str(unet if unet.is_dir() else unet.parent if unet.exists() else Path("output") / named)
    return (f"{family.label} at {options.height}x{options.width}: {options.num_inference_steps} steps"
            f"{origin['num_inference_steps']}, guidance {options.cfg:g}{origin['cfg']} in the {options.cfg_convention} sense, "
            f"{options.scheduler} scheduler")


# --- what the images are made of -----------------------------------------------------------------------------------------

def settings_record(options: GenerateOptions, family: Family, settings: SamplingSettings, device: torch.device) -> dict:
    """Everything that the images depend on, as the manifest says it and resuming compares it."""
    dtype = COMPUTE_DTYPES[options.mixed_precision]
    vae = options.pretrained_vae_model_name_or_path
    return {
        **{name: getattr(options, name) for name in NAMES},
        "base_identity": identity(options.pretrained_model_name_or_path, lambda folder: base_files(folder, family)),
        "unet_identity": identity(options.unet_path, lambda folder: network_files(folder, family)),
        "vae_identity": identity(vae, vae_files) if vae else "base",
        "lora": adapter_facts(options.unet_path, family),
        "seed": options.seed, "seed_per_prompt": options.seed_per_prompt,
        "num_images_per_prompt": options.num_images_per_prompt, "negative_prompt": "",
        **asdict(settings), "latents_dtype": name_of(settings.latents_dtype), "empty_prompt": options.empty_prompt,
        "guidance_scale_diffusers": settings.guidance_scale, "noise_dtype": name_of(dtype), "noise_device": device.type,
        "unet_dtype": name_of(dtype), "text_encoder_dtype": name_of(dtype), "vae_tiling": options.vae_tiling,
        "vae_dtype": name_of(vae_dtype(options, family)), "compiled": options.compile,
        **({"max_sequence_length": family.sequence_length} if family.sequence_length else {}),
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def vae_dtype(options: GenerateOptions, family: Family) -> torch.dtype:
    return family.vae_dtype(COMPUTE_DTYPES["no" if options.vae_dtype == "float32" else options.mixed_precision])


def identity(source: str, files_of: Callable[[Path], list[Path]]) -> str:
    """What a model name stands for: the content of a local file, or of the files that are loaded from a local folder
    (images and manifests may lie there too), else the name itself."""
    path = Path(source)
    return f"sha256:{fingerprint(path, files_of(path) if path.is_dir() else None)}" if path.exists() else source


def model_files(folder: Path) -> list[Path]:
    """What diffusers reads of a network's or VAE's folder."""
    return [folder / "config.json", *folder.glob("diffusion_pytorch_model*")]


def network_files(folder: Path, family: Family) -> list[Path]:
    """What models.networks.load_network reads of a folder."""
    found = weights_in(folder, family.backbone)
    if found is None or found.is_dir():
        return model_files(found or folder)
    return [found] if found.name == family.weights_file else [found, folder / "progress.json"]  # LoRA's: what it began from


def adapter_facts(source: str, family: Family) -> dict[str, str] | None:
    """What a LoRA file says of the run that trained it; None where `source` is none, or says nothing."""
    path = Path(source)
    found = weights_in(path, family.backbone) if path.is_dir() else path
    file = lora_file(found) if found and found.is_file() else None
    return read_facts(file) or None if file else None


def vae_files(folder: Path) -> list[Path]:
    return model_files(folder / "vae" if (folder / "vae").is_dir() else folder)


def base_files(folder: Path, family: Family) -> list[Path]:
    """What is read of a pipeline's folder."""
    others = ["scheduler", *(part for part in family.encoder_sources() if part != "vae")]
    return [folder / "model_index.json", *model_files(folder / family.backbone), *model_files(folder / "vae"),
            *(file for part in others for file in (folder / part).glob("*"))]


# --- making them ---------------------------------------------------------------------------------------------------------

def load_models(options: GenerateOptions, family: Family, settings: SamplingSettings, device: torch.device) -> Draw:
    """Load the network that --unet_path names, the VAE and the text encoders; the function that draws with them. Raises
    UserError."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if options.compile:
        check_compiler(device)
    dtype = COMPUTE_DTYPES[options.mixed_precision]
    network = load_network(family, options.unet_path).to(device, dtype)
    family.load_encoders(dtype, device, vae_dtype=vae_dtype(options, family))
    if options.vae_tiling:
        family.vae.enable_tiling()
    if options.compile:
        compile_blocks(network, family.compiled_blocks)
    empty = encode_prompts(family, [family.empty_prompt], device)  # as the published evaluation has it, for every base
    if options.empty_prompt == "pipeline" and family.empty_is_zeros:
        empty = {name: torch.zeros_like(rows) for name, rows in empty.items()}

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return sample(family, network, encode_prompts(family, prompts, device), empty, seeds, settings)

    return draw


def generate_group(group: Group, draw: Draw, options: GenerateOptions, state: PartialState) -> None:
    """Make this process's share of a group's missing images.

    Batches are cut by position, whatever is missing of them, so that an image is sampled in the same company on any
    number of devices, fresh or resumed, and comes out bit-equal.
    """
    size = options.batch_size
    cut = [group.jobs[start:start + size] for start in range(0, len(group.jobs), size)]
    todo = [batch for batch in cut if any(job.filename in group.missing for job in batch)]
    mine = todo[state.process_index::state.num_processes]
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    total = sum(job.filename in group.missing for batch in mine for job in batch)
    writing: Future | None = None
    with (ThreadPoolExecutor(1) as writer,
          progress_bar(total=total, desc=f"{group.name}{share}", unit=" images", disable=not state.is_main_process) as bar):
        for batch in mine:
            images = draw([job.prompt for job in batch], [job.seed for job in batch])
            kept = [(image, job) for image, job in zip(images, batch) if job.filename in group.missing]
            if writing:
                writing.result()  # a full disk stops the run here
            writing = writer.submit(write_images, group.folder, *zip(*kept))
            bar.update(len(kept))
        if writing:
            writing.result()
