"""The real program on tiny pipelines and JPEG pairs."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from common.errors import UserError
from tests.runs import SMALL, continue_from, equal, scalars, weights
from tests.vocabulary import build_tiny_pipeline


@pytest.fixture(scope="module")
def two_process_run(tiny_sd15, pairs_dir, tmp_path_factory, train):
    """An unbroken run of 4 steps on 2 processes, with checkpoints."""
    output = tmp_path_factory.mktemp("two") / "out"
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, *SMALL, "--seed", 5,
             "--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--max_train_steps", 4,
             "--learning_rate", 1e-4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 3,
             "--use_winner_preserving", "--winner_preserving_mu", 0.5, "--max_train_samples", 7]
    told = train([*flags, "--output_dir", output], processes=2)
    assert "2 device(s)" in told and told.count("Training\n") == 1
    return output, flags


@pytest.mark.slow
def test_two_processes_stop_resume_and_end_as_the_unbroken_run(two_process_run, tmp_path, train):
    output, flags = two_process_run
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    resumed = tmp_path / "resumed"
    continue_from(output, resumed, "checkpoint-3", "checkpoint-4")
    told = train([*flags, "--output_dir", resumed], processes=2)
    assert "resuming" in told and "after step 2" in told
    assert equal(weights(resumed), weights(output))
    unbroken, continued = scalars(output)["train_loss"], scalars(resumed)["train_loss"]
    assert continued == {step: unbroken[step] for step in (3, 4)}


@pytest.mark.slow
def test_two_processes_give_the_parameters_of_one_with_twice_the_batch(tiny_sd15, pairs_dir, tmp_path, train):
    """Same pairs, noise and timesteps; a lambda for each pair; SGD, because Adam magnifies rounding near 0."""
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, *SMALL, "--seed", 3,
             "--optimizer", "sgd", "--learning_rate", 1e-3, "--beta_dpo", 50,
             "--use_winner_preserving", "--winner_preserving_mu", 0.5, "--checkpointing_steps", 0]
    runs = {}
    for granularity in ("sample", "batch"):
        for processes, batch in ((1, 4), (2, 2)):
            output = tmp_path / f"{granularity}-{processes}"
            steps = 3 if granularity == "sample" else 1
            train([*flags, "--max_train_steps", steps, "--train_batch_size", batch, "--output_dir", output,
                   "--winner_preserving_granularity", granularity], processes)
            runs[granularity, processes] = weights(output), scalars(output)["train_loss"], scalars(output)["avg_lose_l_scale"]

    one, two = runs["sample", 1], runs["sample", 2]
    start = load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")
    moved = max((one[0][key] - start[key]).abs().max() for key in start)
    apart = max((one[0][key] - two[0][key]).abs().max() for key in start)
    assert moved > 1e-4 and apart < 1e-6
    assert one[1] == pytest.approx(two[1], rel=1e-5)
    # The batch's lambda is each process's own, as published: splitting the batch changes it.
    assert abs(runs["batch", 1][2][1] - runs["batch", 2][2][1]) > 1e-6


def test_lora_trains_resumes_and_merges(tiny_sdxl, pairs_dir, tmp_path, train_run):
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--train_data_dir", pairs_dir, *SMALL,
             "--lora_rank", 4, "--seed", 1, "--train_batch_size", 2, "--max_train_steps", 3, "--learning_rate", 1e-2,
             "--optimizer", "adamw", "--checkpointing_steps", 2, "--validation_prompts", "a red circle", "a <blue> square",
             "--validation_guidance", 3, "--validation_inference_steps", 4]
    output = tmp_path / "out"
    train_run([*flags, "--output_dir", output])
    resumed = tmp_path / "resumed"
    continue_from(output, resumed, "checkpoint-3")
    train_run([*flags, "--output_dir", resumed])
    assert equal(weights(output), weights(resumed))

    base = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    merged = weights(output)
    changed = {key for key in merged if not torch.equal(merged[key], base.state_dict()[key])}
    assert changed and all(re.search(r"attn\d\.to_(q|k|v|out\.0)\.weight", key) for key in changed)
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
    pipeline.load_lora_weights(output)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for key, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, merged[key], rtol=1e-5, atol=1e-6)

    sheets = sorted((output / "validation" / "step-3").glob("*.png"))
    assert len(sheets) == 2
    with Image.open(sheets[0]) as sheet:
        assert sheet.size == (128, 64), "reference left, policy right"
        left, right = sheet.crop((0, 0, 64, 64)), sheet.crop((64, 0, 128, 64))
        assert left.tobytes() != right.tobytes()


def test_sft_v_prediction_workers_and_a_config_file(pairs_dir, tmp_path, train_run, capsys):
    """Winners alone, no reference, a v-prediction model; the file's options, the command line winning."""
    base = build_tiny_pipeline(tmp_path / "v", "sd15", prediction_type="v_prediction")
    config = tmp_path / "sft.yaml"
    config.write_text(f"train_method: sft\ntrain_data_dir: {pairs_dir}\nmax_train_steps: 50\nlearning_rate: 1e-3\nseed: 1\n")
    logs = train_run(["--config", config, "--pretrained_model_name_or_path", base, *SMALL[:-2], "--learning_rate", 1e-3,
                      "--dataloader_num_workers", 2, "--max_train_steps", 24, "--train_batch_size", 8, "--random_crop",
                      "--noise_offset", 0.05, "--input_perturbation", 0.1, "--output_dir", tmp_path / "out"])
    assert "reference  none" in capsys.readouterr().out
    loss = [step["train_loss"] for step in logs]
    assert len(loss) == 24 and sum(loss[-5:]) < sum(loss[:5]), "it learns"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_bad_input_is_one_line_and_loses_nothing(two_process_run, tiny_sd15, tiny_sdxl, pairs_dir, tmp_path, train_run):
    output, _ = two_process_run
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and "logs" not in path.parts}
    base = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, *SMALL]
    unfit = tmp_path / "unet.pth"
    torch.save({"conv_in.weight": torch.zeros(1, 2)}, unfit)
    cases = [
        ([*base, "--beta_dpo", -1], ["--beta_dpo"]),
        ([*base, "--pretrained_model_name_or_path", "no/such-model"], ["no/such-model", "hub"]),
        ([*base, "--train_data_dir", tmp_path / "nothing"], ["nothing", "no such folder"]),
        ([*base, "--sdxl"], ["--sdxl, but", "is SD1.5"]),
        ([*base, "--mixed_precision", "fp16"], ["fp16 needs a GPU"]) if not torch.cuda.is_available() else
        ([*base, "--resolution", 7], ["resolution"]),
        ([*base, "--unet_init", unfit], ["conv_in.weight", "(1, 2)"]),
        ([*base, "--unet_init", tiny_sdxl], ["does not fit"]),
        ([*base, "--lr_scheduler", "nope"], ["--lr_scheduler", "cosine"]),
        ([*base, "--report_to", "nosuch"], ["--report_to"]),
        ([*base, "--resume_from_checkpoint", "checkpoint-99"], ["checkpoint-99"]),
        ([*base, "--output_dir", output], ["different run", "num_processes was 2, is 1"]),
        ([*base, "--output_dir", "/proc/no/such"], ["/proc/no/such"]),
    ]
    for words, expected in cases:
        with pytest.raises(UserError) as error:
            train_run(words)
        assert all(word in str(error.value) for word in expected) and "\n" not in str(error.value), error.value
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and "logs" not in path.parts}
    assert after == before


def test_a_users_error_is_one_line_and_code_1(train, tiny_sd15, pairs_dir, tmp_path):
    """End to end, through the program's own main()."""
    told = train(["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, *SMALL, "--output_dir", tmp_path,
                  "--report_to", "nosuch"], expect=1)
    assert told.count("error: ") == 1 and "--report_to" in told and "Traceback" not in told


def test_a_lora_run_in_bf16_leaves_a_float32_model(tiny_sd15, pairs_dir, tmp_path, train_run):
    """What is merged into is the base on the disk, not the one in training, whose weights are rounded."""
    train_run(["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, *SMALL, "--mixed_precision", "bf16",
               "--lora_rank", 2, "--learning_rate", 1e-30, "--max_train_steps", 1, "--seed", 0, "--output_dir", tmp_path])
    assert equal(weights(tmp_path), load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors"))
