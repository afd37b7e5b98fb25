"""Noising, targets and conditioning against the definitions, on the tiny pipelines."""

import json
import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler, StableDiffusionXLPipeline

from common.errors import UserError
from common.train_options import ModelOptions
from models.family import open_family

CPU = torch.device("cpu")
SIZE = (64, 64)


def opened(pipeline, **options):
    family = open_family(ModelOptions(str(pipeline), **options))
    family.load_encoders(torch.float32, CPU)
    return family


@pytest.fixture(scope="module")
def sd15(tiny_sd15):
    return opened(tiny_sd15)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl):
    return opened(tiny_sdxl)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_noised_latents_and_the_target_are_by_definition(prediction_type, tiny_sd15):
    family = open_family(ModelOptions(str(tiny_sd15)))
    family.scheduler.register_to_config(prediction_type=prediction_type)
    latents, noise = randn(4, 4, 8, 8), randn(2, 4, 8, 8, seed=1).repeat(2, 1, 1, 1)
    times = family.times(torch.tensor([0.1234, 0.9999]).double()).repeat(2)
    assert times.tolist() == [123, 999, 123, 999]
    x_t, target = family.noise(latents, noise, times)
    alpha = family.scheduler.alphas_cumprod[times].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
    expected = noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(target, expected)


def test_perturbed_input_keeps_the_target(sd15):
    latents, noise, times = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([10, 500])
    x_t, target = sd15.noise(latents, noise, times)
    perturbed, same = sd15.noise(latents, noise, times, noise + 1)
    alpha = sd15.scheduler.alphas_cumprod[times].reshape(-1, 1, 1, 1)
    assert torch.equal(target, same)
    torch.testing.assert_close(perturbed - x_t, (1 - alpha).sqrt().expand_as(x_t))


def test_latents_are_sampled_scaled_and_decoded_again(sd15):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    moments, noise = sd15.encode_images(images), randn(2, 4, 8, 8)
    distribution = sd15.vae.encode(images).latent_dist
    assert moments.is_contiguous() and torch.equal(moments, distribution.parameters)
    expected = (distribution.mean + distribution.std * noise) * sd15.vae.config.scaling_factor
    torch.testing.assert_close(sd15.latents(moments, noise), expected)
    torch.testing.assert_close(sd15.decode(expected), sd15.vae.decode(expected / sd15.vae.config.scaling_factor).sample)


def test_sdxl_conditioning_is_the_diffusers_pipelines(sdxl, tiny_sdxl):
    """Prompt embeddings, pooled embedding and size ids equal those that StableDiffusionXLPipeline computes."""
    text = sdxl.encode_text(sdxl.tokenize(["a red circle", ""]))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(text["embeddings"][:1], prompt_embeds)
    torch.testing.assert_close(text["pooled"][:1], pooled)
    conditioning = sdxl.network_arguments(text, (64, 32))["added_cond_kwargs"]
    assert conditioning["text_embeds"] is text["pooled"]
    assert conditioning["time_ids"].tolist() == 2 * [[64, 32, 0, 0, 64, 32]]


def test_sd15_embeds_with_the_last_hidden_state(sd15):
    tokens = sd15.tokenize(["a red circle", "word " * 200])
    assert tokens["input_ids.0"].shape == (2, 77)
    text = sd15.encode_text(tokens)
    torch.testing.assert_close(text["embeddings"], sd15.text_encoders[0](tokens["input_ids.0"]).last_hidden_state)
    assert text.keys() == {"embeddings"} and sd15.network_arguments(text, SIZE).keys() == {"encoder_hidden_states"}


def test_how_much_of_a_caption_is_read(sd15):
    lengths, read = sd15.tokens_read(["a red cat", "word " * 200, ""])
    assert lengths.tolist() == [3, 200, 0] and read.tolist() == [3, 75, 0]
    assert "sequence-length-is-longer-than-the-specified-maximum" not in sd15.tokenizers["text_encoder"].deprecation_warnings


def renamed(pipeline, folder, name, **index):
    """The pipeline under another name, where the small files are, and its model_index.json changed."""
    shutil.copytree(pipeline, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / name / "model_index.json").read_text())
    (folder / name / "model_index.json").write_text(json.dumps(content | index))
    return open_family(ModelOptions(str(folder / name)))


