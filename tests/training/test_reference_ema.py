"""--reference_ema: the reference follows the policy in float32, through checkpoints too."""

import pytest
import torch

from common.errors import UserError
from common.train_checks import parse_options
from training.checkpoints import list_checkpoints

FLAGS = ["--train_method=linear-dpo", "--reference_ema=0.5", "--max_train_steps=4", "--checkpointing_steps=2", "--mixed_precision=bf16"]


def test_the_reference_is_the_policys_moving_average(train_run, tiny_sd15, pairs_dir, tmp_path):
    """By hand from the checkpoints of each step: average = (average + policy) / 2."""
    flags = [f"--pretrained_model_name_or_path={tiny_sd15}", f"--train_data_dir={pairs_dir}", "--resolution=64", *FLAGS,
             "--checkpointing_steps=1", f"--output_dir={tmp_path}"]
    logs = train_run(flags)
    folders = list_checkpoints(tmp_path)
    policies = [torch.load(folder / "unet.pth", weights_only=True) for folder in folders]
    averages = [torch.load(folder / "reference.pth", weights_only=True) for folder in folders]
    for before, after, policy in zip(averages, averages[1:], policies[1:]):
        for name, average in after.items():
            assert torch.equal(average, before[name].lerp(policy[name], 0.5))
    assert len({line["ref_mse_unaccumulated"] for line in logs}) == len(logs)


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_unbroken_run(train_run, tiny_sd15, pairs_dir, tmp_path):
    flags = [f"--pretrained_model_name_or_path={tiny_sd15}", f"--train_data_dir={pairs_dir}", "--resolution=64", *FLAGS]
    train_run([*flags, f"--output_dir={tmp_path / 'whole'}"])
    train_run([*flags, "--max_train_steps=2", f"--output_dir={tmp_path / 'parts'}"])
    train_run([*flags, f"--output_dir={tmp_path / 'parts'}"])
    for name in ("unet.pth", "reference.pth"):
        whole, parts = (torch.load(tmp_path / run / "checkpoint-4" / name, weights_only=True) for run in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_lora_has_no_reference_that_could_move():
    with pytest.raises(UserError, match="--reference_ema needs a reference of its own"):
        parse_options(["--pretrained_model_name_or_path=x", "--train_data_dir=y", "--reference_ema=0.9", "--lora_rank=4"])
