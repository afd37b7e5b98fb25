"""The step-aware preference model: identity at birth, conditioned afterwards, official checkpoints."""


import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from common.errors import UserError
from spo.preference_model.model import (EVALUATION_TIMESTEPS, PIXEL_MEAN, PIXEL_STD, StepAwarePreferenceModel,
                                        clamp_resize_clamp, load_spm, resize_then_clamp)

TIMESTEPS = (*EVALUATION_TIMESTEPS, 1, 50, 999)


def tiny_clip(width: int = 32, seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    tower = dict(hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    # PickScore's config: eos_token_id 2 selects the pooled token by argmax, as in the published CLIPs
    text = tower | dict(vocab_size=200, eos_token_id=2)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=tower | dict(image_size=32, patch_size=8),
                                projection_dim=16, logit_scale_init_value=4.6052))
    return clip.eval()


@pytest.fixture
def clip_folder(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def inputs(size: int = 32, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(count, 3, size, size, generator=generator),
            torch.randint(200, (count, 77), generator=generator))


@torch.no_grad()
def pickscore(clip: CLIPModel, pixels: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """PickScore as its authors compute it, from CLIPModel's public features."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
    image = clip.get_image_features(pixel_values=(pixels - mean) / std).pooler_output
    text = clip.get_text_features(input_ids=input_ids).pooler_output
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    return clip.logit_scale.exp() * (text * image).sum(-1)


@torch.no_grad()
def scores(spm: StepAwarePreferenceModel, pixels: torch.Tensor, input_ids: torch.Tensor, t: int) -> torch.Tensor:
    return spm(pixels, torch.full((len(pixels),), t), input_ids)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_untrained_model_is_pickscore_at_every_timestep(t):
    pixels, input_ids = inputs()
    expected = pickscore(tiny_clip(), pixels, input_ids)
    ours = scores(StepAwarePreferenceModel(tiny_clip()).eval(), pixels, input_ids, t)
    assert expected.std() > 1e-3  # the images do differ in score
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row, in_spo, in_training", [
    # Halved without antialiasing, a row x becomes (0.5 x0 + 0.59375 x1 - 0.09375 x2, -0.09375 x1 + 0.59375 x2 + 0.5 x3).
    ([0.0, 0.0, 0.5, 0.0], [0.4765625, 0.6484375], [0.4765625, 0.6484375]),  # in range both are the same
    ([0.0, 0.0, 3.0, 0.0], [0.359375, 1.0], [0.453125, 0.796875]),  # the VAE overshoots: SPO clamps what it makes of it
    ([1.0, 1.0, -1.0, -1.0], [1.0, 0.0], [1.0, 0.0]),  # an edge: the bicubic overshoots, to 1.09375 and -0.09375
])
def test_each_program_clamps_where_the_official_one_does(row, in_spo, in_training):
    images = torch.tensor(row).expand(2, 3, 4, 4)
    for prepare, expected in ((resize_then_clamp, in_spo), (clamp_resize_clamp, in_training)):
        torch.testing.assert_close(prepare(images, 2), torch.tensor(expected).expand(2, 3, 2, 2))


def test_time_embedder_starts_at_two_hundredths():
    torch.manual_seed(0)
    for linear in (StepAwarePreferenceModel(tiny_clip(width=128)).model.t_embedder.mlp[i] for i in (0, 2)):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)  # torch's own start: 0.036 and 0.051
        assert linear.weight.abs().max() > 0.06  # normal, not uniform
        assert not linear.bias.any()


def test_trained_conditioning_depends_on_the_timestep_and_every_part_gets_a_gradient():
    spm = StepAwarePreferenceModel(tiny_clip())
    for name, parameter in spm.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pixels, input_ids = inputs()
    assert (scores(spm, pixels, input_ids, 1) - scores(spm, pixels, input_ids, 951)).abs().min() > 1e-4
    for recompute in (False, True):
        spm.zero_grad()
        spm.gradient_checkpointing = recompute
        spm(pixels, torch.arange(6) * 100, input_ids).square().sum().backward()
        without = [name for name, parameter in spm.named_parameters() if parameter.grad is None]
        assert without == []


def test_official_checkpoint_loads_with_its_names(tmp_path, clip_folder):
    trained = StepAwarePreferenceModel(tiny_clip(seed=5))
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = trained.state_dict()
    assert all(key.startswith("model.") for key in state)
    for key in ("model.t_embedder.mlp.0.weight", "model.t_embedder.mlp.2.bias",
                "model.vision_model.encoder.layers.1.adaLN_modulation.1.weight",
                "model.vision_model.adaLN_modulation.1.bias", "model.vision_model.encoder.layers.0.self_attn.q_proj.bias"):
        assert key in state
    # what older transformers added, and the half precision of a published file
    official = {key: value.half() for key, value in state.items()}
    official["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    official["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(official, tmp_path / "sd-v1-5_step-aware_preference_model.bin")
    loaded = load_spm(clip_folder, tmp_path / "sd-v1-5_step-aware_preference_model.bin").eval()
    pixels, input_ids = inputs()
    expected = scores(trained.half().float().eval(), pixels, input_ids, 501)
    torch.testing.assert_close(scores(loaded, pixels, input_ids, 501), expected)


def test_checkpoint_of_another_size_is_named(tmp_path, clip_folder):
    torch.save(StepAwarePreferenceModel(tiny_clip(width=16)).state_dict(), tmp_path / "other.bin")
    with pytest.raises(UserError, match=r"other\.bin does not fit this StepAwarePreferenceModel .*16.*32"):
        load_spm(clip_folder, tmp_path / "other.bin")


def test_checkpoint_that_would_run_code_is_refused(tmp_path, clip_folder):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"model.logit_scale": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match="refused"):
        load_spm(clip_folder, tmp_path / "evil.bin")


def test_missing_checkpoint_is_told(tmp_path, clip_folder):
    with pytest.raises(UserError, match="nowhere.bin"):
        load_spm(clip_folder, tmp_path / "nowhere.bin")
