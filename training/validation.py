"""Images of policy and reference from the same noise, side by side, while training."""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from accelerate.utils.memory import clear_device_cache
from torch import nn
from tqdm import tqdm

from data.draws import derived_seed
from models.family import Family, Text
from models.guidance import encode_prompts
from models.policy import Policy
from models.sampling import SamplingSettings, sample
from training.run import Run


def encode_validation(run: Run, family: Family) -> tuple[Text, Text] | None:
    """The text of --validation_prompts and of the empty prompt, on the process that draws; None where nothing is drawn.

    Where a cache replaces the encoders they are read for this alone, once: call it before the network is loaded.
    """
    prompts, own = run.options.run.validation_prompts, not family.text_encoders
    if not prompts or not run.main:
        return None
    if own:
        family.load_encoders(run.dtype, run.device)
    text = encode_prompts(family, prompts, run.device), encode_prompts(family, [family.empty_prompt], run.device)
    if own:
        family.drop_encoders()
        clear_device_cache(garbage_collection=True)
    return text


class Validation:
    """validation(step) draws --validation_prompts into OUTPUT_DIR/validation/step-STEP/N.png, and shows them in the
    trackers. text: what encode_validation gave. Every process must call it; the main one draws."""

    def __init__(self, run: Run, family: Family, policy: Policy, text: tuple[Text, Text] | None):
        self.run, self.family, self.policy, self.text = run, family, policy, text
        options, resolution = run.options.run, run.options.data.resolution
        self.prompts = options.validation_prompts
        self.settings = SamplingSettings(resolution, resolution, options.validation_inference_steps,
                                         options.validation_guidance, "diffusers", "euler", torch.float32)
        self.what = "reference left, policy right" if policy.has_reference else "policy"

    def __call__(self, step: int) -> None:
        if self.prompts and self.run.main:
            self.draw_all(step)
        if self.prompts:
            self.run.accelerator.wait_for_everyone()

    def draw_all(self, step: int) -> None:
        folder = self.run.output_dir / "validation" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        network, device = self.policy.network, self.run.device
        was_training = network.training
        network.eval()
        text, empty = self.text
        with self.vae():
            sheets = []
            for number in range(len(self.prompts)):
                row = {name: rows[number:number + 1] for name, rows in text.items()}
                images = []
                if self.policy.has_reference:
                    with self.policy.as_reference(device) as reference:
                        images.append(self.draw(reference, row, empty))
                images.append(self.draw(network, row, empty))
                sheets.append(side_by_side(images))
        network.train(was_training)
        for number, (sheet, prompt) in enumerate(zip(sheets, self.prompts)):
            sheet.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(prompt, encoding="utf-8")
        tqdm.write(f"step {step}: images of --validation_prompts ({self.what}) in {folder}")
        self.show_in_trackers(sheets, step)

    def draw(self, network: nn.Module, text: dict, empty: dict) -> Image.Image:
        seed = derived_seed(self.run.seed, 3)
        with self.run.accelerator.autocast():
            return sample(self.family, network, text, empty, [seed], self.settings, noise_device=torch.device("cpu"))[0]

    @contextmanager
    def vae(self):
        """The family's VAE, for as long as the images take where a cache replaces it."""
        own = self.family.vae is None
        if own:
            self.family.load_vae(self.run.dtype, self.run.device)
        try:
            yield
        finally:
            if own:
                self.family.drop_encoders()

    def show_in_trackers(self, sheets: list[Image.Image], step: int) -> None:
        title = f"validation ({self.what})"
        for tracker in self.run.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images(title, np.stack([np.asarray(sheet) for sheet in sheets]), step, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb
                tracker.log({title: [wandb.Image(sheet, caption=prompt) for sheet, prompt in zip(sheets, self.prompts)]},
                            step=step)


def side_by_side(images: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        sheet.paste(image, (number * image.width, 0))
    return sheet