@pytest.mark.parametrize("name, times", [
    ("turbofan-refinery/sdxl", set(range(1000))),  # the folders above say nothing
    ("sdxl-turbo", {249, 499, 749, 999}),
    ("stable-diffusion-xl-refiner-1.0", set(range(200))),
])
def test_turbo_and_refiner_take_their_own_timesteps(name, times, tiny_sdxl, tmp_path):
    family = renamed(tiny_sdxl, tmp_path, name)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert set(family.times(uniform).tolist()) == times
    assert family.license == ("other" if name == "sdxl-turbo" else "openrail++")
    # A turbo's schedule ends in noise alone.
    assert (family.scheduler.alphas_cumprod[-1] < 1e-6) == (name == "sdxl-turbo")


def test_the_refiner_has_one_text_encoder_and_an_aesthetic_score_among_its_size_ids(tiny_sdxl, tmp_path):
    family = renamed(tiny_sdxl, tmp_path, "stable-diffusion-xl-refiner-1.0", _class_name="StableDiffusionXLImg2ImgPipeline")
    assert family.encoder_names == ("text_encoder_2",) and len(family.tokenizers) == 1
    text = {"embeddings": torch.zeros(2, 77, 8), "pooled": torch.zeros(2, 8)}
    assert family.network_arguments(text, SIZE)["added_cond_kwargs"]["time_ids"].tolist() == 2 * [[64, 64, 0, 0, 6.0]]


def test_the_family_is_what_the_base_says_it_is(sd15, sdxl, tiny_sd15, tiny_sdxl, tmp_path):
    assert (sd15.name, sdxl.name) == ("sd15", "sdxl") and (sd15.resolution, sdxl.resolution) == (64, 64)
    assert opened(tiny_sdxl, sdxl=True).name == "sdxl"
    with pytest.raises(UserError, match="--sdxl, but .* is SD1.5: leave --sdxl out"):
        open_family(ModelOptions(str(tiny_sd15), sdxl=True))
    for base, said in (("no/such-model", "no base model no/such-model: .*hub"), ("/no/such/folder", "no base model at /no/such"),
                       (str(tmp_path), "is no diffusers pipeline: it has no model_index.json")):
        with pytest.raises(UserError, match=said):
            open_family(ModelOptions(base))
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(UserError, match="is a SanaPipeline, which is no known family"):
        open_family(ModelOptions(str(tmp_path)))
    for damaged in ("[", "[]", "{}", "[" * 100_000):
        (tmp_path / "model_index.json").write_text(damaged)
        with pytest.raises(UserError, match="model_index.json of .* is damaged"):
            open_family(ModelOptions(str(tmp_path)))


def test_sizes_that_it_cannot_draw_are_refused(sd15):
    assert sd15.latent_shape(64, 128) == (4, 8, 16)
    with pytest.raises(UserError, match="60x64 is no size for SD1.5: both must be multiples of 8"):
        sd15.latent_shape(60, 64)


def test_another_vae_takes_the_bases_place(tiny_sd15, tiny_sdxl, sdxl):
    family = opened(tiny_sd15, pretrained_vae_model_name_or_path=str(tiny_sdxl))
    assert family.scaling_factor == sdxl.scaling_factor
    assert all(map(torch.equal, family.vae.state_dict().values(), sdxl.vae.state_dict().values()))
    assert opened(tiny_sd15, pretrained_vae_model_name_or_path=str(tiny_sdxl / "vae")).scaling_factor == sdxl.scaling_factor
    family.drop_encoders()
    assert family.vae is None and family.text_encoders == []


def test_the_sampler_is_euler_or_the_pipelines_own(sd15):
    euler, own = (sd15.sampler(kind, 4, CPU) for kind in ("euler", "default"))
    assert isinstance(euler, EulerDiscreteScheduler) and isinstance(own, PNDMScheduler) and len(euler.timesteps) == 4


def test_the_empty_prompt_is_encoded_or_zeros_as_in_the_bases_pipeline(sd15, sdxl, tiny_sdxl, tmp_path):
    from models.guidance import encode_with_empty

    assert not sd15.empty_is_zeros and sdxl.empty_is_zeros
    assert not renamed(tiny_sdxl, tmp_path, "encoded", force_zeros_for_empty_prompt=False).empty_is_zeros
    text, empty = encode_with_empty(sdxl, ["a red circle"], CPU)
    assert all((rows == 0).all() for rows in empty.values()) and text["pooled"].shape[0] == 1
    text, empty = encode_with_empty(sd15, ["a red circle"], CPU)
    torch.testing.assert_close(empty["embeddings"], sd15.encode_text(sd15.tokenize([""]))["embeddings"])
