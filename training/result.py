"""What a finished run leaves: the network's weights, and a diffusers pipeline that opens as it is."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.files import make_readable, whole_file
from models.devices import writing
from models.family import Family
from models.lora import ADAPTER, COMFYUI_FILE, LORA_FILE, for_comfyui, merge_lora, read_metadata
from models.networks import load_network
from models.policy import Policy
from models.weights import from_hub, load_strictly
from training.run import Run
from training.state import LoraWeights, whole_state


def save_result(run: Run, family: Family, policy: Policy) -> tuple[str, Path]:
    """A full diffusers pipeline in output_dir, of a UNet unet.pth too; of LoRA its weights, for ComfyUI too, and the
    pipeline with them merged unless --merge_lora is off. Returns what was left, in words, and the path that the evaluation
    takes. Every process must call this. Raises UserError on all alike."""
    folder, accelerator = run.output_dir, run.accelerator
    whole = not policy.lora or run.options.model.merge_lora
    state = None if policy.lora else whole_state(accelerator, policy.network)
    with writing(f"the result into {folder}", folder):
        if policy.lora:
            LoraWeights(family, run).save(accelerator, policy.network, folder)
            if run.main:
                scale = run.options.model.lora_alpha / run.options.model.lora_rank
                facts = {name: fact for name, fact in read_metadata(folder / LORA_FILE).items() if name != ADAPTER}
                save_file(for_comfyui(load_file(folder / LORA_FILE), scale), folder / COMFYUI_FILE, metadata=facts)
                make_readable(folder)
        if run.main and whole:
            network = load_network(family, family.options.unet_init)
            if policy.lora:  # into the base as it is on disk: the one in training has weights in the compute dtype
                merge_lora(family, network, load_file(folder / LORA_FILE), folder / LORA_FILE)
            else:
                load_strictly(network, state, "the trained policy")
            if family.backbone == "unet":
                with whole_file(folder / family.weights_file) as aside:
                    torch.save(network.state_dict(), aside)
            save_pipeline(run, family, network)
    left = [str(folder / LORA_FILE)] if policy.lora else []
    left += [f"a diffusers pipeline in {folder}"] if whole else []
    if not (whole and family.backbone == "unet"):
        return " and ".join(left), folder
    weights = folder / family.weights_file
    return " and ".join([str(weights), *left]), weights


def save_pipeline(run: Run, family: Family, network: nn.Module) -> None:
    """The base pipeline with this network, so that DiffusionPipeline.from_pretrained(output_dir) opens it."""
    options, absent = family.options, [name for name, part in family.index.items() if part == [None, None]]
    parts = dict.fromkeys(absent) | {family.backbone: network}  # diffusers wants to be told that there is no T5
    if options.pretrained_vae_model_name_or_path:
        parts["vae"] = family.read_vae()
    pipeline = from_hub(family.pipeline, options.pretrained_model_name_or_path, "the base pipeline",
                        revision=options.revision, cache_dir=options.cache_dir, **parts)
    pipeline.save_pretrained(run.output_dir)
    for name in pipeline.components:
        if (run.output_dir / name).is_dir():
            make_readable(run.output_dir / name)
