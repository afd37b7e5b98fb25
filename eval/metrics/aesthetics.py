"""LAION's aesthetic predictor (sac+logos+ava1-l14-linearMSE) on CLIP ViT-L/14; it does not look at the prompt."""

import torch
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from common.errors import warn
from common.files import digest
from eval.metrics.base import OTHER_FILE, Metric, linear_head, pretrained, weight_file
from models.weights import from_hub, load_strictly, read_state_dict

HEAD_FILE = "aesthetic-model.pth"
HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"  # of the published file


class Aesthetics(Metric):
    """The head's output on the L2-normalised image embedding (about 5.5).

    `head` is a hub repository or folder that holds aesthetic-model.pth, or such a file (keys layers.{0,2,4,6,7}.*).
    """

    def __init__(self, device: str = "cpu", model: str = "openai/clip-vit-large-patch14",
                 head: str = "trl-lib/ddpo-aesthetic-predictor", image_size: int = 224) -> None:
        super().__init__(device)
        self.image_size = image_size
        normalisation = from_hub(CLIPImageProcessor, model, "the aesthetic predictor's image processor")
        self.mean, self.std = normalisation.image_mean, normalisation.image_std
        self.model = pretrained(CLIPVisionModelWithProjection, model, "the aesthetic predictor").to(self.device)
        self._check_image_size(self.model.config.image_size)
        path = weight_file(head, HEAD_FILE)
        if digest(path) != HEAD_SHA256:
            warn(f"{path} is not LAION's published head of the aesthetic predictor (sha256 {HEAD_SHA256[:12]}...): its scores "
                 "compare with those of no table")
        state = {key.removeprefix("layers."): value for key, value in read_state_dict(path).items()}
        self.head = linear_head(self.model.config.projection_dim)
        load_strictly(self.head, state, path, OTHER_FILE)
        self.head.to(self.device).eval()

    def _score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        embeds = self.model(pixel_values=pixels).image_embeds
        return self.head(embeds / embeds.norm(dim=-1, keepdim=True)).squeeze(-1)
