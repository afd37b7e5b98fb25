"""Every metric against an independent computation from the same weight files, and what it refuses."""

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, linear
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer

from common.errors import UserError
from eval.metrics import METRICS, PUBLISHED, load_metric, metric_class, metric_version, read_config
from eval.metrics.base import CLIP_MEAN, CLIP_STD, to_pixels

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red cat", "", "naïve café in 東京 [ENC]", "a very long prompt " * 40]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in PROMPTS]


def normalised(images) -> torch.Tensor:
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).double() / 255
    return ((pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)).float()


def test_pickscore_is_the_clip_cosine(metrics_config, images):
    folder = metrics_config.parent / "pickscore"
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=normalised(images), **tokens).logits_per_image / model.logit_scale.exp()
    assert torch.allclose(load_metric("pickscore", config=metrics_config).score(images, PROMPTS), logits.diagonal(), atol=1e-5)


@pytest.mark.parametrize("name, weights", [
    ("clip", "clip/open_clip_pytorch_model.bin"), ("hpsv2", "hpsv2/HPS_v2_compressed.pt"),
    ("hpsv2.1", "hpsv2/HPS_v2.1_compressed.pt")])
def test_open_clip_metrics_are_the_clip_cosine(name, weights, metrics_config, images):
    architecture = next((metrics_config.parent / weights).parent.glob("*.json"))
    open_clip.add_model_config(architecture)
    model, _, preprocess = open_clip.create_model_and_transforms(architecture.stem,
                                                                 pretrained=str(metrics_config.parent / weights))
    model.eval()
    with torch.no_grad():
        out = model(torch.stack([preprocess(image) for image in images]),
                    open_clip.get_tokenizer(architecture.stem)(PROMPTS))
    cosines = (out[0] * out[1]).sum(-1)
    assert torch.allclose(load_metric(name, config=metrics_config).score(images, PROMPTS), cosines, atol=1e-5)


def test_the_two_hps_versions_differ(metrics_config, images):
    old, new = (load_metric(name, config=metrics_config).score(images, PROMPTS) for name in ("hpsv2", "hpsv2.1"))
    assert (old - new).abs().max() > 1e-3


