"""Defaults that follow from the method and the base; what was given stays."""

from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.train_checks import parse_options
from tests.stub_family import stub_family
from training.defaults import settle_defaults

FAMILIES = {"sd15": 512, "sdxl": 1024}


def settled(family: str, *flags) -> SimpleNamespace:
    options = parse_options(["--pretrained_model_name_or_path=base", "--train_data_dir=pairs", *map(str, flags)])
    settle_defaults(options, stub_family(family))
    return SimpleNamespace(**options.flat())


@pytest.mark.parametrize("family, method, beta, mu, alpha", [
    ("sd15", "diffusion-dpo", 5000, 0.9, 0), ("sdxl", "diffusion-dpo", 5000, 0.6, 0),
    ("sd15", "dspo", 0.001, 0.2, 0), ("sdxl", "dspo", 5000, 0.6, 0),
    ("sd15", "dmpo", 2000, 0.9, 0.01), ("sdxl", "dmpo", 6000, 0.6, 0.01),
    ("sd15", "sft", 5000, 0.9, 0),
])
def test_beta_mu_and_alpha_are_the_published_ones(family, method, beta, mu, alpha):
    found = settled(family, "--train_method", method)
    assert (found.beta_dpo, found.winner_preserving_mu, found.dmpo_alpha) == (beta, mu, alpha)


@pytest.mark.parametrize("family, flags, rate", [
    ("sd15", ["--scale_lr"], 1e-8), ("sdxl", ["--scale_lr"], 1e-9),
    ("sd15", [], 1e-8 * 2048), ("sdxl", [], 1e-9 * 2048),  # what --scale_lr makes of them with the published batch
    ("sd15", ["--lora_rank", 4], 1e-4), ("sdxl", ["--lora_rank", 4], 1e-4),
])
def test_the_learning_rate_is_the_published_one_for_any_batch(family, flags, rate):
    assert settled(family, *flags).learning_rate == rate


@pytest.mark.parametrize("steps, warm_up", [(2000, 500), (10_000, 500), (100, 25), (3, 0), (0, 500)])
def test_a_short_run_warms_up_in_a_quarter_of_it(steps, warm_up):
    assert settled("sd15", "--max_train_steps", steps).lr_warmup_steps == warm_up


@pytest.mark.parametrize("family, flags, optimizer", [
    ("sd15", [], "adamw"), ("sdxl", [], "adafactor"), ("sdxl", ["--lora_rank", 4], "adamw"),
    ("sd15", ["--use_adafactor"], "adafactor"), ("sdxl", ["--use_8bit_adam"], "adamw8bit"),
    ("sdxl", ["--optimizer", "adamw"], "adamw"), ("sd15", ["--optimizer", "sgd"], "sgd"),
])
def test_the_whole_of_a_large_network_takes_adafactor(family, flags, optimizer):
    assert settled(family, *flags).optimizer == optimizer


def test_the_resolution_is_the_bases():
    assert [settled(family).resolution for family in FAMILIES] == [512, 1024]


def test_what_was_given_stays_and_so_does_an_explicit_0():
    given = {"beta_dpo": 7.0, "winner_preserving_mu": 0.0, "dmpo_alpha": 0.0, "learning_rate": 3e-5, "lr_warmup_steps": 0,
             "resolution": 64, "train_method": "dmpo"}
    found = settled("sdxl", *(f"--{name}={value}" for name, value in given.items()), "--use_winner_preserving")
    assert {name: getattr(found, name) for name in given} == given


def test_flow_matching_has_the_published_flow_recipes():
    found = settled("sd3", "--use_winner_preserving")
    assert (found.beta_dpo, found.learning_rate, found.lora_rank, found.lora_alpha) == (100, 1e-5, 32, 64)
    assert (found.winner_preserving_granularity, found.resolution, found.mixed_precision) == ("sample", 512, "bf16")
    assert (found.validation_guidance, found.validation_inference_steps, found.max_train_steps) == (3.5, 28, 1000)
    assert settled("qwen_image").lora_rank == 64
    whole = settled("sd3", "--lora_rank", 0, "--mixed_precision", "fp16")
    assert (whole.lora_rank, whole.lora_alpha, whole.learning_rate, whole.mixed_precision) == (0, None, 1e-6, "fp16")
    assert settled("sd3", "--winner_preserving_granularity", "batch").winner_preserving_granularity == "batch"
    assert settled("sd15", "--lora_rank", 4).lora_alpha == 4 and settled("sd15").winner_preserving_granularity == "batch"


def test_a_moving_reference_is_refused_beside_the_default_lora():
    with pytest.raises(UserError, match="--reference_ema needs a reference of its own.*--lora_rank 0"):
        settled("sd3", "--reference_ema", 0.99)
    assert settled("sd3", "--reference_ema", 0.99, "--lora_rank", 0).reference_ema == 0.99


def test_fp16_is_refused_where_it_overflows_and_a_meaningless_option_is_named(capsys):
    with pytest.raises(UserError, match="flux overflows in fp16: use --mixed_precision bf16"):
        settled("flux", "--mixed_precision", "fp16")
    settled("sd15", "--timestep_shift", 3)
    assert "--timestep_shift means nothing for sd15" in capsys.readouterr().err
