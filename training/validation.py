"""Images of policy and reference from the same noise, side by side, while training."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import (AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline,
                       StableDiffusionXLPipeline)
from PIL import Image
from tqdm.auto import tqdm

from training.options import TrainArguments
from data.draws import seeded_generator
from models.policy import Models, adapters_off, on_device
from models.weights import from_hub


def make_pipeline(models: Models, unet, args: TrainArguments, device: torch.device) -> DiffusionPipeline:
    """A diffusers pipeline around the run's own models; what the device does not hold is loaded from the base."""
    kind = StableDiffusionXLPipeline if args.sdxl else StableDiffusionPipeline
    parts = {"unet": unet, "safety_checker": None, "feature_extractor": None} if not args.sdxl else {"unet": unet}
    if models.vae is not None:
        parts["vae"] = models.vae
        for number, encoder in enumerate(models.text_encoders):
            parts["text_encoder" if number == 0 else "text_encoder_2"] = encoder
    elif args.pretrained_vae_model_name_or_path:  # with a cache
        parts["vae"] = from_hub(AutoencoderKL, args.pretrained_vae_model_name_or_path, "the VAE",
                                cache_dir=args.cache_dir)
    pipeline = kind.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision,
                                    cache_dir=args.cache_dir, **parts)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.no_grad()
def draw(pipeline: DiffusionPipeline, unet, prompt: str, seed: int, args: TrainArguments,
         accelerator: Accelerator) -> Image.Image:
    pipeline.unet = unet
    with accelerator.autocast():
        return pipeline(prompt, height=args.resolution, width=args.resolution, negative_prompt="",
                        num_inference_steps=args.validation_inference_steps,
                        guidance_scale=args.validation_guidance, generator=seeded_generator(seed, 3)).images[0]


def side_by_side(images: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        sheet.paste(image, (number * image.width, 0))
    return sheet


def validate(models: Models, policy, args: TrainArguments, accelerator: Accelerator, step: int) -> list[Path]:
    """Write OUTPUT_DIR/validation/step-STEP/N.png (reference left, policy right) and show them in the trackers.

    Called by the main process alone: it runs no collective. `policy` is the unwrapped UNet.
    """
    folder = Path(args.output_dir) / "validation" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    was_training = policy.training
    policy.eval()
    pipeline = make_pipeline(models, policy, args, accelerator.device)
    paths = []
    for number, prompt in enumerate(args.validation_prompts):
        images = []
        if models.reference is not None:
            with on_device(models.reference, accelerator.device) as reference:
                images.append(draw(pipeline, reference, prompt, args.seed, args, accelerator))
        elif args.lora_rank:
            with adapters_off(policy):
                images.append(draw(pipeline, policy, prompt, args.seed, args, accelerator))
        images.append(draw(pipeline, policy, prompt, args.seed, args, accelerator))
        paths.append(folder / f"{number}.png")
        side_by_side(images).save(paths[-1])
        (folder / f"{number}.txt").write_text(prompt, encoding="utf-8")
    policy.train(was_training)
    tqdm.write(f"step {step}: images of --validation_prompts (reference left, policy right) in {folder}")
    show_in_trackers(accelerator, paths, args.validation_prompts, step)
    return paths


def show_in_trackers(accelerator: Accelerator, paths: list[Path], prompts: list[str], step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(Image.open(path)) for path in paths])
            tracker.writer.add_images("validation (reference | policy)", stacked, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb
            tracker.log({"validation (reference | policy)": [wandb.Image(str(path), caption=prompt)
                                                             for path, prompt in zip(paths, prompts)]}, step=step)