def test_aesthetics_is_five_matrices_on_the_normalised_embedding(metrics_config, images):
    clip = CLIPModel.from_pretrained(metrics_config.parent / "aesthetics" / "clip").eval()
    with torch.no_grad():
        embeds = clip.get_image_features(normalised(images)).pooler_output.double()
    x = embeds / embeds.norm(dim=1, keepdim=True)
    state = torch.load(metrics_config.parent / "aesthetics" / "aesthetic-model.pth", weights_only=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{layer}.weight"].double().T + state[f"layers.{layer}.bias"].double()
    metric = load_metric("aes", config=metrics_config)
    assert torch.allclose(metric.score(images, PROMPTS).double(), x[:, 0], atol=1e-6)
    assert torch.equal(metric.score(images, PROMPTS), metric.score(images, ["other"] * 4))


def attention(x, context, query, key, value, heads, mask=None):
    split = lambda t: t.view(*t.shape[:2], heads, -1).transpose(1, 2)  # noqa: E731
    q, k, v = split(query(x)), split(key(context)), split(value(context))
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None, :], float("-inf"))
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def image_reward_by_hand(state: dict, pixels: torch.Tensor, tokens, heads: int) -> torch.Tensor:
    """ImageReward from the official keys, in plain torch: ViT, then BERT with cross-attention, then five matrices."""
    part = lambda name: (lambda x: linear(x, state[f"{name}.weight"], state[f"{name}.bias"]))  # noqa: E731
    norm = lambda name, x, eps: layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)  # noqa: E731

    vit = "blip.visual_encoder."
    patches = torch.nn.functional.conv2d(pixels, state[vit + "patch_embed.proj.weight"],
                                         state[vit + "patch_embed.proj.bias"],
                                         stride=state[vit + "patch_embed.proj.weight"].shape[-1]).flatten(2).mT
    x = torch.cat([state[vit + "cls_token"].expand(len(pixels), -1, -1), patches], 1) + state[vit + "pos_embed"]
    for n in range(2):
        block = f"{vit}blocks.{n}."
        width = x.shape[-1]
        y = norm(block + "norm1", x, 1e-6)
        qkv = part(block + "attn.qkv")(y).split(width, -1)
        mixed = attention(y, y, *(lambda _, t=t: t for t in qkv), heads=1)
        x = x + part(block + "attn.proj")(mixed)
        x = x + part(block + "mlp.fc2")(gelu(part(block + "mlp.fc1")(norm(block + "norm2", x, 1e-6))))
    image_tokens = norm(vit + "norm", x, 1e-6)

    bert = "blip.text_encoder."
    length = tokens.input_ids.shape[1]
    x = state[bert + "embeddings.word_embeddings.weight"][tokens.input_ids]
    x = norm(bert + "embeddings.LayerNorm", x + state[bert + "embeddings.position_embeddings.weight"][:length], 1e-12)
    mask = tokens.attention_mask.bool()
    for n in range(2):
        layer = f"{bert}encoder.layer.{n}."
        for kind, context, hidden in (("attention", None, mask), ("crossattention", image_tokens, None)):
            name = layer + kind
            mixed = attention(x, x if context is None else context, part(name + ".self.query"), part(name + ".self.key"),
                              part(name + ".self.value"), heads, hidden)
            x = norm(name + ".output.LayerNorm", part(name + ".output.dense")(mixed) + x, 1e-12)
        inner = part(layer + "output.dense")(gelu(part(layer + "intermediate.dense")(x)))
        x = norm(layer + "output.LayerNorm", inner + x, 1e-12)
    x = x[:, 0]
    for n in (0, 2, 4, 6, 7):
        x = part(f"mlp.layers.{n}")(x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_equals_the_same_written_out(metrics_config, images):
    folder = metrics_config.parent / "imagereward"
    tokenizer = BertTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids[0, 0] == tokenizer.cls_token_id and 30523 in tokens.input_ids[2]
    state = {key: value.double() for key, value in torch.load(folder / "ImageReward.pt", weights_only=True).items()}
    by_hand = image_reward_by_hand(state, normalised(images).double(), tokens, heads=2)
    scores = load_metric("imagereward", config=metrics_config).score(images, PROMPTS)
    assert scores.std() > 0.05  # the comparison is not of constants
    assert torch.allclose(scores.double(), by_hand, atol=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_scores_depend_on_no_neighbour_and_any_size_will_do(name, metrics_config, load_once):
    if name == "oracle":
        return  # its own tests are in tests/shapes
    metric = load_once(name, config=metrics_config)
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (height, 90, 4), dtype=np.uint8), "RGBA") for height in (64, 70, 200)]
    together = metric.score(images, PROMPTS[:3])
    assert together.shape == (3,) and together.dtype == torch.float32 and together.isfinite().all()
    alone = torch.cat([metric.score([image], [prompt]) for image, prompt in zip(images, PROMPTS)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_pixels_are_resized_by_pil_and_cut_in_the_middle():
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (100, 200, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((100, 50), Image.Resampling.BICUBIC).crop((25, 0, 75, 50)))
    assert np.array_equal(to_pixels(image, 50).permute(1, 2, 0).numpy(), expected)


def test_version_follows_content_not_place(metrics_config, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(metrics_config.parent, copy)
    for name in PUBLISHED:
        assert metric_version(name, metrics_config) == metric_version(name, copy / "metrics.yaml")
    state = torch.load(copy / "aesthetics" / "aesthetic-model.pth", weights_only=True)
    state["layers.7.bias"] += 1
    torch.save(state, copy / "aesthetics" / "aesthetic-model.pth")
    assert metric_version("aesthetics", metrics_config) != metric_version("aesthetics", copy / "metrics.yaml")
    assert metric_version("clip", metrics_config) == metric_version("clip", copy / "metrics.yaml")


@pytest.mark.slow
def test_every_metric_is_where_the_registry_says():
    """And of clip's model alone: diffusers is not imported for it."""
    assert all(metric_class(name).__name__ == known.name for name, known in METRICS.items())
    check = ("import sys, eval.scoring; from eval.metrics import metric_class; metric_class('clip'); "
             "print([name for name in ('diffusers', 'peft') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_published_config_names_the_published_models():
    config = read_config()
    assert config["pickscore"]["model"] == "yuvalkirstain/PickScore_v1" and set(PUBLISHED) <= set(config)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("executed",))


@pytest.mark.parametrize("name, change, said", [
    ("imagereward", {"extra": "blip.surprise"}, "unknown keys blip.surprise"),
    ("imagereward", {"drop": "blip.text_encoder.encoder.layer.0.crossattention.self.query.weight"},
     "missing encoder.layer.0.* Is it the file of another model, or of another release"),
    ("hpsv2", {"drop": "state_dict"}, "holds no state_dict"),
    ("hpsv2", {"evil": True}, "nothing in it was executed"),
    ("imagereward", {"evil": True}, "nothing in it was executed"),
    ("pickscore", {"settings": {"model": "nobody/nothing"}}, "cannot load PickScore"),
    ("clip", {"settings": {"pretrained": "no_such_tag"}}, "cannot be loaded"),
    ("clip", {"settings": {"architecture": "ViT-X"}}, "no architecture ViT-X"),
    ("hpsv2", {"settings": {"checkpoint": "xswu/HPSv2"}}, "no file or folder here"),
    ("pickscore", {"settings": {"image_size": 224}}, "set image_size: 64"),
    ("pickscore", {"settings": {"modle": "x"}}, "no setting modle"),
    ("nonsense", {}, "no metric named nonsense"),
])
def test_bad_weights_and_settings_are_reported_in_one_line(name, change, said, metrics_config, tmp_path):
    config = read_config(metrics_config)
    if "settings" in change:
        config[name] = config[name] | change["settings"]
    elif change:
        key, filename = ("model", "ImageReward.pt") if name == "imagereward" else ("checkpoint", "HPS_v2_compressed.pt")
        folder = tmp_path / "weights"
        shutil.copytree(config[name][key], folder)
        config[name][key] = str(folder)
        state = torch.load(folder / filename, weights_only=True)
        if "extra" in change:
            state[change["extra"]] = torch.zeros(1)
        if "drop" in change:
            del state[change["drop"]]
            state = state or {"x": torch.zeros(1)}
        torch.save(state, folder / filename)
        if "evil" in change:
            (folder / filename).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=said) as error:
        load_metric(name, config=config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, setting, value", [
    ("clip", "architecture", "clip/tiny-clip.json"), ("clip", "pretrained", "weights.pt"), ("hpsv2", "checkpoint", "a/b/c"),
    ("pickscore", "model", "./pickscore"), ("pickscore", "model", "models/pickscore"), ("hpsv2", "checkpoint", "hpsv2/weights"),
])
def test_a_path_that_is_nowhere_is_named_in_full(name, setting, value, metrics_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    config = {key: value for key, value in read_config(metrics_config)[name].items() if key in ("model", "architecture", "processor")}
    (tmp_path / "mine" / "m.yaml").write_text(json.dumps({name: config | {setting: value}}))
    with pytest.raises(UserError, match=f"no.* file {re.escape(str(tmp_path / 'mine' / value))}: paths in a metrics.yaml are relative"):
        load_metric(name, config=Path("mine") / "m.yaml")


def test_bad_config_file(tmp_path):
    (tmp_path / "m.yaml").write_text("pickscore: [1, 2")
    with pytest.raises(UserError, match="is no YAML"):
        read_config(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text("pikscore: {}")
    with pytest.raises(UserError, match="no metric named pikscore"):
        read_config(tmp_path / "m.yaml")
    with pytest.raises(UserError, match="no metrics config"):
        read_config(tmp_path / "absent.yaml")


def test_tiny_width_is_configurable(tmp_path):
    from shapes.tiny_metrics import write_tiny_metrics
    config = write_tiny_metrics(tmp_path, vision_width=64, image_size=32, patch_size=16)
    assert json.loads((tmp_path / "imagereward" / "med_config.json").read_text())["encoder_width"] == 64
    image = Image.new("RGB", (32, 32), "red")
    assert all(load_metric(name, config=config).score([image], ["x"]).isfinite().all() for name in PUBLISHED)


def test_another_head_than_the_published_one_is_a_warning(metrics_config, tmp_path, monkeypatch, capsys):
    config = read_config(metrics_config)
    load_metric("aesthetics", config=config)
    assert "is not LAION's published head" in capsys.readouterr().err
    head = next(metrics_config.parent.glob("aesthetics/aesthetic-model.pth"))
    monkeypatch.setattr("eval.metrics.aesthetics.HEAD_SHA256", hashlib.sha256(head.read_bytes()).hexdigest())
    load_metric("aesthetics", config=config)
    assert capsys.readouterr().err == ""
