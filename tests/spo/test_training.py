"""`train.py --train_method spo` as it is launched, on the tiny pipelines."""

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.train_checks import parse_options
from spo.options import SPOOptions
from spo.sampling import load_prompts
from tests.spo.conftest import PROMPTS
from training.checkpoints import read_progress, write_manifest

LORA = "pytorch_lora_weights.safetensors"


@pytest.mark.slow
def test_sd15_script_trains_lora_logs_and_leaves_a_pipeline(spo_flags, tiny_sd15, tmp_path, run):
    output = tmp_path / "out"
    run(["bash", "scripts/train/sd15_spo.sh", *spo_flags(tiny_sd15, output)])
    first, second = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    assert first["train_loss"] == torch.tensor(2.0).log().item()  # policy equals reference: to the last bit
    assert first["ratio_w"] == first["ratio_l"] == 1.0
    assert second["train_loss"] != first["train_loss"]
    assert {"spo/score_mean", "spo/score_spread", "spo/kept_share", "clipped_share", "grad_norm", "lr"} <= first.keys()
    shares = {int(name[-2:]): share for name, share in first.items() if name.startswith("spo/kept_share_step_")}
    assert shares.keys() == set(range(4, 20)) and all(0 <= share <= 1 for share in shares.values())

    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    base = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    trained = torch.load(output / "unet.pth", weights_only=True)
    changed = [key for key, value in base.unet.state_dict().items() if not torch.equal(value, trained[key])]
    assert changed and all(re.search(r"to_(q|k|v|out\.0)\.weight$", key) for key in changed)
    assert all(torch.equal(value, trained[key]) for key, value in pipeline.unet.state_dict().items())
    base.load_lora_weights(output)  # the published _LoRA form
    base.fuse_lora()
    base.unload_lora_weights()
    for key, value in base.unet.state_dict().items():
        torch.testing.assert_close(value, trained[key])


@pytest.mark.slow
def test_sdxl_script_trains(spo_flags, tiny_sdxl, tmp_path, run):
    output = tmp_path / "out"
    result = run(["bash", "scripts/train/sdxl_spo.sh", *spo_flags(tiny_sdxl, output, lora_rank=4),
                  "--pretrained_vae_model_name_or_path", tiny_sdxl / "vae"])
    assert "pools of 2 from step 4, 3 inner steps" in result.stdout
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["train_loss"] == torch.tensor(2.0).log().item() and len(metrics) == 2
    assert {int(name[-2:]) for name in metrics[0] if name.startswith("spo/kept_share_step_")} == {7, 11, 15, 19}


def test_whole_unet_trains_against_a_frozen_copy(train_here, tiny_sd15, tmp_path):
    output = tmp_path / "out"
    _, metrics = train_here(tiny_sd15, output, max_train_steps=1, lora_rank=0, spo_num_steps=6, train_batch_size=2)
    assert metrics[0]["train_loss"] == torch.tensor(2.0).log().item()
    assert not (output / LORA).exists()
    assert read_progress(output / "checkpoint-1")["record"]["cut"]  # the round has 2 more pairs
    trained = torch.load(output / "unet.pth", weights_only=True)
    assert not torch.equal(trained["conv_in.weight"],
                           load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"])


@pytest.mark.slow
def test_two_processes_learn_the_same_from_the_same_pairs(train_here, spo_flags, tiny_sd15, tmp_path, train):
    """A round is one optimizer step here. The third has a single prompt: one of two processes samples none, and gets
    its share of the other's pairs."""
    one, two = tmp_path / "one", tmp_path / "two"
    common = dict(optimizer="sgd", learning_rate=10, max_train_steps=3, spo_num_steps=8, spo_threshold=0)
    _, alone = train_here(tiny_sd15, one, spo_sample_batch_size=4, train_batch_size=16, **common)
    train(["--config", "configs/train/sd15_spo.yaml",
           *spo_flags(tiny_sd15, two, spo_sample_batch_size=2, train_batch_size=8, **common)], processes=2)
    together = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["spo/pairs"] for line in alone] == [line["spo/pairs"] for line in together] == [16, 16, 4]
    for name in ("train_loss", "grad_norm", "spo/score_mean", "spo/score_spread", "ratio_w", "ratio_l"):
        assert [line[name] for line in alone] == pytest.approx([line[name] for line in together], rel=1e-3), name
    a, b = (load_file(folder / LORA) for folder in (one, two))
    assert max(value.abs().max() for key, value in a.items() if "lora_B" in key or "lora.up" in key) > 1e-5
    for key in a:
        assert (a[key] - b[key]).norm() <= 1e-3 * a[key].norm(), key


