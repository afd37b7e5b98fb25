"""PickScore (Kirstain et al. 2023, Pick-a-Pic): a CLIP ViT-H/14 tuned on human choices."""

import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from eval.metrics.base import Metric, cosine, pretrained
from models.weights import from_hub

MAX_TOKENS = 77


class PickScore(Metric):
    """Cosine of text and image embeddings, without the logit scale (about 0.2)."""

    def __init__(self, device: str = "cpu", model: str = "yuvalkirstain/PickScore_v1",
                 processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", image_size: int = 224) -> None:
        super().__init__(device)
        self.image_size = image_size
        self.tokenizer = from_hub(CLIPTokenizer, processor, "PickScore's tokenizer")
        normalisation = from_hub(CLIPImageProcessor, processor, "PickScore's image processor")
        self.mean, self.std = normalisation.image_mean, normalisation.image_std
        self.model = pretrained(CLIPModel, model, "PickScore").to(self.device)
        self._check_image_size(self.model.config.vision_config.image_size)

    def _score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS,
                                return_tensors="pt").to(self.device)
        text = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        image = self.model.get_image_features(pixel_values=pixels)
        return cosine(image.pooler_output, text.pooler_output)
