"""`train.py --train_method spo` as it is launched, on the tiny pipelines."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPConfig, CLIPModel

from shapes.pipeline import clip_tokenizer, text_config
from spo.preference_model.model import PIXEL_MEAN, PIXEL_STD, StepAwarePreferenceModel, resize_then_clamp
from tests.pretended_gpu import GPU, move, pretended_gpu
from common.train_options import TrainArguments, parse_arguments
from training.checkpoints import read_progress
from data.pairs import tokenize
from common.errors import UserError
from models.guidance import condition_on_prompts, decode_latents
from training.run import start_accelerator
from training.records import read_metrics
from models.policy import load_frozen_encoders, load_policy_and_reference, load_tokenizers_and_scheduler
from spo.resampler import Pairs, ddim_scheduler
from common.signals import StopSignal
from spo.task import Progress, check_record, deal_out, digest_of, learn_from, load_judge, pair_loss, sample_pairs
from spo.task import train as train_spo
from spo.options import SPOArguments, check_spo_arguments, load_prompts, warn_of_spo_flags

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "star")]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A folder with a random tiny CLIP, its tokenizer and a step-aware checkpoint of another size."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(3)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=8)
    clip = CLIPModel(CLIPConfig(text_config=text_config(32, 1).to_dict(), vision_config=vision, projection_dim=16,
                                logit_scale_init_value=4.6))
    clip.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    spm = StepAwarePreferenceModel(clip)
    torch.save(spm.state_dict(), folder / "spm.bin")
    torch.save({key: value[:1] if value.dim() > 1 else value for key, value in spm.state_dict().items()},
               folder / "other_size.bin")
    return folder


def flags(judge, base, output, **options):
    options = dict(
        pretrained_model_name_or_path=base, resolution=64, spo_prompts=judge / "prompts.txt", spm_clip=judge,
        spm_tokenizer=judge, spm_checkpoint=judge / "spm.bin", mixed_precision="no", seed=5, output_dir=output,
        spo_sample_batch_size=2, spo_threshold=0.005, train_batch_size=4, learning_rate=1e-3,
        max_train_steps=2) | options
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def train_here(words):
    """The program's work in this process, with SD1.5's preset."""
    args, spo = parse_arguments(["--config", "configs/train/sd15_spo.yaml", *map(str, words)], SPOArguments)
    with StopSignal() as stop:
        train_spo(args, spo, start_accelerator(args), stop)


def scalars(output):
    (events,) = {path.parent for path in (output / "logs").rglob("events*") if path.parent.parent.name == "logs"}
    accumulator = EventAccumulator(str(events)).Reload()
    return {name: [event.value for event in accumulator.Scalars(name)] for name in accumulator.Tags()["scalars"]}


@pytest.mark.slow
def test_sd15_script_trains_lora_logs_and_leaves_a_pipeline(judge, tiny_sd15, tmp_path, run):
    output = tmp_path / "out"
    run(["bash", "scripts/train/sd15_spo.sh", *flags(judge, tiny_sd15, output)])
    logs = scalars(output)
    assert logs["train_loss"][0] == torch.tensor(2.0).log().item()  # policy equals reference: to the last bit
    assert logs["ratio_w"][0] == logs["ratio_l"][0] == 1.0
    assert logs["train_loss"][1] != logs["train_loss"][0]
    assert {"spo/score_mean", "spo/score_spread", "spo/kept_share", "clipped_share", "grad_norm", "lr"} <= logs.keys()
    steps = {int(name[-2:]) for name in logs if name.startswith("spo/kept_share_step_")}
    assert steps == set(range(4, 20)) and all(0 <= logs[f"spo/kept_share_step_{s:02d}"][0] <= 1 for s in steps)

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
def test_sdxl_script_trains(judge, tiny_sdxl, tmp_path, run):
    output = tmp_path / "out"
    result = run(["bash", "scripts/train/sdxl_spo.sh", *flags(judge, tiny_sdxl, output, lora_rank=4),
                  "--pretrained_vae_model_name_or_path", tiny_sdxl / "vae"])
    assert "pools of 2 from step 4, 3 inner steps" in result.stdout
    logs = scalars(output)
    assert logs["train_loss"][0] == torch.tensor(2.0).log().item() and len(logs["train_loss"]) == 2
    assert {int(name[-2:]) for name in logs if name.startswith("spo/kept_share_step_")} == {7, 11, 15, 19}


def test_whole_unet_trains_against_a_frozen_copy(judge, tiny_sd15, tmp_path):
    output = tmp_path / "out"
    train_here(flags(judge, tiny_sd15, output, max_train_steps=1, lora_rank=0, spo_num_steps=6,
                     train_batch_size=2))
    assert scalars(output)["train_loss"][0] == torch.tensor(2.0).log().item()
    assert not (output / "pytorch_lora_weights.safetensors").exists()
    assert read_progress(output / "checkpoint-1")["record"]["cut"]  # the round has 2 more pairs
    trained = torch.load(output / "unet.pth", weights_only=True)
    assert not torch.equal(trained["conv_in.weight"],
                           load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"])


@pytest.mark.slow
def test_two_processes_learn_the_same_from_the_same_pairs(judge, tiny_sd15, tmp_path, train):
    """A round is one optimizer step here. The third has a single prompt: one of two processes samples none, and gets
    its share of the other's pairs."""
    one, two = tmp_path / "one", tmp_path / "two"
    common = dict(optimizer="sgd", learning_rate=10, max_train_steps=3, spo_num_steps=8, spo_threshold=0)
    train_here(flags(judge, tiny_sd15, one, spo_sample_batch_size=4, train_batch_size=16, **common))
    train(["--config", "configs/train/sd15_spo.yaml",
           *flags(judge, tiny_sd15, two, spo_sample_batch_size=2, train_batch_size=8, **common)], processes=2)
    assert scalars(one)["spo/pairs"] == scalars(two)["spo/pairs"] == [16, 16, 4]
    for name in ("train_loss", "grad_norm", "spo/score_mean", "spo/score_spread", "ratio_w", "ratio_l"):
        assert scalars(one)[name] == pytest.approx(scalars(two)[name], rel=1e-3), name
    a, b = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, two))
    assert max(value.abs().max() for key, value in a.items() if "lora_B" in key or "lora.up" in key) > 1e-5
    for key in a:
        assert (a[key] - b[key]).norm() <= 1e-3 * a[key].norm(), key


