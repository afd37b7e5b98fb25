import random

import datasets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from shapes.mixture import held_out, mixed_flaws, sample_drawing, write_training_pairs
from shapes.base_model import train_text_encoder, train_vae
from shapes.drawing import Flaws, caption, parse, random_drawing
from shapes.oracle import judge
from shapes.pipeline import SHIPPED, base_pipeline, draw_images


def test_one_caption_in_eight_is_held_out_and_training_never_sees_it(tmp_path):
    rng = random.Random(0)
    single = [random_drawing(rng, several=0) for _ in range(4000)]
    assert sum(map(held_out, single)) / len(single) == pytest.approx(1 / 8, abs=0.03)
    assert held_out(sample_drawing(rng, unseen=True)) and not held_out(sample_drawing(rng, unseen=False))

    write_training_pairs(tmp_path / "pairs", 50, seed=0)
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path))
    assert not any(held_out(parse(text)) for text in rows["caption"])


def test_the_mixture_is_half_good_half_poor():
    rng = random.Random(0)
    assert sum(mixed_flaws(rng) == Flaws() for _ in range(1000)) / 1000 == pytest.approx(0.5, abs=0.05)


def test_autoencoder_and_text_encoder_learn(capsys):
    torch.manual_seed(0)
    vae = train_vae(20, 5, seed=0, num_images=64, batch_size=8)
    encoder = train_text_encoder(20, seed=0, batch_size=8)
    losses = {}
    for line in capsys.readouterr().out.splitlines():
        name, rest = line.split(": step")
        losses.setdefault(name, []).append(float(rest.split("loss ")[1].split(",")[0]))
    assert {"autoencoder", "text encoder"} <= losses.keys()
    assert all(losses[name][-1] < 0.9 * losses[name][0] for name in ("autoencoder", "text encoder")), losses
    latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert latents.shape == (1, 4, 16, 16) and vae.config.scaling_factor != 0.18215
    embedding = encoder.get_input_embeddings().weight
    assert (embedding.abs().sum(dim=1) > 0).sum() < 100  # only the captions' own words


def test_the_shipped_base_is_small_and_follows_prompts(tmp_path):
    sizes = [path.stat().st_size for path in SHIPPED.rglob("*.safetensors")]
    assert len(sizes) == 3 and sum(sizes) <= 16e6
    pipeline = StableDiffusionPipeline.from_pretrained(base_pipeline(tmp_path / "base"))
    assert all(parameter.dtype == torch.float32 for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)
               for parameter in part.parameters())
    rng = random.Random(3)
    prompts = [caption(sample_drawing(rng, unseen=True)) for _ in range(48)]
    images = draw_images(pipeline, prompts, num_inference_steps=20)
    assert images[0].size == (32, 32)
    judgements = [judge(image, prompt) for image, prompt in zip(images, prompts)]
    assert sum(judgement.all_right for judgement in judgements) / len(judgements) >= 0.85
    alone = draw_images(pipeline, prompts[5:6], first_seed=5, num_inference_steps=20)[0]
    difference = np.abs(np.asarray(alone, float) - np.asarray(images[5], float))
    assert difference.mean() < 2  # the noise is the image's own; a batch of another size only rounds differently


def test_a_new_call_reuses_the_opened_folder(tmp_path):
    folder = base_pipeline(tmp_path / "base")
    before = (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert (base_pipeline(tmp_path / "base") / "unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
