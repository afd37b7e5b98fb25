"""CLIP score: cosine of OpenCLIP ViT-H/14 embeddings (laion2b_s32b_b79k)."""

from pathlib import Path

import open_clip
import torch

from eval.metrics.base import Metric, cosine
from common.errors import UserError, first_line


def architecture_name(architecture: str) -> str:
    """open_clip's name of an architecture; a JSON file in open_clip's form is registered under its stem first."""
    if Path(architecture).suffix == ".json":
        open_clip.add_model_config(Path(architecture))
        architecture = Path(architecture).stem
    if open_clip.get_model_config(architecture) is None:
        raise UserError(f"open_clip has no architecture {architecture}: give one of its names or a JSON file like its own")
    return architecture


class OpenCLIPMetric(Metric):
    """Cosine of an open_clip model's text and image embeddings, without the logit scale."""

    def __init__(self, device: str, architecture: str, image_size: int) -> None:
        super().__init__(device)
        self.image_size = image_size
        self.architecture = architecture_name(architecture)
        self.tokenizer = open_clip.get_tokenizer(self.architecture)  # truncates at the model's context, 77 tokens

    def _use(self, model: torch.nn.Module) -> None:
        self.model = model.to(self.device).eval()
        size = model.visual.image_size
        self._check_image_size(size[0] if isinstance(size, tuple) else size)

    def _score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts).to(self.device)
        return cosine(self.model.encode_image(pixels), self.model.encode_text(tokens))


class CLIPScore(OpenCLIPMetric):
    """CLIP ViT-H/14. `pretrained` is one of open_clip's tags or a file of weights."""

    def __init__(self, device: str = "cpu", architecture: str = "ViT-H-14", pretrained: str = "laion2b_s32b_b79k",
                 image_size: int = 224) -> None:
        super().__init__(device, architecture, image_size)
        try:
            self._use(open_clip.create_model(self.architecture, pretrained=pretrained, precision="fp32"))
        except UserError:
            raise
        except Exception as error:  # open_clip and the hub raise a dozen kinds; all mean no such weights
            raise UserError(f"CLIP's weights {pretrained} for {self.architecture} cannot be loaded: "
                            f"{first_line(error, 160)}") from None
