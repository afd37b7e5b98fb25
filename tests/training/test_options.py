import pytest

from common.train_options import parse_arguments
from common.errors import UserError
from spo.options import SPOArguments

BASE = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "pairs"]

# Names and defaults of the published program.
PUBLISHED = {
    "revision": None, "dataset_name": None, "dataset_config_name": None, "image_column": "image",
    "caption_column": "caption", "max_train_samples": None, "output_dir": "sd-model-finetuned", "cache_dir": None,
    "seed": None, "resolution": 512, "random_crop": False, "no_hflip": False, "train_batch_size": 1,
    "num_train_epochs": 100, "max_train_steps": 2000, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "learning_rate": 1e-8, "scale_lr": False,
    "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 500, "use_adafactor": False, "allow_tf32": False,
    "dataloader_num_workers": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "hub_model_id": None, "logging_dir": "logs", "mixed_precision": "fp16",
    "report_to": "tensorboard", "checkpointing_steps": 500, "resume_from_checkpoint": "latest", "noise_offset": 0,
    "input_perturbation": 0, "tracker_project_name": "tuning", "pretrained_vae_model_name_or_path": None,
    "sdxl": False, "sft": False, "beta_dpo": 5000, "hard_skip_resume": False, "unet_init": None,
    "proportion_empty_prompts": 0.2, "split": "train", "choice_model": None, "dreamlike_pairs_only": False,
    "use_winner_preserving": False, "winner_preserving_mu": 0.0, "dmpo_alpha": 0.0, "train_method": "diffusion-dpo",
}


def test_published_flags_keep_their_names_and_defaults():
    args = parse_arguments(BASE)
    assert {name: getattr(args, name) for name in PUBLISHED} == PUBLISHED
    assert parse_arguments([*BASE, "--sdxl"]).resolution == 1024
    assert parse_arguments([*BASE, "--sft"]).train_method == "sft"
    assert parse_arguments([*BASE, "--local_rank", "3", "--local-rank", "3"]).local_rank == 3


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
        parse_arguments(BASE + flags)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_no_data_is_an_error_that_names_both_ways():
    with pytest.raises(UserError, match="--dataset_name.*--train_data_dir"):
        parse_arguments(BASE[:2])


@pytest.mark.parametrize("flags, word", [
    (["--dmpo_alpha", "0.1"], "--dmpo_alpha does nothing"),
    (["--winner_preserving_mu", "0.5"], "the safeguard is off"),
    (["--sft", "--beta_dpo", "10"], "--beta_dpo does nothing"),
    (["--max_train_steps", "10"], "never reaches its peak"),
    (["--max_train_steps", "500"], "never reaches its peak"),
    (["--hard_skip_resume"], "never replays"),
    (["--num_train_epochs", "3"], "--max_train_steps counts"),
    (["--optimizer", "sgd", "--adam_beta1", "0.5"], "not AdamW"),
    (["--lr_scheduler", "constant", "--lr_warmup_steps", "3"], "constant schedule has no warm-up"),
    (["--metrics_config", "none.yaml"], "only --choice_model"),
    (["--validation_steps", "5"], "no --validation_prompts"),
])
def test_a_flag_that_is_ignored_is_worth_a_warning(flags, word, capsys):
    parse_arguments(BASE + flags)
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["sd15_spo", "sdxl_spo"])
def test_a_preset_of_no_warm_up_is_not_worth_a_warning(preset, capsys):
    parse_arguments(["--config", f"configs/train/{preset}.yaml"], SPOArguments)
    assert capsys.readouterr().err == ""


def test_the_result_never_overwrites_what_it_is_made_from(tmp_path):
    with pytest.raises(UserError, match="--output_dir is --pretrained_model_name_or_path itself"):
        parse_arguments(["--pretrained_model_name_or_path", str(tmp_path), "--dataset_name", "pairs", "--output_dir",
                         f"{tmp_path}/."])


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    for name, text in (("preset", "beta_dpo: 100\nseed: 1\n"), ("own", "beta_dpo: 200\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    args = parse_arguments([*BASE, "--config", str(tmp_path / "preset.yaml"), f"--config={tmp_path / 'own.yaml'}"])
    assert (args.beta_dpo, args.seed) == (200, 1)


def test_the_command_line_wins_over_the_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("beta_dpo: 2000\nlearning_rate: 1e-8\nscale_lr: true\nseed: 3\nvalidation_prompts: [a, b]\n")
    args = parse_arguments(["--config", str(config), *BASE, "--beta_dpo", "7", "--scale_lr", "false"])
    assert (args.beta_dpo, args.learning_rate, args.scale_lr, args.seed) == (7, 1e-8, False, 3)
    assert args.validation_prompts == ["a", "b"]
    assert parse_arguments([*BASE, f"--config={config}"]).beta_dpo == 2000


@pytest.mark.parametrize("text, words", [
    ("beta_dop: 1\n", ["beta_dop", "did you mean 'beta_dpo'"]),
    ("- a\n", ["flag: value"]),
    ("beta_dpo: [1, [2]]\n", ["beta_dpo"]),
    ("beta_dpo: {a: 1}\n", ["beta_dpo"]),
    ("learning_rate: [1e-5, 2e-5]\n", ["'learning_rate' takes one value"]),
    ("a: : b\n", ["cannot read"]),
    ("beta_dpo: strong\n", ["--beta_dpo", "strong", "c.yaml"]),
    ("!!python/object/apply:os.system ['false']\n", ["cannot read"]),
])
def test_a_faulty_file_is_one_line(text, words, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(config), *BASE])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_an_unquoted_no_is_a_precision(tmp_path):
    (tmp_path / "c.yaml").write_text("mixed_precision: no\nscale_lr: no\n")
    args = parse_arguments(["--config", str(tmp_path / "c.yaml"), *BASE])
    assert args.mixed_precision == "no" and args.scale_lr is False


def test_every_preset_is_the_published_setting(capsys):
    table = {  # beta, mu, alpha, learning rate before --scale_lr
        "sd15_diffusion_dpo": (5000, 0.9, 0.0, 1e-8), "sd15_dspo": (0.001, 0.2, 0.0, 1e-8),
        "sd15_dmpo": (2000, 0.9, 0.01, 1e-8), "sdxl_diffusion_dpo": (5000, 0.6, 0.0, 1e-9),
        "sdxl_dspo": (5000, 0.6, 0.0, 1e-9), "sdxl_dmpo": (6000, 0.6, 0.01, 1e-9)}
    for name, (beta, mu, alpha, lr) in table.items():
        args = parse_arguments(["--config", f"configs/train/{name}.yaml"])
        assert (args.beta_dpo, args.winner_preserving_mu, args.dmpo_alpha, args.learning_rate) == (beta, mu, alpha, lr)
        assert args.train_method == name.split("_", 1)[1].replace("_", "-")
        assert args.use_winner_preserving and args.scale_lr and args.allow_tf32 and args.mixed_precision == "bf16"
        assert (args.train_batch_size, args.gradient_accumulation_steps, args.max_train_steps) == (8, 32, 2000)
        assert (args.lr_warmup_steps, args.checkpointing_steps) == (500, 500)
        assert args.dataset_name == "yuvalkirstain/pickapic_v2"
        assert args.sdxl == name.startswith("sdxl") and args.resolution == (1024 if args.sdxl else 512)
    assert capsys.readouterr().err == ""
