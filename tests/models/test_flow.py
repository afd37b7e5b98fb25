"""Times, noising, shifts and safeguard of flow matching against the definitions; what the families refuse."""

import functools
import json
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline, SD3Transformer2DModel
from safetensors.torch import save_file

from common.errors import UserError
from common.train_options import MemoryOptions, ModelOptions
from losses import winner_preserving_scale
from models.family import open_family, read_model_index
from models.flow import dynamic_shift, pack, unpack
from models.networks import load_network
from models.policy import make_policy
from tests.flow_pipelines import KINDS, build_flow_pipeline, sd3

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(built_once):
    return {kind: built_once(kind, functools.partial(build_flow_pipeline, kind=kind)) for kind in KINDS}


def family_of(base, **options):
    return open_family(ModelOptions(str(base), **options))


def uniforms(count=20_000):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# --- times and noise -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, quantiles", [  # flow.md's of the published scripts; Qwen-Image's and FLUX.1's shift is inert
    ("sd3", (0.46, 0.75, 0.92)), ("flux", (0.10, 0.50, 0.90)), ("qwen_image", (0.10, 0.50, 0.90)), ("z_image", (0.25, 0.75, 0.97))])
def test_times_have_the_published_quantiles(kind, quantiles, bases):
    sigma = family_of(bases[kind]).times(uniforms()) / 1000
    assert sigma.dtype == torch.float32 and sigma.min() >= 0 and sigma.max() < 1
    assert np.quantile(sigma, (0.1, 0.5, 0.9)) == pytest.approx(quantiles, abs=0.011)


def test_times_are_functions_of_a_pairs_own_uniform(bases):
    for sampling in ("uniform", "logit_normal"):
        family = family_of(bases["flux"], timestep_sampling=sampling, logit_mean=0.5, logit_std=0.7, timestep_shift=2.0)
        u = torch.rand(64, dtype=torch.float64)
        together = family.times(u)
        assert torch.equal(together, torch.cat([family.times(each) for each in u.split(1)]))
        assert torch.equal(together.argsort(), u.argsort()), "more uniform is more noise"
        assert family.times(torch.zeros(1, dtype=torch.float64)) == 0
    sigma = torch.sigmoid(0.5 + 0.7 * torch.distributions.Normal(0, 1).icdf(u.float()))
    torch.testing.assert_close(together / 1000, 2 * sigma / (1 + sigma), rtol=1e-4, atol=1e-5)


def test_noising_is_by_definition_and_input_noise_keeps_the_target(bases):
    family = family_of(bases["sd3"])
    x0, noise, other = torch.randn(3, 2, 4, 8, 8)
    times = torch.tensor([250.0, 900.0])
    sigma = torch.tensor([0.25, 0.9]).reshape(-1, 1, 1, 1)
    x_t, target = family.noise(x0, noise, times)
    torch.testing.assert_close(x_t, (1 - sigma) * x0 + sigma * noise)
    assert torch.equal(target, noise - x0)
    perturbed, same = family.noise(x0, noise, times, other)
    assert torch.equal(same, target) and torch.equal(perturbed, family.noise(x0, other, times)[0])


