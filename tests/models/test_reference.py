"""The reference is exact: identical models have a margin of exactly 0 under mixed precision, and log 2 as their loss."""

import copy
import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from losses import LossConfig, preference_loss
from common.train_options import parse_arguments
from data.pairs import PairDataset, choose_pairs, load_table, make_loader
from models.stable_diffusion import noisy_batch, predict, predict_reference
from models.policy import (cast_compute_weights, load_frozen_encoders, load_policy_and_reference,
                             load_tokenizers_and_scheduler)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(scope="module")
def unets(tiny_sd15, tiny_sdxl, tmp_path_factory):
    """Weights as training leaves them: an untrained norm's ones and zeros would survive any rounding."""
    folder = tmp_path_factory.mktemp("unets")
    for kind, pipeline in (("sd15", tiny_sd15), ("sdxl", tiny_sdxl)):
        unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in unet.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        unet.save_pretrained(folder / kind)
    return folder


def prepare(pipeline, unets, pairs_dir, device, *flags):
    args = parse_arguments(["--pretrained_model_name_or_path", str(pipeline), "--train_data_dir", str(pairs_dir),
                            "--unet_init", str(unets / ("sdxl" if "--sdxl" in flags else "sd15")), "--resolution", "64", "--train_batch_size", "3", "--lr_warmup_steps", "0", *flags])
    models = load_tokenizers_and_scheduler(args)
    load_frozen_encoders(models, args, torch.bfloat16, torch.device(device))
    load_policy_and_reference(models, args, torch.bfloat16, torch.device(device))
    pairs = choose_pairs(load_table(args), args, seed=0)
    loader = make_loader(PairDataset(pairs, models.tokenizers, args, 0, (4, 8, 8)), args, 0, 1, 0, 1, False)
    batch = {name: tensor.to(device) for name, tensor in next(iter(loader)).items()}
    return models, args, noisy_batch(batch, models, args)


def both_predictions(models, inputs, device):
    with torch.autocast(device, torch.bfloat16):
        reference = predict_reference(models, models.policy, inputs)
    with torch.autocast(device, torch.bfloat16):
        policy = predict(models.policy, inputs)
    return policy, reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", [[], ["--lora_rank", "4"]], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_step_zero_in_bf16_is_the_closed_form_to_the_last_bit(kind, flags, device, tiny_sd15, tiny_sdxl, unets,
                                                               pairs_dir):
    flags = flags + (["--sdxl"] if kind == "sdxl" else [])
    models, args, inputs = prepare(tiny_sd15 if kind == "sd15" else tiny_sdxl, unets, pairs_dir, device, *flags)
    policy, reference = both_predictions(models, inputs, device)
    assert policy.dtype == torch.bfloat16, "the prediction really ran in mixed precision"
    result = preference_loss(policy, reference, inputs.target, LossConfig())
    assert result.margin.abs().max() == 0
    assert result.loss.item() == torch.tensor(math.log(2.0)).item()
    result.loss.backward()
    gradients = [p.grad for p in models.policy.parameters() if p.requires_grad]
    assert all(g is not None for g in gradients) and any(g.abs().max() > 0 for g in gradients)


def test_a_reference_cast_as_a_whole_would_not_be_exact(tiny_sd15, unets, pairs_dir):
    """What the exact reference is for: everything in bf16, norms and all, moves the margin off 0."""
    models, args, inputs = prepare(tiny_sd15, unets, pairs_dir, "cpu")
    policy, _ = both_predictions(models, inputs, "cpu")
    whole = copy.deepcopy(models.policy).to(torch.bfloat16).requires_grad_(False)
    inputs.latents = inputs.latents.bfloat16()
    with torch.no_grad():
        reference = predict(whole, inputs)
    assert preference_loss(policy, reference, inputs.target, LossConfig()).margin.abs().max() > 0


def test_norms_stay_float32_and_weights_take_half_the_memory(tiny_sd15, unets, pairs_dir):
    models, _, _ = prepare(tiny_sd15, unets, pairs_dir, "cpu")
    dtypes = {name: p.dtype for name, p in models.reference.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.float32}
    halves = sum(p.numel() for p in models.reference.parameters() if p.dtype == torch.bfloat16)
    assert halves > 0.95 * sum(p.numel() for p in models.reference.parameters())
    assert {p.dtype for p in models.policy.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in models.reference.parameters())


def test_the_adapter_off_is_the_untouched_base(tiny_sd15, unets, pairs_dir):
    """After training moved the adapter, the reference is still the base, bit for bit."""
    models, args, inputs = prepare(tiny_sd15, unets, pairs_dir, "cpu", "--lora_rank", "4")
    _, before = both_predictions(models, inputs, "cpu")
    with torch.no_grad():
        for name, parameter in models.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    policy, after = both_predictions(models, inputs, "cpu")
    assert torch.equal(before, after)
    assert not torch.equal(policy, after)
    assert all(parameter.requires_grad for name, parameter in models.policy.named_parameters() if "lora" in name)


def test_float32_leaves_every_weight_alone(tiny_sd15, unets, pairs_dir):
    models, _, _ = prepare(tiny_sd15, unets, pairs_dir, "cpu")
    unchanged = cast_compute_weights(copy.deepcopy(models.policy), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(unchanged.state_dict().values(), models.policy.state_dict().values()))
