"""ImageReward (Xu et al. 2023): BLIP's image-grounded text encoder and a linear head.

The published ImageReward.pt is loaded into transformers' BLIP classes; MAPS renames its keys.
"""

import json
import re
from pathlib import Path

import torch
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from eval.metrics.base import OTHER_FILE, Metric, linear_head, weight_file
from common.errors import UserError
from models.weights import from_hub, load_strictly, read_state_dict

MAX_TOKENS = 35
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # the published normalisation of the reward
PUBLISHED = "take the one of THUDM/ImageReward"
HEAD_WIDTH = 64  # every ViT of BLIP has attention heads of this width
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")

VISION_MAP = {  # official name -> transformers' name, inside blip.visual_encoder
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embedding.\1",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"encoder.layers.\1.self_attn.qkv.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"encoder.layers.\1.self_attn.projection.\2",
    r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)": r"encoder.layers.\1.mlp.fc\2.\3",
    r"norm\.(weight|bias)": r"post_layernorm.\1",
}


def split_state(state: dict[str, torch.Tensor], source: Path) -> tuple[dict, dict, dict]:
    """ImageReward.pt's state dict as those of the vision model, the text model and the head, in transformers' names.

    Raises UserError for a key that is neither known nor among the unused ones (UNUSED).
    """
    vision, text, head, strange = {}, {}, {}, []
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            pattern = next((pattern for pattern in VISION_MAP if re.fullmatch(pattern, name)), None)
            if pattern is None:
                strange.append(key)
            else:
                vision[re.sub(pattern, VISION_MAP[pattern], name)] = value
        elif UNUSED.fullmatch(key):
            continue
        elif key.startswith("blip.text_encoder."):
            text[key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("mlp.layers."):
            head[key.removeprefix("mlp.layers.")] = value
        else:
            strange.append(key)
    if strange or not (vision and text and head):
        named = f"unknown keys {', '.join(strange[:3])}" if strange else "parts are missing"
        raise UserError(f"{source} is no ImageReward checkpoint ({named}): {PUBLISHED}")
    return vision, text, head


def vision_config(vision: dict[str, torch.Tensor], source: Path) -> BlipVisionConfig:
    """The ViT's sizes, read from its weights: ImageReward's is ViT-L/16 at 224, layer-norm eps 1e-6."""
    try:
        width = vision["embeddings.class_embedding"].shape[-1]
        patch = vision["embeddings.patch_embedding.weight"].shape[-1]
        patches = vision["embeddings.position_embedding"].shape[1] - 1
        mlp_width = vision["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"{source} is no ImageReward checkpoint (the image encoder lacks {error}): {PUBLISHED}") from None
    layers = 1 + max(int(key.split(".")[2]) for key in vision if key.startswith("encoder.layers."))
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD_WIDTH), image_size=round(patches**0.5) * patch, patch_size=patch,
        hidden_act="gelu", layer_norm_eps=1e-6,
    )


def text_config(path: Path) -> BlipTextConfig:
    """med_config.json (a BERT config with encoder_width) as transformers' config."""
    try:
        med = json.loads(path.read_text())
        return BlipTextConfig(
            vocab_size=med["vocab_size"], hidden_size=med["hidden_size"], encoder_hidden_size=med["encoder_width"],
            intermediate_size=med["intermediate_size"], num_hidden_layers=med["num_hidden_layers"],
            num_attention_heads=med["num_attention_heads"], max_position_embeddings=med["max_position_embeddings"],
            hidden_act=med["hidden_act"], layer_norm_eps=med["layer_norm_eps"], pad_token_id=med["pad_token_id"],
            is_decoder=True,  # transformers' word for "has cross-attention"
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no ImageReward med_config.json ({error!r}): {PUBLISHED}") from None


class ImageReward(Metric):
    """The normalised reward, about 0 with a spread of 1.

    `model` is a hub repository or folder that holds ImageReward.pt and med_config.json; `tokenizer` a BERT tokenizer.
    """

    def __init__(self, device: str = "cpu", model: str = "THUDM/ImageReward", tokenizer: str = "bert-base-uncased",
                 image_size: int = 224) -> None:
        super().__init__(device)
        self.image_size = image_size
        self.tokenizer = from_hub(BertTokenizer, tokenizer, "ImageReward's tokenizer")
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # ids 30522 and 30523 of BLIP's vocabulary
        path = weight_file(model, "ImageReward.pt")
        vision, text, head = split_state(read_state_dict(path), path)
        config = vision_config(vision, path)
        self._check_image_size(config.image_size)
        self.vision = BlipVisionModel(config)
        self.text = BlipTextModel(text_config(weight_file(model, "med_config.json")), add_pooling_layer=False)
        self.head = linear_head(self.text.config.hidden_size)
        for part, state in ((self.vision, vision), (self.text, text), (self.head, head)):
            load_strictly(part, state, path, OTHER_FILE)
            part.to(self.device).eval()

    def _score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS,
                                return_tensors="pt").to(self.device)
        image_tokens = self.vision(pixel_values=pixels).last_hidden_state
        hidden = self.text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                           encoder_hidden_states=image_tokens).last_hidden_state
        reward = self.head(hidden[:, 0]).squeeze(-1)
        return (reward - REWARD_MEAN) / REWARD_STD
