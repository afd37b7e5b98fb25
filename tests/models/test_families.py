"""The contract that every model family keeps, on tiny pipelines of the real classes."""

import functools
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from common.train_checks import parse_options
from common.errors import UserError
from common.train_options import ModelOptions
from data.cache import CacheOptions, cache as library_cache
from eval import generate
from models.family import FAMILIES, open_family
from models.guidance import encode_with_empty
from models.lora import COMFYUI_FILE
from models.networks import load_network
from models.sampling import SamplingSettings, sample
from tests.flow_pipelines import KINDS, build_flow_pipeline
from train import train as library_train
from training.records import read_metrics

FAMILY_NAMES = ["sd15", "sdxl", *KINDS]
WORDS = {"sd3": 32, "flux": 32, "qwen_image": 64, "z_image": 96}  # --max_sequence_length
SIDE = {"sd15": 64, "sdxl": 64}
CPU = torch.device("cpu")
PROMPTS = ["a red square", "a small green circle on a blue field"]
LOG_2 = torch.tensor(math.log(2.0)).item()


@pytest.fixture(scope="module")
def bases(tiny_sd15, tiny_sdxl, built_once):
    flow = {kind: built_once(kind, functools.partial(build_flow_pipeline, kind=kind)) for kind in KINDS}
    return {"sd15": tiny_sd15, "sdxl": tiny_sdxl} | flow


@pytest.fixture(scope="module")
def trained(bases, pairs_dir, train, tmp_path_factory):
    """trained(kind, flags, *more): the output folder of a run of three steps, which is made once."""
    folder, made = tmp_path_factory.mktemp("runs"), set()

    def trained(kind: str, flags: tuple, *more, processes: int = 1, into: Path | None = None) -> Path:
        output = into or folder / "-".join(map(str, (kind, processes, *flags, *more))).replace("/", "")[:150]
        if output not in made:
            made.add(output)
            words = ["--output_dir", output, *common(kind, bases, pairs_dir), *flags, *more]
            train(words, processes) if processes > 1 else here(library_train, words)
        return output

    return trained


def here(program, words, *groups):
    """A program as a call in this process, which saves it the seconds that a process takes to start."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        options = parse_options([str(word) for word in words], *groups)
        program(options, *options.more)


def common(kind, bases, pairs_dir):
    return ["--pretrained_model_name_or_path", bases[kind], "--train_data_dir", pairs_dir, "--resolution", SIDE.get(kind, 32),
            "--lr_warmup_steps", 0, "--max_train_steps", 3, "--checkpointing_steps", 1, "--train_batch_size", 2, "--seed", 1,
            "--learning_rate", 1e-3, "--optimizer", "adamw", "--report_to", "none", "--use_winner_preserving", "--beta_dpo", 100,
            *(["--max_sequence_length", WORDS[kind]] if kind in WORDS else [])]


WHOLE = ("--mixed_precision", "no", "--lora_rank", 0)
LORA = ("--mixed_precision", "no", "--lora_rank", 4, "--lora_alpha", 6, "--learning_rate", 1e-2)


def opened(kind, bases):
    family = open_family(ModelOptions(str(bases[kind]), max_sequence_length=WORDS.get(kind)))
    family.load_encoders(torch.float32, CPU)
    return family


def draw(family, network, kind):
    text, empty = encode_with_empty(family, PROMPTS, CPU)
    side = SIDE.get(kind, 32)
    settings = SamplingSettings(side, side, 6, family.guidance, "diffusers", "default", torch.float32)
    return sample(family, network.eval(), text, empty, [1, 2], settings)


def pipelines_own(pipeline, family, kind):
    """The same two images by the pipeline's own call."""
    side = SIDE.get(kind, 32)
    pipeline.set_progress_bar_config(disable=True)
    shape = family.latent_shape(side, side)
    latents = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    arguments = {"guidance_scale": family.guidance, "max_sequence_length": WORDS.get(kind)}
    if kind == "qwen_image":
        arguments = {"true_cfg_scale": family.guidance, "negative_prompt": [" ", " "], "max_sequence_length": WORDS[kind]}
        pipeline.prompt_template_encode_start_idx = family.dropped  # of 34 tokens with the published tokenizer
    if kind in ("flux", "qwen_image"):
        latents = pipeline._pack_latents(latents, 2, *shape)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    return pipeline(list(PROMPTS), height=side, width=side, latents=latents, num_inference_steps=6, **arguments).images


def grey_levels_apart(images, others):
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(images, others))


