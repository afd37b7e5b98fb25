"""The models that shapes.tiny_metrics writes."""

import json
import re
from pathlib import Path

import open_clip
import torch
import yaml
from transformers import (BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig,
                          CLIPImageProcessor, CLIPModel)

from eval.metrics.base import linear_head
from eval.metrics.clip import architecture_name
from shapes.pipeline import clip_tokenizer

CLIP_VOCABULARY = 49408
BERT_VOCABULARY = 30522  # bert-base-uncased's; BLIP adds [DEC] and [ENC]


def write_clip(folder: Path, width: int, image_size: int, patch_size: int) -> None:
    """A transformers CLIPModel folder with its processor and tokenizer, as PickScore and openai/clip-vit-* are."""
    heads = max(1, width // 16)
    config = CLIPConfig(
        vision_config=dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                           num_attention_heads=heads, image_size=image_size, patch_size=patch_size,
                           projection_dim=width),
        text_config=dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                         num_attention_heads=heads, vocab_size=CLIP_VOCABULARY, bos_token_id=49406,
                         eos_token_id=49407, projection_dim=width),
        projection_dim=width,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": image_size},
                       crop_size={"height": image_size, "width": image_size}).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)


def write_open_clip(config_path: Path, checkpoint: Path, vision: dict, text: dict, embed_dim: int) -> None:
    """An open_clip architecture as JSON and weights for it under `state_dict`, as HPSv2's checkpoints hold them."""
    config_path.write_text(json.dumps({"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}, indent=2))
    model = open_clip.CLIP(**open_clip.get_model_config(architecture_name(str(config_path))))
    torch.save({"state_dict": model.state_dict()}, checkpoint)


def write_imagereward(folder: Path, vision: dict, text: dict) -> None:
    """ImageReward.pt and med_config.json under the official names; `vision` and `text` go to transformers' configs."""
    vision_model = BlipVisionModel(BlipVisionConfig(layer_norm_eps=1e-6, hidden_act="gelu", **vision))
    text_model = BlipTextModel(BlipTextConfig(vocab_size=BERT_VOCABULARY + 2, encoder_hidden_size=vision["hidden_size"],
                                              is_decoder=True, **text), add_pooling_layer=False)
    head = linear_head(text["hidden_size"])
    for model in (vision_model, text_model, head):  # spread out, so that scores differ and a mixed-up key shows
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name.lower() and "weight" in name), std=0.02)
            elif "embedding" not in name:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    width = text["hidden_size"]
    state = {f"blip.visual_encoder.{official_vision_name(key)}": value
             for key, value in vision_model.state_dict().items()}
    state |= {f"blip.text_encoder.{key}": value for key, value in text_model.state_dict().items()}
    state |= {f"mlp.layers.{key}": value for key, value in head.state_dict().items()}
    state |= {f"blip.{name}_proj.{part}": torch.randn(shape) for name, size in (("vision", vision["hidden_size"]),
              ("text", width)) for part, shape in (("weight", (256, size)), ("bias", (256,)))}
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "pad_token_id": 0,
        "max_position_embeddings": 512, "vocab_size": BERT_VOCABULARY + 2, "encoder_width": vision["hidden_size"],
        "add_cross_attention": True, "add_type_embeddings": False, **text}, indent=2))


def official_vision_name(name: str) -> str:
    """transformers' name of an image-encoder parameter as ImageReward.pt calls it."""
    name = name.replace("embeddings.class_embedding", "cls_token").replace("embeddings.position_embedding", "pos_embed")
    name = name.replace("embeddings.patch_embedding", "patch_embed.proj").replace("post_layernorm", "norm")
    name = re.sub(r"encoder\.layers\.(\d+)\.self_attn\.projection", r"blocks.\1.attn.proj", name)
    name = re.sub(r"encoder\.layers\.(\d+)\.self_attn", r"blocks.\1.attn", name)
    return re.sub(r"encoder\.layers\.(\d+)\.", r"blocks.\1.", name).replace("layer_norm", "norm")


def write_bert_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer of bert-base-uncased's size that knows the printable characters and no word."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces += characters + [f"##{character}" for character in characters]
    pieces += [f"[unused{index}]" for index in range(BERT_VOCABULARY - len(pieces))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(folder)


def write_models(output: Path, vision_width: int, image_size: int, patch_size: int, seed: int) -> Path:
    """All models and their metrics.yaml in `output`; returns the yaml's path."""
    for name in ("pickscore", "hpsv2", "aesthetics", "clip", "imagereward"):
        (output / name).mkdir(parents=True, exist_ok=True)
    vision = {"width": vision_width, "layers": 2, "head_width": 16, "image_size": image_size, "patch_size": patch_size}
    text = {"context_length": 77, "vocab_size": CLIP_VOCABULARY, "width": vision_width, "heads": 2, "layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_clip(output / "pickscore", vision_width, image_size, patch_size)
        write_clip(output / "aesthetics" / "clip", vision_width, image_size, patch_size)
        head = linear_head(vision_width).state_dict()
        torch.save({f"layers.{key}": value for key, value in head.items()}, output / "aesthetics/aesthetic-model.pth")
        write_open_clip(output / "hpsv2/tiny-hps.json", output / "hpsv2/HPS_v2_compressed.pt", vision, text, vision_width)
        write_open_clip(output / "hpsv2/tiny-hps.json", output / "hpsv2/HPS_v2.1_compressed.pt", vision, text,
                        vision_width)
        write_open_clip(output / "clip/tiny-clip.json", output / "clip/open_clip_pytorch_model.bin", vision, text,
                        vision_width)
        write_imagereward(
            output / "imagereward",
            vision=dict(hidden_size=vision_width, intermediate_size=2 * vision_width, num_hidden_layers=2,
                        num_attention_heads=max(1, vision_width // 64), image_size=image_size, patch_size=patch_size),
            text=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
    write_bert_tokenizer(output / "imagereward" / "tokenizer")
    hps = {"architecture": "hpsv2/tiny-hps.json", "checkpoint": "hpsv2"}
    sections = {
        "pickscore": {"model": "pickscore", "processor": "pickscore"},
        "hpsv2": hps, "hpsv2.1": dict(hps),
        "aesthetics": {"model": "aesthetics/clip", "head": "aesthetics"},
        "clip": {"architecture": "clip/tiny-clip.json", "pretrained": "clip/open_clip_pytorch_model.bin"},
        "imagereward": {"model": "imagereward", "tokenizer": "imagereward/tokenizer"},
    }
    config = output / "metrics.yaml"
    config.write_text(yaml.safe_dump({name: {**section, "image_size": image_size, "untrained": True}
                                      for name, section in sections.items()}, sort_keys=False))
    return config