def test_a_pairs_lambda_is_the_same_for_velocity_noise_and_image():
    """The residuals of one prediction in the three spaces differ by a factor of the pair's sigma, which cancels."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x0, noise_pair, velocity = (torch.randn(8, 4, 6, 6, generator=generator) for _ in range(3))
        noise = noise_pair[:4].repeat(2, 1, 1, 1)
        sigma = (torch.rand(4, generator=generator) * 0.9 + 0.05).repeat(2).reshape(-1, 1, 1, 1)
        x_t = (1 - sigma) * x0 + sigma * noise
        spaces = [(velocity, noise - x0), (x_t + (1 - sigma) * velocity, noise), (x_t - sigma * velocity, x0)]
        scales = [winner_preserving_scale(*space, 0.6, "sample") for space in spaces]
        for scale in scales[1:]:
            torch.testing.assert_close(scale, scales[0], rtol=1e-3, atol=1e-3)


def test_the_dynamic_shift_is_the_pipelines(bases):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    config = family_of(bases["flux"]).scheduler.config
    for tokens in (64, 1024, 4096):
        assert dynamic_shift(config, tokens) == pytest.approx(calculate_shift(tokens))
    assert math.exp(dynamic_shift(config, 1024)) == pytest.approx(1.88, abs=0.01)
    assert dynamic_shift(family_of(bases["sd3"]).scheduler.config, 1024) is None


def test_packing_is_the_pipelines():
    latents = torch.randn(2, 4, 6, 10)
    for pipeline in (FluxPipeline, QwenImagePipeline):
        assert torch.equal(pack(latents), pipeline._pack_latents(latents, *latents.shape))
    assert torch.equal(unpack(pack(latents), 6, 10), latents)


# --- text ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", list(KINDS))
def test_long_captions_are_counted_as_they_are_cut(kind, bases):
    family = family_of(bases[kind], max_sequence_length=64)
    lengths, read = family.tokens_read(["a", "b" * 300])
    assert read[0] == lengths[0] < read[1] < lengths[1] and read[1] <= 64
    assert family.sequence_length == 64 and family_of(bases[kind]).sequence_length == family.default_sequence
    with pytest.raises(UserError, match="--max_sequence_length 2000"):
        family_of(bases[kind], max_sequence_length=2000)


def test_sd3_without_t5_reads_zeros_in_its_place(tmp_path):
    torch.manual_seed(0)
    sd3(with_t5=False).save_pretrained(tmp_path)
    family = family_of(tmp_path, max_sequence_length=32)
    family.load_encoders(torch.float32, CPU)
    text = family.encode_text(family.tokenize(["a red circle"]))
    assert text["embeddings"].shape == (1, 77 + 32, 64) and not text["embeddings"][:, 77:].any()


# --- LoRA ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", list(KINDS))
def test_lora_sits_on_every_attention_and_not_on_the_last_layer(kind, bases):
    family = family_of(bases[kind], lora_rank=2)
    network = load_network(family, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}, "read in no other type"
    policy = make_policy(family, network, MemoryOptions(), torch.bfloat16, CPU, True)
    trained = {name.split(".lora_")[0] for name, parameter in policy.network.named_parameters() if parameter.requires_grad}
    assert all(parameter.dtype == torch.float32 for parameter in policy.network.parameters() if parameter.requires_grad)
    assert "proj_out" not in trained
    expected = {"sd3": "transformer_blocks.0.attn2.to_q", "flux": "single_transformer_blocks.0.proj_out",
                "qwen_image": "transformer_blocks.1.attn.to_q", "z_image": "context_refiner.0.attention.to_q"}[kind]
    assert expected in trained


# --- what is refused -----------------------------------------------------------------------------------------------------

def test_sizes_that_a_family_cannot_take(bases):
    for kind in KINDS:
        with pytest.raises(UserError, match="both must be multiples of 4"):
            family_of(bases[kind]).latent_shape(34, 32)
    with pytest.raises(UserError, match="positions for 128 pixels a side"):
        family_of(bases["sd3"]).latent_shape(256, 256)


def test_sdxl_beside_another_family_and_an_unknown_pipeline(bases, tmp_path):
    with pytest.raises(UserError, match="--sdxl, but .* is SD3: leave --sdxl out"):
        family_of(bases["sd3"], sdxl=True)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(UserError, match="is a SanaPipeline, which is no known family: FluxPipeline, QwenImagePipeline"):
        family_of(tmp_path)


def test_a_gated_repository_names_the_page_to_accept():
    from huggingface_hub.errors import GatedRepoError
    refusal = GatedRepoError("403", response=mock.Mock(headers={}, request=mock.Mock()))
    with mock.patch("huggingface_hub.hf_hub_download", side_effect=refusal):
        with pytest.raises(UserError, match=r"accept them at https://huggingface.co/org/gated, then `hf auth login`"):
            read_model_index("org/gated")


def test_fp16_where_it_overflows(bases):
    for kind in ("flux", "qwen_image", "z_image"):
        with pytest.raises(UserError, match="overflows in fp16"):
            family_of(bases[kind]).load_encoders(torch.float16, CPU)


def test_a_transformer_of_another_family_or_with_other_channels(bases):
    with pytest.raises(UserError, match="is a FluxTransformer2DModel, and SD3 takes a SD3Transformer2DModel"):
        load_network(family_of(bases["sd3"]), bases["flux"])
    network = SimpleNamespace(config=SimpleNamespace(in_channels=16))
    with pytest.raises(UserError, match="reads 16 channels, and the base's VAE gives it 4"):
        family_of(bases["sd3"]).check_network(network, "this")


def test_a_lora_of_another_family(bases, tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({f"transformer.layers.0.attention.to_q.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}, path)
    with pytest.raises(UserError, match="do not fit SD3"):
        load_network(family_of(bases["sd3"]), path)


@pytest.mark.parametrize("name, kind, sampling", [("Z-Image-Turbo", "z_image", (8, 0.0)), ("FLUX.1-schnell", "flux", (4, 1.0)),
                                                  ("stable-diffusion-3.5-large-turbo", "sd3", (4, 1.0))])
def test_a_distilled_base_is_warned_of_and_sampled_in_few_steps(name, kind, sampling, bases, tmp_path, capsys):
    (tmp_path / name).symlink_to(bases[kind])
    family = family_of(tmp_path / name)
    assert "is distilled to few steps without guidance" in capsys.readouterr().err
    assert (family.steps, family.guidance) == sampling != (family_of(bases[kind]).steps, family_of(bases[kind]).guidance)


def test_qwens_schedule_of_one_step_is_refused(bases):
    with pytest.raises(UserError, match="needs 2 steps or more"):
        family_of(bases["qwen_image"]).sampler("default", 1, CPU, (32, 32))


def test_positions_of_sd3_are_for_any_size_it_takes(bases):
    network = SD3Transformer2DModel.from_pretrained(bases["sd3"], subfolder="transformer")
    family = family_of(bases["sd3"])
    assert family.latent_shape(32, 64) == (4, 16, 32)
    text = {"embeddings": torch.zeros(1, 8, 64), "pooled": torch.zeros(1, 64)}
    assert family.predict(network, torch.randn(1, 4, 16, 32), torch.tensor([500.0]), text, (32, 64)).shape == (1, 4, 16, 32)