def checkpoint(folder, step=3):
    """The trained weights of a checkpoint."""
    [file] = [path for path in (folder / f"checkpoint-{step}").iterdir()
              if path.suffix in (".pth", ".safetensors") and "optimizer" not in path.name]
    return torch.load(file, weights_only=True) if file.suffix == ".pth" else load_file(file)


def assert_same(first, second):
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def scalars(folder):
    machine = ("time", "pairs_per_second", "peak_memory_gb")
    return [{name: value for name, value in row.items() if name not in machine} for row in read_metrics(folder / "metrics.jsonl")]


def test_every_known_family_is_tested_here():
    assert len({(known.module, known.name) for known in FAMILIES.values()}) == len(FAMILY_NAMES)


@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_images_are_those_of_the_pipelines_own_call(kind, bases):
    family = opened(kind, bases)
    ours = draw(family, load_network(family), kind)
    theirs = pipelines_own(DiffusionPipeline.from_pretrained(bases[kind]), family, kind)
    assert grey_levels_apart(ours, theirs) <= 1
    assert grey_levels_apart(ours[:1], ours[1:]) > 10, "the images do depend on prompt and noise"


@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_spos_walk_goes_from_noise_to_the_image_and_its_steps_are_random(kind, bases):
    """The right prediction amounts to the clean latents at every step, and without noise leads on to the next one's."""
    family = open_family(ModelOptions(str(bases[kind]), max_sequence_length=WORDS.get(kind)))
    times, next_times = family.walk(8, (SIDE.get(kind, 32),) * 2)
    assert len(times) == 8 and (times > next_times).all() and next_times[-1] == 0
    if family.flow:
        assert torch.equal(times[1:], next_times[:-1]) and times[0] > 900
    latents, noise = torch.randn(2, 8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x_t, prediction = family.noise(latents, noise, times)
    mean, std, clean = family.transition(prediction, x_t, times, next_times, family.eta)
    assert std.shape == (8, 1, 1, 1) and (std > 0).all()
    assert torch.equal(clean, family.clean(prediction, x_t, times))
    torch.testing.assert_close(clean, latents, rtol=1e-3, atol=1e-3)
    mean, _, _ = family.transition(prediction, x_t, times, next_times, 0.0)
    torch.testing.assert_close(mean, family.noise(latents, noise, next_times)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("flags", [WHOLE, LORA, ("--mixed_precision", "bf16", *WHOLE[2:]), ("--mixed_precision", "bf16", *LORA[2:])],
                         ids=["whole", "lora", "whole-bf16", "lora-bf16"])
@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_at_step_zero_the_margin_is_0_and_the_loss_log_2(kind, flags, trained):
    first = scalars(trained(kind, flags))[0]
    assert first["margin_mean"] == first["margin_std"] == 0 and first["train_loss"] == LOG_2
    assert first["grad_norm"] > 0 and 0 <= first["avg_lose_l_scale"] <= 1


@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_cached_is_uncached_to_the_bit(kind, bases, pairs_dir, trained, tmp_path):
    uncached, cache = trained(kind, WHOLE), tmp_path / "cache"
    here(library_cache, [*common(kind, bases, pairs_dir), *WHOLE, "--cached_dataset", cache], CacheOptions)
    with mock.patch.object(type(open_family(ModelOptions(str(bases[kind])))), "load_encoders", side_effect=AssertionError):
        cached = trained(kind, WHOLE, "--cached_dataset", cache)
    assert scalars(cached) == scalars(uncached)
    assert_same(checkpoint(cached), checkpoint(uncached))


def test_validation_prompts_of_a_cached_run_are_encoded_once_and_drawn_as_without_a_cache(bases, pairs_dir, trained, tmp_path):
    more = ("--max_train_steps", 2, "--validation_prompts", *PROMPTS, "--validation_steps", 1, "--validation_inference_steps", 2)
    here(library_cache, [*common("sd3", bases, pairs_dir), *LORA, "--cached_dataset", tmp_path / "cache"], CacheOptions)
    uncached = trained("sd3", LORA, *more, into=tmp_path / "uncached")
    opened_as = type(open_family(ModelOptions(str(bases["sd3"]))))
    with (mock.patch.object(opened_as, "load_encoders", autospec=True, side_effect=opened_as.load_encoders) as encoders,
          mock.patch.object(opened_as, "load_vae", autospec=True, side_effect=opened_as.load_vae) as vae):
        cached = trained("sd3", LORA, *more, "--cached_dataset", tmp_path / "cache", into=tmp_path / "cached")
    assert encoders.call_count == 1 and vae.call_count == 1 + 2, "the encoders once at the start, the VAE at each of 2 drawings"
    family = encoders.call_args.args[0]
    assert family.vae is None and not family.text_encoders
    for step in (1, 2):
        for number in range(len(PROMPTS)):
            name = Path("validation", f"step-{step}", f"{number}.png")
            assert (cached / name).read_bytes() == (uncached / name).read_bytes()


@pytest.mark.parametrize("flags", [WHOLE, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_stopped_and_resumed_is_unbroken_to_the_bit(kind, flags, trained, tmp_path):
    unbroken, resumed = trained(kind, flags), tmp_path / "resumed"
    resumed.mkdir()
    for name in ("checkpoint-1", "run.json"):
        path = unbroken / name
        shutil.copytree(path, resumed / name) if path.is_dir() else shutil.copy(path, resumed / name)
    trained(kind, flags, into=resumed)
    assert [row["step"] for row in scalars(resumed)] == [2, 3] and scalars(resumed) == scalars(unbroken)[1:]
    assert_same(checkpoint(resumed), checkpoint(unbroken))


@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_the_lora_opens_in_diffusers_and_draws_as_the_policy(kind, bases, trained):
    family, run = opened(kind, bases), trained(kind, LORA)
    base = draw(family, load_network(family), kind)
    policy = draw(family, load_network(family, run / "checkpoint-3"), kind)
    pipeline = DiffusionPipeline.from_pretrained(bases[kind])
    pipeline.load_lora_weights(run)
    assert grey_levels_apart(policy, pipelines_own(pipeline, family, kind)) <= 1
    assert grey_levels_apart(policy, base) > 1
    adapter = getattr(pipeline, family.backbone).peft_config["default_0"]
    assert adapter.r == 4 and adapter.lora_alpha == 6
    assert (run / "model_index.json").is_file() == (family.backbone == "unet"), "transformers leave the adapter alone"
    assert grey_levels_apart(policy, pipelines_own(of_comfyui(bases[kind], run), family, kind)) <= 1


def of_comfyui(base, run):
    """The base's pipeline with a run's adapter as for_comfyui() wrote it."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(run, weight_name=COMFYUI_FILE)
    return pipeline


@pytest.mark.parametrize("kind", list(KINDS))
def test_generate_samples_as_published_unless_told(kind, bases, tmp_path, capsys):
    (tmp_path / "own.json").write_text(json.dumps(PROMPTS[:1]))
    words = ["--unet_path", "base", "--pretrained_model_name_or_path", bases[kind], "--prompts", tmp_path / "own.json", "--height", 32,
             "--width", 32, "--max_sequence_length", WORDS[kind], "--no_zip", "--output_dir", tmp_path / "out"]
    generate.main([str(word) for word in [*words, "--num_inference_steps", 2]])
    family = opened(kind, bases)
    assert (f"{family.label} at 32x32: 2 steps, guidance {family.guidance:g} (default) in the diffusers sense, default scheduler"
            in capsys.readouterr().out)
    [manifest] = (tmp_path / "out").glob("*.json")
    [made] = json.loads(manifest.read_text())
    settings = made["metadata"]
    assert (settings["cfg"], settings["cfg_convention"], settings["scheduler"]) == (family.guidance, "diffusers", "default")
    assert settings["max_sequence_length"] == WORDS[kind] and (tmp_path / "out" / made["gen_image_path"]).is_file()
    with pytest.raises(UserError, match="--cfg_convention official: give --cfg too"):
        generate.main([str(word) for word in [*words, "--cfg_convention", "official"]])


@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_a_whole_run_leaves_a_pipeline(kind, trained, bases):
    run = trained(kind, WHOLE)
    family, state = opened(kind, bases), checkpoint(run)
    assert_same(getattr(DiffusionPipeline.from_pretrained(run), family.backbone).state_dict(), state)
    assert_same(load_network(family, run / "checkpoint-3").state_dict(), state)
    assert_same(load_network(family, run).state_dict(), state)
    assert (run / "unet.pth").is_file() == (family.backbone == "unet")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_merged_lora_is_asked_for(kind, trained, bases):
    run = trained(kind, LORA, "--merge_lora")
    pipeline = DiffusionPipeline.from_pretrained(run)
    expected = load_network(opened(kind, bases), run / "checkpoint-3").state_dict()
    assert_same(pipeline.transformer.state_dict(), expected)


@pytest.mark.parametrize("kind, flags", zip(FAMILY_NAMES, itertools.cycle([WHOLE, LORA])), ids=FAMILY_NAMES)
def test_two_processes_are_one(kind, flags, trained):
    one = trained(kind, flags)
    two = trained(kind, flags, "--train_batch_size", 1, processes=2)
    for a, b in zip(scalars(one), scalars(two), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