def test_resumed_run_ends_where_an_uninterrupted_one_does(train_here, tiny_sd15, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # A round is one optimizer step, an epoch of 9 prompts 5 rounds: the run is cut in the second epoch.
    common = dict(train_batch_size=16, spo_threshold=0, spo_num_steps=6, checkpointing_steps=4)
    train_here(tiny_sd15, whole, max_train_steps=7, **common)
    train_here(tiny_sd15, cut, max_train_steps=6, **common)
    train_here(tiny_sd15, cut, max_train_steps=7, **common)
    assert re.search("resuming .*checkpoint-6, after step 6", capsys.readouterr().out)
    a, b = (load_file(folder / LORA) for folder in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not read_progress(cut / "checkpoint-6")["record"]["cut"]


def test_a_signal_ends_the_run_at_the_rounds_end_and_it_goes_on_from_there(train_here, tiny_sd15, tmp_path, capsys):
    """Rounds of 8 pairs are 4 steps; the signal comes in the first, and so do the steps of --checkpointing_steps."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    common = dict(train_batch_size=2, spo_threshold=0, spo_num_steps=8, max_train_steps=8, checkpointing_steps=3)

    def stop(step, network, scalars):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train_here(tiny_sd15, whole, **common)
    outcome, _ = train_here(tiny_sd15, stopped, stop, **common)
    assert (outcome.step, outcome.finished) == (4, False)
    assert "Stopped by SIGTERM" in capsys.readouterr().out
    assert [folder.name for folder in stopped.glob("checkpoint-*")] == ["checkpoint-4"]
    _, metrics = train_here(tiny_sd15, stopped, **common)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert {folder.name for folder in whole.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    a, b = (load_file(folder / LORA) for folder in (whole, stopped))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_changed_resume_goes_on_from_the_prompt_where_the_run_stood(train_here, tiny_sd15, tmp_path):
    """Two rounds of 2 of the 9 prompts, then rounds of 4; then 3 prompts, fewer than the epoch has had."""
    output, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    common = dict(train_batch_size=64, spo_threshold=0, spo_num_steps=6, spo_k=2, spo_prompts=prompts)
    train_here(tiny_sd15, output, max_train_steps=2, **common)
    prompts.write_text("\n".join(PROMPTS[::-1]))
    with pytest.raises(UserError, match="are not those that the checkpoint was made with"):
        train_here(tiny_sd15, output, max_train_steps=3, **common)
    common["allow_changed_resume"] = True
    _, metrics = train_here(tiny_sd15, output, max_train_steps=5, spo_sample_batch_size=4, **common)
    assert [(line["spo/epoch"], line["spo/pairs"]) for line in metrics] == [(1, 4), (1, 4), (1, 8), (1, 2), (2, 8)]
    _, metrics = train_here(tiny_sd15, output, max_train_steps=6, max_train_samples=3, **common)
    assert (metrics[-1]["spo/epoch"], metrics[-1]["spo/pairs"]) == (3, 4)


def test_a_checkpoint_of_the_earlier_form_is_refused_in_one_line(train_here, tiny_sd15, tmp_path):
    output, settings = tmp_path / "out", dict(spo_num_steps=6, spo_threshold=0, train_batch_size=16)
    train_here(tiny_sd15, output, max_train_steps=1, **settings)
    checkpoint = output / "checkpoint-1"
    torch.save({"epoch": 0}, checkpoint / "custom_checkpoint_0.pkl")  # as accelerate kept registered objects
    write_manifest(checkpoint)
    with pytest.raises(UserError, match="checkpoint-1 is of an earlier version of SPO") as caught:
        train_here(tiny_sd15, output, max_train_steps=2, **settings)
    assert "\n" not in str(caught.value)


def test_gradients_are_clipped(train_here, tiny_sd15, tmp_path):
    """One plain step of SGD moves the weights by exactly the bound, whatever the gradient."""
    output = tmp_path / "out"
    _, metrics = train_here(tiny_sd15, output, max_train_steps=1, lora_rank=0, spo_num_steps=6, optimizer="sgd",
                            learning_rate=1, max_grad_norm=1e-3)
    assert metrics[0]["grad_norm"] > 2e-3
    base = load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")
    trained = torch.load(output / "unet.pth", weights_only=True)
    moved = sum((base[key] - value).square().sum() for key, value in trained.items()).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_threshold_that_keeps_nothing_gives_its_reason_and_exits_3(train, spo_flags, tiny_sd15, tmp_path):
    said = train(["--config", "configs/train/sd15_spo.yaml", *spo_flags(
        tiny_sd15, tmp_path / "out", spo_threshold=0.999, max_train_steps=50, spo_sample_batch_size=5, spo_num_steps=6)], expect=3)
    (warning,) = [line for line in said.splitlines() if "no pair of epoch 1" in line]
    assert re.search(r"in 18 pools\)\. Lower --spo_threshold below 0\.\d+", warning)
    assert not list((tmp_path / "out").glob("checkpoint-*")) and "Done" not in said


@pytest.mark.parametrize("options, message", [
    (dict(spo_k=1), "--spo_k must be a finite number of at least 2"),
    (dict(spo_divert_start_step=20), "--spo_divert_start_step 20 is outside the 20 denoising steps"),
    (dict(spo_prompts="EMPTY"), "lists no prompt"),
    (dict(spo_prompts="ABSENT"), "no prompt group at"),
    (dict(spo_prompts="ODD"), 'entry 2 has no "prompt"'),
    (dict(spm_checkpoint="OTHER"), "does not fit this StepAwarePreferenceModel"),
    (dict(spo_threshold=1.5), "--spo_threshold must lie in [0, 1)"),
    (dict(spo_eta=0), "--spo_eta must lie in (0, 1]"),
    (dict(max_train_steps=0, lr_scheduler="cosine"), "--lr_scheduler cosine needs --max_train_steps"),
    (dict(spo_num_steps=1000), "--spo_num_steps 1000 is too many"),
])
def test_bad_input_is_one_line(judge, train_here, tiny_sd15, tmp_path, options, message):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "odd.json").write_text(json.dumps(["a cat", {"text": "a dog"}]))
    files = {"EMPTY": tmp_path / "empty.txt", "ABSENT": tmp_path / "absent.txt", "ODD": tmp_path / "odd.json",
             "OTHER": judge / "other_size.bin"}
    options = {name: files.get(value, value) for name, value in options.items()}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        train_here(tiny_sd15, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def options_of(*words):
    return parse_options(["--pretrained_model_name_or_path=base", "--train_method=spo", "--seed=0", *words], SPOOptions)


def test_prompts_from_text_json_and_the_captions_of_a_dataset(tmp_path, pairs_dir):
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a cat"}, "a dog"]))
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    for name in ("prompts.json", "prompts.txt"):
        assert load_prompts(options_of(f"--spo_prompts={tmp_path / name}")) == ["a cat", "a dog"]
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": null}\n{"prompt": "a dog"}\n{"prompt": "a cat"}\n')
    assert load_prompts(options_of(f"--train_data_dir={tmp_path / 'pairs.jsonl'}")) == ["a cat", "a dog"], "by its usual name"
    captions = load_prompts(options_of(f"--train_data_dir={pairs_dir}"))
    assert len(captions) == len(set(captions)) > 10
    fewer = options_of(f"--train_data_dir={pairs_dir}", "--max_train_samples=5")
    first, again = load_prompts(fewer), load_prompts(fewer)
    assert first == again and len(first) == 5 and set(first) < set(captions)


def test_options_that_do_nothing_are_named(tmp_path, capsys):
    given = ["random_crop", "proportion_empty_prompts", "max_bad_fraction", "watch_winner_rise", "watch_margin"]
    options_of("--spo_prompts=prompts.txt", *(f"--{name}=1" for name in given))
    assert set(re.findall(r"--(\w+) does nothing", capsys.readouterr().err)) == set(given)
    preset = tmp_path / "preset.yaml"
    preset.write_text("spo_k: 2\n")
    parse_options(["--pretrained_model_name_or_path=base", "--train_data_dir=pairs", f"--config={preset}",
                   "--spm_checkpoint=spm.bin"], SPOOptions)
    assert set(re.findall(r"--(\w+) does nothing", capsys.readouterr().err)) == {"spm_checkpoint", "spo_k"}