def test_resumed_run_ends_where_an_uninterrupted_one_does(judge, tiny_sd15, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # A round is one optimizer step, an epoch of 9 prompts 5 rounds: the run is cut in the second epoch.
    common = dict(train_batch_size=16, spo_threshold=0, spo_num_steps=6, checkpointing_steps=4)
    train_here(flags(judge, tiny_sd15, whole, max_train_steps=7, **common))
    train_here(flags(judge, tiny_sd15, cut, max_train_steps=6, **common))
    train_here(flags(judge, tiny_sd15, cut, max_train_steps=7, **common))
    assert re.search("resuming .*checkpoint-6, after step 6", capsys.readouterr().out)
    a, b = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not read_progress(cut / "checkpoint-6")["record"]["cut"]


def test_other_prompts_are_no_continuation():
    args = SimpleNamespace(spo_prompts="prompts.txt", data_source=None, max_train_steps=7, allow_changed_resume=False)
    checkpoint = {"step": 6, "record": {"prompts": digest_of(PROMPTS), "cut": False}}
    check_record(checkpoint, digest_of(list(PROMPTS)), args)
    for changed in (PROMPTS[::-1], PROMPTS[1:], ["".join(PROMPTS)], []):
        with pytest.raises(UserError, match="the prompts of prompts.txt are not those .* --allow_changed_resume"):
            check_record(checkpoint, digest_of(changed), args)
    args.allow_changed_resume = True
    check_record(checkpoint, digest_of(PROMPTS[::-1]), args)


def test_run_cut_in_mid_round_can_end_again_but_not_go_on():
    checkpoint = {"step": 6, "record": {"prompts": digest_of(PROMPTS), "cut": True}}
    for steps in (0, 7):
        args = SimpleNamespace(max_train_steps=steps, allow_changed_resume=False)
        with pytest.raises(UserError, match="step 6 in the middle of a round.* --resume_from_checkpoint"):
            check_record(checkpoint, digest_of(PROMPTS), args)
        args.allow_changed_resume = True
        check_record(checkpoint, digest_of(PROMPTS), args)
    for steps in (5, 6):
        check_record(checkpoint, digest_of(PROMPTS), SimpleNamespace(max_train_steps=steps, allow_changed_resume=False))


@pytest.mark.slow
def test_changed_resume_goes_on_from_the_prompt_where_the_run_stood(judge, tiny_sd15, tmp_path):
    """Two rounds of 2 of the 9 prompts, then rounds of 4; then 3 prompts, fewer than the epoch has had."""
    output, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    common = dict(train_batch_size=64, spo_threshold=0, spo_num_steps=6, spo_k=2, report_to="none",
                  spo_prompts=prompts)
    train_here(flags(judge, tiny_sd15, output, max_train_steps=2, **common))
    prompts.write_text("\n".join(PROMPTS[::-1]))
    with pytest.raises(UserError, match="are not those that the checkpoint was made with"):
        train_here(flags(judge, tiny_sd15, output, max_train_steps=3, **common))
    common["allow_changed_resume"] = True
    train_here(flags(judge, tiny_sd15, output, max_train_steps=5, spo_sample_batch_size=4, **common))
    assert [(line["spo/epoch"], line["spo/pairs"]) for line in read_metrics(output / "metrics.jsonl")] == [
        (1, 4), (1, 4), (1, 8), (1, 2), (2, 8)]
    train_here(flags(judge, tiny_sd15, output, max_train_steps=6, max_train_samples=3, **common))
    last = read_metrics(output / "metrics.jsonl")[-1]
    assert (last["spo/epoch"], last["spo/pairs"]) == (3, 4)


def test_gradients_are_clipped(judge, tiny_sd15, tmp_path):
    """One plain step of SGD moves the weights by exactly the bound, whatever the gradient."""
    output = tmp_path / "out"
    train_here(flags(judge, tiny_sd15, output, max_train_steps=1, lora_rank=0, spo_num_steps=6, optimizer="sgd",
                     learning_rate=1, max_grad_norm=1e-3))
    assert scalars(output)["grad_norm"][0] > 2e-3
    base = load_file(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")
    moved = sum((base[key] - value).square().sum() for key, value in torch.load(output / "unet.pth", weights_only=True).items()).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_threshold_that_keeps_nothing_warns_and_ends_cleanly(judge, tiny_sd15, tmp_path, capsys):
    train_here(flags(judge, tiny_sd15, tmp_path / "out", spo_threshold=0.999, max_train_steps=50,
                     spo_sample_batch_size=5, spo_num_steps=6))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "no pair of epoch 1" in line]
    assert re.search(r"in 18 pools\)\. Lower --spo_threshold below 0\.\d+", warning)


@pytest.mark.parametrize("options, message", [
    (dict(spo_k=1), "--spo_k must be at least 2"),
    (dict(spo_divert_start_step=20), "--spo_divert_start_step 20 is outside the 20 denoising steps"),
    (dict(spo_prompts="EMPTY"), "lists no prompt"),
    (dict(spo_prompts="ABSENT"), "no prompt group at"),
    (dict(spo_prompts="ODD"), 'entry 2 has no "prompt"'),
    (dict(spm_checkpoint="OTHER"), "does not fit this StepAwarePreferenceModel"),
    (dict(spo_threshold=1.5), "--spo_threshold must lie in [0, 1)"),
    (dict(spo_eta=0), "--spo_eta must lie in (0, 1]"),
    (dict(max_train_steps=0, lr_scheduler="cosine"), "--lr_scheduler cosine needs --max_train_steps"),
])
def test_bad_input_is_one_line(judge, tiny_sd15, tmp_path, options, message):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "odd.json").write_text(json.dumps(["a cat", {"text": "a dog"}]))
    files = {"EMPTY": tmp_path / "empty.txt", "ABSENT": tmp_path / "absent.txt", "ODD": tmp_path / "odd.json",
             "OTHER": judge / "other_size.bin"}
    options = {name: files.get(value, value) for name, value in options.items()}
    words = flags(judge, tiny_sd15, tmp_path / "out", report_to="none", **options)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        train_here(words)
    assert "\n" not in str(caught.value)


