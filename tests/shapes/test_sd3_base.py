"""The SD3-shaped base: it draws, and a base without T5 goes through every path."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from common.train_options import ModelOptions
from models.family import open_family
from models.guidance import encode_with_empty
from models.networks import load_network
from models.sampling import SamplingSettings, sample
from shapes.oracle import judge
from shapes.pairs import write_pairs
from shapes.pipeline import BASE_OPTIONS, NETWORKS, base_pipeline, draw_images, open_base

PROMPTS = ["a red circle on a blue background", "a large white cross on a green background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return base_pipeline(tmp_path_factory.mktemp("sd3") / "base", "sd3")


def test_it_is_small_and_draws_what_it_is_asked_for(folder):
    [weights] = NETWORKS["sd3"][1].glob("*.safetensors")
    assert weights.stat().st_size <= 6e6
    pipeline = open_base("sd3", folder)
    assert pipeline.text_encoder_3 is None and pipeline.transformer.dtype == torch.float32
    images = draw_images(pipeline, PROMPTS, num_inference_steps=14)
    assert images[0].size == (32, 32) and all(judge(image, prompt).all_right for image, prompt in zip(images, PROMPTS))

    family = open_family(ModelOptions(str(folder), **BASE_OPTIONS["sd3"]))  # eval.generate's and validation's way
    family.load_encoders(torch.float32, torch.device("cpu"))
    text, empty = encode_with_empty(family, PROMPTS, torch.device("cpu"))
    assert text["embeddings"].shape == (2, 22, 128)
    settings = SamplingSettings(32, 32, 14, 1.5, "diffusers", "default", torch.float32)
    ours = sample(family, load_network(family), text, empty, [0, 1], settings)
    assert max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(ours, images)) <= 1


def test_a_whole_network_trains_without_t5_and_its_result_opens(folder, train_run, tmp_path):
    pairs, output = write_pairs(tmp_path / "pairs", 4, resolution=32), tmp_path / "out"
    options = BASE_OPTIONS["sd3"] | dict(pretrained_model_name_or_path=folder, train_data_dir=pairs, resolution=32, lora_rank=0,
                                         mixed_precision="no", max_train_steps=1, output_dir=output)
    train_run([f"--{name}={value}" for name, value in options.items()])
    opened = StableDiffusion3Pipeline.from_pretrained(output, text_encoder_3=None, tokenizer_3=None)
    assert opened.text_encoder_3 is None and opened.transformer.config.num_layers == 4
