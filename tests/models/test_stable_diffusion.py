"""Noising, targets and conditioning against the definitions, on the tiny pipelines."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from common.train_options import parse_arguments
from models.stable_diffusion import choose_timesteps, encode_images, encode_prompts, noisy_batch, size_ids, winners_first
from data.images import scale_pixels
from models.policy import load_frozen_encoders, load_tokenizers_and_scheduler


def models_of(pipeline, *flags):
    args = parse_arguments(["--pretrained_model_name_or_path", str(pipeline), "--train_data_dir", "unused",
                            "--resolution", "64", "--lr_warmup_steps", "0", *flags])
    models = load_tokenizers_and_scheduler(args)
    load_frozen_encoders(models, args, torch.float32, torch.device("cpu"))
    return models, args


def batch(models, pairs=2, members=2, **extra):
    generator = torch.Generator().manual_seed(0)
    ids = [tokenizer(["a red circle", ""][:pairs], padding="max_length", max_length=77, return_tensors="pt").input_ids
           for tokenizer in models.tokenizers]
    return {"pixel_values": torch.randint(0, 256, (pairs, members, 3, 64, 64), generator=generator, dtype=torch.uint8),
            "vae_noise": torch.randn(pairs, members, 4, 8, 8, generator=generator),
            "noise": torch.randn(pairs, 4, 8, 8, generator=generator),
            "timestep": torch.tensor([0.1234, 0.9999])[:pairs].double(),
            **{f"input_ids.{n}": tensor for n, tensor in enumerate(ids)}, **extra}


def test_winners_come_first():
    per_pair = torch.tensor([[1, -1], [2, -2], [3, -3]])
    assert winners_first(per_pair).tolist() == [1, 2, 3, -1, -2, -3]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_pair_shares_noise_and_timestep_and_the_target_is_by_definition(prediction_type, tiny_sd15):
    models, args = models_of(tiny_sd15)
    models.scheduler.register_to_config(prediction_type=prediction_type)
    data = batch(models)
    inputs = noisy_batch(data, models, args)
    assert inputs.timesteps.tolist() == [123, 999, 123, 999]
    images = scale_pixels(winners_first(data["pixel_values"]))
    latents = encode_images(models.vae, images, winners_first(data["vae_noise"]))
    alpha = models.scheduler.alphas_cumprod[inputs.timesteps].reshape(-1, 1, 1, 1)
    noise = data["noise"].repeat(2, 1, 1, 1)
    torch.testing.assert_close(inputs.latents, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
    expected = noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(inputs.target, expected)
    embeddings = inputs.conditioning["encoder_hidden_states"]
    assert torch.equal(embeddings[:2], embeddings[2:]) and not torch.equal(embeddings[0], embeddings[1])


def test_latents_are_sampled_and_scaled(tiny_sd15):
    models, _ = models_of(tiny_sd15)
    data = batch(models)
    images = scale_pixels(winners_first(data["pixel_values"]))
    distribution = models.vae.encode(images).latent_dist
    noise = winners_first(data["vae_noise"])
    expected = (distribution.mean + distribution.std * noise) * models.vae.config.scaling_factor
    torch.testing.assert_close(encode_images(models.vae, images, noise), expected)


def test_perturbed_input_keeps_the_target(tiny_sd15):
    models, args = models_of(tiny_sd15)
    plain = noisy_batch(batch(models), models, args)
    perturbed = noisy_batch(batch(models, input_noise=batch(models)["noise"] + 1), models, args)
    assert torch.equal(plain.target, perturbed.target)
    shift = perturbed.latents - plain.latents
    torch.testing.assert_close(shift[:2], shift[2:], msg="winner's and loser's perturbation is one")
    assert shift.abs().min() > 0


def test_sdxl_conditioning_is_the_diffusers_pipelines(tiny_sdxl):
    """Prompt embeddings, pooled embedding and size ids equal those that StableDiffusionXLPipeline computes."""
    models, args = models_of(tiny_sdxl, "--sdxl")
    inputs = noisy_batch(batch(models), models, args)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(inputs.conditioning["encoder_hidden_states"][:1], prompt_embeds)
    torch.testing.assert_close(inputs.conditioning["added_cond_kwargs"]["text_embeds"][:1], pooled)
    assert inputs.conditioning["added_cond_kwargs"]["time_ids"].tolist() == 4 * [[64, 64, 0, 0, 64, 64]]


def test_sd15_embeds_with_the_last_hidden_state(tiny_sd15):
    models, _ = models_of(tiny_sd15)
    ids = batch(models)["input_ids.0"]
    embeddings, pooled = encode_prompts(models.text_encoders, [ids], sdxl=False)
    torch.testing.assert_close(embeddings, models.text_encoders[0](ids).last_hidden_state)
    assert pooled is None


def test_turbo_and_refiner_take_their_own_timesteps_and_size_ids(tiny_sdxl):
    _, args = models_of(tiny_sdxl, "--sdxl")
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert set(choose_timesteps(uniform, args, 1000).tolist()) == set(range(1000))
    args.pretrained_model_name_or_path = "/models/turbofan/refiner/sdxl"
    assert set(choose_timesteps(uniform, args, 1000).tolist()) == set(range(1000))
    args.pretrained_model_name_or_path = "stabilityai/sdxl-turbo"
    assert set(choose_timesteps(uniform, args, 1000).tolist()) == {249, 499, 749, 999}
    args.pretrained_model_name_or_path = "stabilityai/stable-diffusion-xl-refiner-1.0"
    assert set(choose_timesteps(uniform, args, 1000).tolist()) == set(range(200))
    assert size_ids(args, 2, torch.device("cpu")).tolist() == 2 * [[64, 64, 0, 0, 6.0]]