def test_prompts_from_text_json_and_the_captions_of_a_dataset(tmp_path, pairs_dir):
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a cat"}, "a dog"]))
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    args = TrainArguments("base", train_data_dir=str(pairs_dir))
    for name in ("prompts.json", "prompts.txt"):
        assert load_prompts(args, SPOArguments(spo_prompts=str(tmp_path / name)), 0) == ["a cat", "a dog"]
    captions = load_prompts(args, SPOArguments(), 0)
    assert len(captions) == len(set(captions)) > 10
    args.max_train_samples = 5
    first, again = load_prompts(args, SPOArguments(), 0), load_prompts(args, SPOArguments(), 0)
    assert first == again and len(first) == 5 and set(first) < set(captions)


@pytest.mark.parametrize("inner", [0, 3])
def test_every_pair_is_dealt_once_in_an_order_of_its_own(inner):
    """The order follows from (seed, epoch, round) alone, not from the order in which the pairs were gathered."""
    n, members = 10, 2 if inner else 1
    pairs = Pairs(torch.arange(n).view(n, 1, 1, 1, 1).expand(n, members, 1, 1, 1).float(), torch.zeros(n, 2, 1, 1, 1),
                  torch.arange(n) % 4, torch.arange(n) // 4)
    accelerator = Accelerator(cpu=True)
    dealt = deal_out(pairs, 0, Progress(), accelerator)
    reverse = deal_out(pairs[torch.arange(n).flip(0)], 0, Progress(), accelerator)
    assert sorted(dealt.x_t[:, 0].flatten().tolist()) == list(range(n))
    assert torch.equal(dealt.x_t, reverse.x_t) and not torch.equal(dealt.x_t, pairs.x_t)
    assert not torch.equal(dealt.x_t, deal_out(pairs, 0, Progress(round=1), accelerator).x_t)


def test_scalars_and_gradient_count_micro_batches_by_their_size(monkeypatch):
    """5 pairs in micro-batches of 4 and 1: both are the mean over the pairs."""
    policy = torch.nn.Linear(1, 1, bias=False)
    pairs = Pairs(torch.zeros(5, 1, 1, 1, 1), torch.zeros(5, 2, 1, 1, 1), torch.arange(5), torch.zeros(5).long())

    def loss_is_the_step(policy, unwrapped, models, conditioning, pairs, *rest):
        loss = (policy.weight.sum() * pairs.step).mean()
        return loss, {"train_loss": loss.detach()}

    monkeypatch.setattr("spo.task.pair_loss", loss_is_the_step)
    torch.nn.init.ones_(policy.weight)
    args = SimpleNamespace(train_batch_size=4)
    logs = learn_from(pairs, policy, policy, None, None, None, args, Accelerator(cpu=True))
    assert logs["train_loss"] == policy.weight.grad.item() == 2.0


@pytest.mark.parametrize("kind, sdxl, members", [("tiny_sd15", [], 1), ("tiny_sdxl", ["--sdxl"], 2)])
def test_on_a_gpu_nothing_of_sampling_and_learning_stays_behind(judge, request, tmp_path, kind, sdxl, members):
    base = request.getfixturevalue(kind)
    args, spo = parse_arguments([*map(str, flags(judge, base, tmp_path)), *sdxl, "--lora_rank", "2", "--train_method", "spo"],
                                SPOArguments)
    args = SimpleNamespace(**vars(args) | vars(spo))
    models = load_tokenizers_and_scheduler(args)
    load_frozen_encoders(models, args, torch.float32, torch.device("cpu"))
    load_policy_and_reference(models, args, torch.float32, torch.device("cpu"))
    referee, scheduler = load_judge(args, torch.device("cpu")), ddim_scheduler(models.scheduler, 5)
    accelerator = SimpleNamespace(device=GPU, autocast=nullcontext)
    with pretended_gpu():
        for module in (models.vae, *models.text_encoders, models.policy, referee.spm):
            move(module)
        conditioning = condition_on_prompts(models, args, PROMPTS[:2], GPU)
        shape = models.latent_shape
        pairs = Pairs(torch.zeros(3, members, *shape, device=GPU), torch.zeros(3, 2, *shape, device=GPU),
                      torch.zeros(3, dtype=torch.int64, device=GPU), torch.zeros(3, dtype=torch.int64, device=GPU))
        loss, logs = pair_loss(models.policy, models.policy, models, conditioning, pairs, scheduler, args, accelerator)
        assert loss.device == GPU and all(value.device == GPU for value in logs.values())
        tokens = tokenize(referee.tokenizer, PROMPTS[:2]).to(GPU)
        images = decode_latents(models.vae, pairs.x_next[:2, 0])
        score = referee.spm(resize_then_clamp(images, referee.spm.image_size), pairs.step[:2], tokens)
        assert score.device == GPU and score.shape == (2,)


def test_the_judge_scores_in_float32_what_is_resized_before_it_is_clamped(judge, monkeypatch):
    """Under bf16 too. The VAE here only undoes the scaling; a score by hand is CLIP's own, of the images
    halved by the bicubic's weights (-3, 19, 19, -3) / 32 a side, and then clamped."""
    args = SimpleNamespace(spm_clip=judge, spm_tokenizer=judge, spm_checkpoint=judge / "spm.bin", cache_dir=None, seed=0,
                           spo_num_steps=20, spo_eta=1.0, spo_divert_start_step=4, spo_k=4, spo_num_inner_step=0,
                           spo_threshold=0.3, spo_guidance=5.0)
    vae = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(scaling_factor=0.5),
                          decode=lambda latents, return_dict: [latents[:, :3]])
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0,
                                  autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    programs = []
    monkeypatch.setattr("spo.task.resample", lambda predict, score, scheduler, config, generators, shape, device:
                        (programs.append(score), (Pairs.none(shape, config, device), []))[1])
    referee = load_judge(args, torch.device("cpu"))
    sample_pairs(None, SimpleNamespace(vae=vae, latent_shape=(4, 64, 64)), referee, None, None, PROMPTS, np.array([1, 4]),
                 Progress(), args, accelerator)
    latents = torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 1, 0, 1])
    ours = programs[0](latents, 0, rows)

    images = torch.nn.functional.pad(2 * latents[:, :3], (1, 1, 1, 1), mode="replicate")
    weights = torch.tensor([-3, 19, 19, -3]) / 32
    half = torch.nn.functional.conv2d(images, (weights[:, None] * weights).expand(3, 1, 4, 4), stride=2, groups=3)
    pixels = (half / 2 + 0.5).clamp(0, 1)
    assert (pixels == 0).any() and (pixels == 1).any()
    clip = CLIPModel.from_pretrained(judge)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (PIXEL_MEAN, PIXEL_STD))
    with torch.no_grad():
        image = clip.get_image_features(pixel_values=(pixels - mean) / std).pooler_output
        text = clip.get_text_features(input_ids=tokenize(referee.tokenizer, [PROMPTS[1], PROMPTS[4]])).pooler_output
        expected = clip.logit_scale.exp() * torch.cosine_similarity(image, text[rows])
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)
    with accelerator.autocast():
        assert (programs[0](latents, 0, rows) - expected).abs().max() > 2e-3  # what the old way made of them


def test_options_that_do_nothing_are_named(capsys):
    given = dict(proportion_empty_prompts=0.5, max_bad_fraction=0.5, watch_winner_rise=1.0, watch_margin=1.0)
    spo = SPOArguments(spo_prompts="prompts.txt", spm_checkpoint="spm.bin")
    check_spo_arguments(TrainArguments("base", **given), spo)
    assert re.findall(r"--(\w+) does nothing", capsys.readouterr().err) == list(given)
    warn_of_spo_flags({"train_method", "spo_k", "spm_checkpoint"})
    assert re.findall(r"--(\w+) does nothing", capsys.readouterr().err) == ["spm_checkpoint", "spo_k"]
