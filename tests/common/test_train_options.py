"""train.py's options: the published program's names and defaults, what contradicts itself, what does nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.train_checks import TRACKERS, parse_options
from tests.stub_family import stub_family
from training.defaults import settle_defaults

PRESETS = Path(__file__).parents[2] / "configs" / "train"
BASE = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "pairs"]

# Names and defaults of the published program.
# Those that follow from the method or the base are in tests/training/test_defaults.py.
PUBLISHED = {
    "revision": None, "dataset_name": None, "dataset_config_name": None, "image_column": "image",
    "caption_column": "caption", "max_train_samples": None, "output_dir": "sd-model-finetuned", "cache_dir": None,
    "seed": None, "random_crop": False, "no_hflip": False, "train_batch_size": 1,
    "num_train_epochs": 100, "max_train_steps": 2000, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "scale_lr": False,
    "lr_scheduler": "constant_with_warmup", "use_adafactor": False, "allow_tf32": False,
    "dataloader_num_workers": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "hub_model_id": None, "logging_dir": "logs", "mixed_precision": "fp16",
    "report_to": "tensorboard", "checkpointing_steps": 500, "resume_from_checkpoint": "latest", "noise_offset": 0,
    "input_perturbation": 0, "tracker_project_name": "tuning", "pretrained_vae_model_name_or_path": None,
    "sdxl": False, "sft": False, "hard_skip_resume": False, "unet_init": None,
    "proportion_empty_prompts": 0.2, "split": "train", "choice_model": None, "dreamlike_pairs_only": False,
    "use_winner_preserving": False, "train_method": "diffusion-dpo",
}


def test_published_flags_keep_their_names_and_defaults():
    options = parse_options(BASE).flat()
    assert {name: options[name] for name in PUBLISHED} == PUBLISHED
    assert parse_options([*BASE, "--sft"]).objective.train_method == "sft"
    assert parse_options([*BASE, "--local_rank", "3", "--local-rank", "3"]).run.local_rank == 3


def test_what_identifies_a_run_is_every_option_that_a_resumed_one_may_not_change():
    settings = parse_options(BASE).settings()
    assert {"beta_dpo", "train_data_dir", "mixed_precision", "seed", "train_batch_size", "unet_init"} <= settings.keys()
    assert not {"output_dir", "max_train_steps", "dataloader_num_workers", "compile", "checkpointing_steps"} & settings.keys()


@pytest.mark.parametrize("flags, words", [
    (["--winner_preserving_mu", "1.5"], ["winner_preserving_mu", "[0, 1]"]),
    (["--beta_dpo", "-1"], ["--beta_dpo", "above 0"]),
    (["--beta_dpo", "nan"], ["--beta_dpo"]),
    (["--dmpo_alpha", "1"], ["dmpo_alpha", "[0, 1)"]),
    (["--train_batch_size", "0"], ["train_batch_size"]),
    (["--learning_rate", "inf"], ["learning_rate"]),
    (["--resolution", "100"], ["resolution", "multiple of 8"]),
    (["--proportion_empty_prompts", "2"], ["proportion_empty_prompts"]),
    (["--checkpoints_total_limit", "0"], ["checkpoints_total_limit"]),
    (["--sft", "--train_method", "dspo"], ["--sft", "dspo"]),
    (["--max_train_steps", "0", "--num_train_epochs", "0"], ["num_train_epochs"]),
    (["--noise_offset", "nan"], ["noise_offset"]),
    (["--use_adafactor", "--optimizer", "adamw"], ["--use_adafactor", "adamw"]),
    (["--beta_dp=100"], ["--beta_dp", "--beta_dpo"]),
    (["--process_timeout", "1e15"], ["--process_timeout"]),
    (["--output_dir", ""], ["--output_dir"]),
])
def test_a_bad_value_is_one_line_that_names_the_flag(flags, words):
    with pytest.raises(UserError) as error:
        parse_options(BASE + flags)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_no_data_is_an_error_that_names_both_ways():
    with pytest.raises(UserError, match="--dataset_name.*--train_data_dir"):
        parse_options(BASE[:2])


@pytest.mark.parametrize("flags, word", [
    (["--dmpo_alpha", "0.1"], "--dmpo_alpha does nothing"),
    (["--winner_preserving_mu", "0.5"], "it needs --use_winner_preserving"),
    (["--sft", "--beta_dpo", "10"], "--beta_dpo does nothing"),
    (["--max_train_steps", "10", "--lr_warmup_steps", "10"], "never reaches its peak"),
    (["--lora_rank", "2", "--offload_reference"], "there is no reference model"),
    (["--sft", "--offload_reference"], "sft has no reference model"),
    (["--no_hflip", "--paired_hflip"], "flips are off"),
    (["--use_adafactor", "--max_grad_norm", "2"], "turns clipping off"),
    (["--sft", "--use_winner_preserving"], "--use_winner_preserving does nothing"),
    (["--hard_skip_resume"], "never replays"),
    (["--num_train_epochs", "3"], "--max_train_steps counts"),
    (["--optimizer", "sgd", "--adam_beta1", "0.5"], "not AdamW"),
    (["--lr_scheduler", "constant", "--lr_warmup_steps", "3"], "constant schedule has no warm-up"),
    (["--metrics_config", "none.yaml"], "it needs --choice_model"),
    (["--validation_steps", "5"], "no --validation_prompts"),
])
def test_a_flag_that_is_ignored_is_worth_a_warning(flags, word, capsys):
    parse_options(BASE + flags)
    assert word in capsys.readouterr().err


def test_a_constant_schedule_is_not_told_that_it_warms_up_for_too_long(capsys):
    parse_options([*BASE, "--lr_scheduler", "constant", "--lr_warmup_steps", "10", "--max_train_steps", "10"])
    assert capsys.readouterr().err.count("warning") == 1


def test_a_short_run_and_options_given_as_their_defaults_are_not_worth_a_warning(capsys):
    parse_options([*BASE, "--max_train_steps", "10", "--dmpo_alpha", "0", "--num_train_epochs", "100"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flags", [["--use_8bit_adam", "--use_adafactor"], ["--use_8bit_adam", "--optimizer", "sgd"]])
def test_optimizers_that_exclude_each_other_are_refused(flags):
    with pytest.raises(UserError, match="contradict each other"):
        parse_options(BASE + flags)


@pytest.mark.parametrize("other", [["--winner_preserving_granularity", "sample"], ["--compile"], ["--selective_checkpointing"]])
def test_a_lambda_of_parameters_does_not_go_with(other):
    with pytest.raises(UserError, match="--winner_preserving_space parameter"):
        parse_options([*BASE, "--use_winner_preserving", "--winner_preserving_space", "parameter", *other])


@pytest.mark.parametrize("flags, said", [
    (["--random_crop"], "holds centre crops: drop --random_crop"),
    (["--choice_model", "oracle"], "--choice_model looks at the images"),
])
def test_what_a_cache_does_not_hold_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        parse_options([*BASE[:2], "--cached_dataset", "cache", *flags])


def test_surrogates_and_seeds_beyond_64_bits_are_refused():
    for flags in (["--validation_prompts", "\ud800"], ["--seed", str(2**63)]):
        with pytest.raises(UserError, match=flags[0]):
            parse_options(BASE + flags)


def test_the_result_never_overwrites_what_it_is_made_from(tmp_path):
    with pytest.raises(UserError, match="--output_dir is --pretrained_model_name_or_path itself"):
        parse_options(["--pretrained_model_name_or_path", str(tmp_path), "--dataset_name", "pairs", "--output_dir",
                         f"{tmp_path}/."])


def test_every_preset_is_the_published_setting(capsys):
    table = {  # beta, mu, alpha, learning rate before --scale_lr
        "sd15_diffusion_dpo": (5000, 0.9, 0.0, 1e-8), "sd15_dspo": (0.001, 0.2, 0.0, 1e-8),
        "sd15_dmpo": (2000, 0.9, 0.01, 1e-8), "sdxl_diffusion_dpo": (5000, 0.6, 0.0, 1e-9),
        "sdxl_dspo": (5000, 0.6, 0.0, 1e-9), "sdxl_dmpo": (6000, 0.6, 0.01, 1e-9)}
    for name, (beta, mu, alpha, lr) in table.items():
        options = parse_options(["--config", f"configs/train/{name}.yaml"])
        sdxl = name.startswith("sdxl")
        settle_defaults(options, stub_family(name.split("_")[0]))
        values = SimpleNamespace(**options.flat())
        assert (values.beta_dpo, values.winner_preserving_mu, values.dmpo_alpha, values.learning_rate) == (beta, mu, alpha, lr)
        assert values.train_method == name.split("_", 1)[1].replace("_", "-")
        assert values.use_winner_preserving and values.scale_lr and values.allow_tf32 and values.mixed_precision == "bf16"
        assert (values.train_batch_size, values.gradient_accumulation_steps, values.max_train_steps) == (8, 32, 2000)
        assert (values.lr_warmup_steps, values.checkpointing_steps) == (500, 500)
        assert values.dataset_name == "yuvalkirstain/pickapic_v2"
        assert values.sdxl == sdxl and values.resolution == (1024 if sdxl else 512)
        assert values.optimizer == ("adafactor" if sdxl else "adamw")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml") if not path.stem.startswith("spm_")
                                          and not path.stem.endswith("_spo")))
def test_a_preset_leaves_its_warm_up_to_the_default_where_that_is_the_same(preset):
    """So that a short run of it warms up in a quarter of its steps, as one without a preset does."""
    family = stub_family(next(name for name in ("sd15", "sdxl", "sd3", "flux", "qwen_image", "z_image") if preset.startswith(name)))

    def warm_up(*flags):  # the preset's own, and the default
        options = parse_options(["--config", str(PRESETS / f"{preset}.yaml"), *flags])
        own, options.optimizer.lr_warmup_steps = options.optimizer.lr_warmup_steps, None
        settle_defaults(options, family)
        return own, options.optimizer.lr_warmup_steps

    own, default = warm_up()
    assert own != default
    assert own is not None or default == 500 and warm_up("--max_train_steps", "100") == (None, 25)


@pytest.mark.parametrize("preset", ["sd3_diffusion_dpo", "sd3_dspo", "sd3_dmpo", "flux_diffusion_dpo", "qwen_image_diffusion_dpo",
                                    "z_image_diffusion_dpo"])
def test_a_flow_preset_says_what_the_defaults_would(preset, capsys):
    """Presets are written out, so that a reader sees the recipe; they must not drift from the defaults."""
    options = parse_options(["--config", f"configs/train/{preset}.yaml"])
    family = stub_family(next(name for name in ("sd3", "flux", "qwen_image", "z_image") if preset.startswith(name)))
    settle_defaults(options, family)
    method = options.objective.train_method
    plain = parse_options(["--pretrained_model_name_or_path=base", "--train_data_dir=pairs", "--train_method", method])
    settle_defaults(plain, family)
    for name in ("beta_dpo", "winner_preserving_mu", "dmpo_alpha", "winner_preserving_granularity", "lora_rank", "lora_alpha",
                 "resolution", "learning_rate", "max_train_steps", "mixed_precision"):
        assert options.flat()[name] == plain.flat()[name], name
    assert options.objective.use_winner_preserving and not capsys.readouterr().err


@pytest.mark.parametrize("name, said", [
    ("nosuch", "no tracker that accelerate knows: tensorboard, wandb"), ("wandb", "the package wandb is not installed: pip install"),
])
def test_a_tracker_that_cannot_log_is_refused_before_training(name, said, monkeypatch):
    monkeypatch.setattr("common.train_checks.find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"--report_to {name}.*{said}"):
        parse_options([*BASE, "--report_to", name])


@pytest.mark.parametrize("name", ["none", "all", "wandb", "tensorboard"])
def test_a_tracker_whose_package_is_here_is_taken(name, monkeypatch):
    monkeypatch.setattr("common.train_checks.find_spec", lambda package: package in ("wandb", "tensorboardX") or None)
    assert parse_options([*BASE, "--report_to", name]).run.report_to == name


def test_the_known_trackers_are_accelerates():
    from accelerate.utils import LoggerType
    assert set(TRACKERS) == {str(kind) for kind in LoggerType} - {"all"}
