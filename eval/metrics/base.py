"""What the metrics share: the signature, the pixels they look at, and reading their weight files."""

import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torchvision.transforms.functional as transforms
from huggingface_hub import hf_hub_download
from PIL import Image

from common.errors import UserError, first_line
from models.weights import from_hub

OTHER_FILE = "Is it the file of another model, or of another release?"  # where a metric's weights do not fit
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """RGB, shorter side to `size` (bicubic, by PIL as in the official evaluation), centre crop: uint8 (3, size, size)."""
    image = transforms.resize(image.convert("RGB"), size, transforms.InterpolationMode.BICUBIC)
    return transforms.pil_to_tensor(transforms.center_crop(image, size))


class Metric:
    """Scores how well images answer their prompts; higher is better.

    Set by load_metric: `name` and `label` (the registry's) and `version` (names weights and settings; kept scores are
    keyed by it). A subclass sets `image_size` and writes `_score(pixels, prompts)`: scores (N,) of normalised pixels
    (N, 3, image_size, image_size) on the metric's device. One that looks at the images themselves writes `score`, which
    may be called from several threads at once.
    """

    name: str
    label: str
    version: str
    image_size: int  # side of the pixels it looks at
    mean = CLIP_MEAN
    std = CLIP_STD

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    @classmethod
    def settings(cls) -> list[str]:
        """What a section of metrics.yaml may set: the constructor's arguments."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "device")]

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Scores (N,), float32 on the CPU, of N images of any size and their N prompts."""
        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(lambda image: to_pixels(image, self.image_size), images))
        return self.score_pixels(torch.stack(pixels), prompts)

    @torch.inference_mode()
    def score_pixels(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """score() from images that to_pixels has prepared: uint8 (N, 3, image_size, image_size)."""
        mean, std = (torch.tensor(value, device=self.device).view(3, 1, 1) for value in (self.mean, self.std))
        pixels = (pixels.to(self.device).float() / 255 - mean) / std
        return self._score(pixels, list(prompts)).float().cpu()

    def _check_image_size(self, model_size: int) -> None:
        if model_size != self.image_size:
            raise UserError(f"{type(self).__name__}: the model looks at {model_size} pixels, not {self.image_size}: "
                            f"set image_size: {model_size} in its section of metrics.yaml")


def cosine(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Row-wise cosine (N,) of (N, D) embeddings, without a logit scale."""
    image_embeds = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
    text_embeds = text_embeds / text_embeds.norm(dim=-1, keepdim=True)
    return (image_embeds * text_embeds).sum(dim=-1)


def linear_head(width: int) -> torch.nn.Sequential:
    """The head of LAION's aesthetic predictor and of ImageReward: five linear layers with dropout between, and no
    activations; parameters at 0, 2, 4, 6 and 7."""
    return torch.nn.Sequential(
        torch.nn.Linear(width, 1024), torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128), torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64), torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16), torch.nn.Linear(16, 1),
    )


def pretrained(model_class, source: str, what: str) -> torch.nn.Module:
    """model_class.from_pretrained in float32; a parameter that `source` lacks is a UserError, never left random."""
    model, loading = from_hub(model_class, source, what, dtype=torch.float32, output_loading_info=True)
    if loading["missing_keys"]:
        raise UserError(f"{source} is no checkpoint for {what}: it lacks {sorted(loading['missing_keys'])[0]}")
    return model.eval()


def weight_file(source: str | os.PathLike, filename: str) -> Path:
    """The file that `source` names: a file itself, a folder or a hub repository that holds `filename`."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / filename).is_file():
            raise UserError(f"the folder {path} holds no {filename}")
        return path / filename
    try:
        return Path(hf_hub_download(str(source), filename))
    except Exception as error:  # the hub's client raises a dozen kinds; all mean that the file cannot be fetched
        raise UserError(f"no {filename}: {source} is no file or folder here, and the hub cannot give it "
                        f"({first_line(error, 160)})") from None
