"""Generation on tiny pipelines: equal to diffusers, independent of batches and interruptions, quick to refuse."""

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from common.errors import UserError
from eval import generate, generation
from eval.options import SD15, SDXL, GenerateOptions
from tests.forge import Launch

PROMPTS = ["a red cat", "naïve café in 東京", "<img src=x onerror=alert(1)>", "a dog & a \"hat\"", "a house"]
STEM = "own_seed0_64x64_3s_7.5cfg"


def arguments(unet, pipeline, prompts, *more) -> list[str]:
    return [str(word) for word in ("--unet_path", unet, "--pretrained_model_name_or_path", pipeline,
                                   "--pretrained_vae_model_name_or_path", "base", "--prompts", prompts, "--height", 64,
                                   "--width", 64, "--num_inference_steps", 3, *more)]


def pixels(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*.png"), key=lambda path: [int(part) for part in path.stem.split("_")[:-1]])
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def metadata(folder: Path) -> dict:
    return json.loads((folder / f"{STEM}.json").read_text())[0]["metadata"]


@pytest.fixture(scope="module")
def diffusers_image(request):
    """diffusers_image(kind, prompt, scale, ...): the image of seed 0 by diffusers' own pipeline; each is loaded once."""
    opened = {}

    def draw(kind: str, prompt: str, scale: float, euler: bool = True, **more) -> np.ndarray:
        if (kind, euler) not in opened:
            pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(f"tiny_{kind}"), safety_checker=None)
            if euler:
                pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
            pipeline.set_progress_bar_config(disable=True)
            opened[kind, euler] = pipeline
        image = opened[kind, euler](prompt, height=64, width=64, num_inference_steps=3, guidance_scale=scale,
                                    generator=torch.Generator().manual_seed(0), **more).images[0]
        return np.asarray(image).astype(int)

    return draw


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("convention", ["official", "diffusers"])
def test_equals_a_plain_diffusers_pipeline(kind, convention, request, prompt_file, run_of, diffusers_image):
    unet = run_of(kind)
    generate.main(arguments(unet, request.getfixturevalue(f"tiny_{kind}"), prompt_file, "--cfg_convention", convention,
                            "--batch_size", 2, "--limit", 3))
    ours = pixels(unet.parent / STEM)
    for image, prompt in zip(ours, PROMPTS):
        theirs = diffusers_image(kind, prompt, 8.5 if convention == "official" else 7.5, negative_prompt="")
        assert np.abs(image - theirs).max() <= 1
    assert np.abs(ours[0] - ours[2]).max() > 1  # the prompt matters


def test_the_pipelines_own_empty_prompt(tiny_sdxl, weights, prompt_file, tmp_path, diffusers_image):
    """The base's model_index.json decides: zeros as diffusers has them, or the encoded "" that is the default."""
    encodes = shutil.copytree(tiny_sdxl, tmp_path / "base")
    index = json.loads((encodes / "model_index.json").read_text())
    (encodes / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    for base, empty, name in ((tiny_sdxl, "encoded", "default"), (tiny_sdxl, "pipeline", "zeros"),
                              (encodes, "pipeline", "encoded")):
        generate.main(arguments(weights["sdxl"], base, prompt_file, "--cfg_convention", "diffusers", "--limit", 1,
                                "--empty_prompt", empty, "--output_dir", tmp_path / name))
    default, zeros, encoded = (pixels(tmp_path / name / STEM) for name in ("default", "zeros", "encoded"))
    assert np.array_equal(default, encoded) and np.abs(default - zeros).max() > 1
    assert np.abs(zeros[0] - diffusers_image("sdxl", PROMPTS[0], 7.5)).max() <= 1
    assert metadata(tmp_path / "zeros")["empty_prompt"] == "pipeline"


def test_the_pipelines_own_scheduler(tiny_sd15, sd15_run, prompt_file, diffusers_image):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--scheduler", "default", "--cfg_convention", "diffusers",
                            "--batch_size", 1, "--limit", 2))  # a second batch starts the scheduler anew
    for image, prompt in zip(pixels(sd15_run.parent / STEM), PROMPTS):
        assert np.abs(image - diffusers_image("sd15", prompt, 7.5, euler=False, negative_prompt="")).max() <= 1


def test_types_tiles_and_compilation_are_recorded(tiny_sd15, weights, prompt_file, tmp_path, monkeypatch):
    """The compiler itself is tested in tests/models/test_speed.py: for a CPU it would take minutes here."""
    compiled = []
    monkeypatch.setattr(generation, "check_compiler", lambda device: None)
    monkeypatch.setattr(generation, "compile_blocks", lambda network, blocks: compiled.append(blocks))
    half = ("--mixed_precision", "bf16")
    for name, more in (("full", ()), ("half", half), ("latents", (*half, "--latents_dtype", "unet")),
                       ("cheap", (*half, "--vae_dtype", "unet", "--vae_tiling", "--compile"))):
        generate.main(arguments(weights["sd15"], tiny_sd15, prompt_file, "--limit", 2, *more, "--output_dir", tmp_path / name))
    found = {name: [metadata(tmp_path / name)[f"{part}_dtype"] for part in ("unet", "text_encoder", "noise", "vae", "latents")]
             for name in ("half", "latents", "cheap")}
    assert found["half"] == ["bfloat16"] * 3 + ["float32"] * 2
    assert found["latents"] == ["bfloat16"] * 3 + ["float32", "bfloat16"]
    assert found["cheap"] == ["bfloat16"] * 4 + ["float32"] and len(compiled) == 1
    assert (metadata(tmp_path / "cheap")["vae_tiling"], metadata(tmp_path / "cheap")["compiled"]) == (True, True)
    for name, other in (("full", "half"), ("full", "latents"), ("half", "cheap")):
        assert 0 < np.abs(pixels(tmp_path / name / STEM) - pixels(tmp_path / other / STEM)).mean() < 8


def test_an_image_depends_on_neither_batch_nor_neighbours(tiny_sd15, weights, prompt_file, tmp_path):
    for size in (1, 3, 8):
        generate.main(arguments(weights["sd15"], tiny_sd15, prompt_file, "--batch_size", size, "--output_dir",
                                tmp_path / f"{size}"))
    one, three, eight = (pixels(tmp_path / f"{size}" / STEM) for size in (1, 3, 8))
    assert np.abs(one - eight).max() <= 1 and np.abs(three - eight).max() <= 1


@pytest.mark.slow
def test_killed_and_resumed_equals_an_unbroken_run(tiny_sd15, sd15_run, prompt_file, tmp_path, forge_server):
    prompts = tmp_path / "own.json"
    prompts.write_text(json.dumps([f"prompt {index}" for index in range(30)]))
    flags = arguments(sd15_run, tiny_sd15, prompts, "--batch_size", 3, "--output_dir", tmp_path / "broken")
    [process] = forge_server.start(Launch(flags, "eval.generate"))
    folder = tmp_path / "broken" / STEM
    deadline = time.time() + 200
    while len(list(folder.glob("*.png"))) < 7 and time.time() < deadline:
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert forge_server.wait() == [-signal.SIGKILL]
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 7 <= len(finished) < 30 and not (tmp_path / "broken" / f"{STEM}.json").exists()
    for path in folder.glob("*.png"):
        Image.open(path).load()  # no half-written image

    generate.main(arguments(sd15_run, tiny_sd15, prompts, "--batch_size", 3, "--output_dir", tmp_path / "broken"))
    generate.main(arguments(sd15_run, tiny_sd15, prompts, "--batch_size", 3, "--output_dir", tmp_path / "whole"))
    for name, written in finished.items():
        assert (folder / name).stat().st_mtime_ns == written  # not made again
    whole = tmp_path / "whole" / STEM
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())
    for path in whole.glob("*.png"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_images_of_one(tiny_sd15, sd15_run, prompt_file, tmp_path, program):
    said = program("eval.generate", arguments(sd15_run, tiny_sd15, prompt_file, "--batch_size", 3,
                                              "--output_dir", tmp_path / "two"), processes=2)
    assert "process 1 of 2" in said and said.count("wrote") == 1
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--batch_size", 3, "--output_dir", tmp_path / "one"))
    for path in (tmp_path / "one" / STEM).glob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / STEM / path.name).read_bytes()
    assert (tmp_path / "two" / f"{STEM}.json").exists()


@pytest.fixture
def lora(tiny_sd15, tmp_path) -> Path:
    """LoRA weights of rank 2 in a run's folder, which name their base."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=convert_state_dict_to_diffusers(
        get_peft_model_state_dict(unet)))
    [file] = (tmp_path / "lora").iterdir()
    save_file(load_file(file), file, metadata={"base": "output/base", "base_weights": "{}"})
    return file


def test_what_is_loaded_is_said(tiny_sd15, sd15_run, lora, prompt_file, tmp_path, capsys):
    unet = shutil.copytree(tiny_sd15 / "unet", tmp_path / "whole" / "unet")
    for source, said in (("base", f"the base {tiny_sd15}"), (sd15_run, f"whole network of {sd15_run}"),
                         (sd15_run.parent, f"whole network of {sd15_run}"), (unet.parent, f"whole network of {unet}"),
                         (lora, f"LoRA of rank 2 ({lora}) on {tiny_sd15}"), (lora.parent, f"LoRA of rank 2 ({lora}) on {tiny_sd15}")):
        generate.main(arguments(source, tiny_sd15, prompt_file, "--limit", 1, "--output_dir", tmp_path / "out", "--overwrite"))
        assert f"loaded {said}\n" in capsys.readouterr().out
    progress = {"settings": {"unet_init": str(sd15_run)}}
    (lora.parent / "progress.json").write_text(json.dumps(progress))
    generate.main(arguments(lora.parent, tiny_sd15, prompt_file, "--limit", 1, "--output_dir", tmp_path / "out", "--overwrite"))
    assert f"loaded LoRA of rank 2 ({lora}) on {sd15_run}, of {tiny_sd15}\n" in capsys.readouterr().out


# --- what is refused -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, vae, base, opened", [
    ({}, None, SD15, None), ({"sdxl": True}, None, SDXL, "madebyollin/sdxl-vae-fp16-fix"),
    ({"sdxl": True}, "base", SDXL, None), ({"pretrained_model_name_or_path": "mine/base"}, "mine/vae", "mine/base", "mine/vae"),
])
def test_the_published_base_and_vae_unless_named(more, vae, base, opened, monkeypatch):
    from models.stable_diffusion import StableDiffusion15, StableDiffusionXL
    for kind in (StableDiffusion15, StableDiffusionXL):
        monkeypatch.setattr(kind, "__init__", lambda self, options, index: setattr(self, "options", options))
    monkeypatch.setattr(generate, "find_family", lambda options: (StableDiffusionXL if options.sdxl else StableDiffusion15, {}))
    options = generate.open_base(GenerateOptions("base", pretrained_vae_model_name_or_path=vae, **more)).options
    assert (options.pretrained_model_name_or_path, options.pretrained_vae_model_name_or_path) == (base, opened)


@pytest.mark.parametrize("more, said", [
    (["--height", 0], "--height must be .* at least 8, not 0"), (["--width", -64], "--width must be .* at least 8"),
    (["--height", 60], "--height must be a multiple of 8"), (["--batch_size", 0], "--batch_size must be .* at least 1"),
    (["--num_inference_steps", 0], r"--num_inference_steps must lie in \[1, 1000\]"),
    (["--num_inference_steps", 1001], r"--num_inference_steps must lie in \[1, 1000\]"),
    (["--seed", -1], "--seed must be .* at least 0"), (["--seed", 2**63], "--seed: the last image's seed"),
    (["--seed", 2**63 - 1, "--num_images_per_prompt", 2], "--seed: the last image's seed"),
    (["--cfg", "nan"], "--cfg must be a finite number"), (["--cfg", "inf"], "--cfg must be a finite number"),
    (["--pretrained_model_name_or_path", "/no/such"], "no base model at /no/such: no such folder"),
    (["--unet_path", "/no/such"], "no weights at /no/such"), (["--unet_path", "absent.pth"], "no weights at absent.pth"),
    (["--prompts", "nosuch"], "no prompt group at"), (["--prompts", "own", "other/own.json"], "names two groups own"),
])
def test_what_cannot_work_is_refused_before_anything_is_opened(more, said, monkeypatch):
    monkeypatch.setattr("models.family.importlib.import_module", lambda *_: pytest.fail("a family was opened"))
    with pytest.raises(UserError, match=said) as error:
        generate.main([str(word) for word in ("--unet_path", "base", "--prompts", "own", *more)])
    assert "\n" not in str(error.value)


def test_without_its_base_a_lora_file_names_it(lora, sd15_run, prompt_file, monkeypatch):
    def absent(options):
        raise UserError(f"no base {options.pretrained_model_name_or_path}")

    monkeypatch.setattr(generate, "find_family", absent)
    hint = "this LoRA was trained on output/base: add --pretrained_model_name_or_path output/base"
    for unet, more, said in ((lora, (), hint), (lora.parent, (), hint), (lora, ("--pretrained_model_name_or_path", "a/b"), "no base a/b$"),
                             (sd15_run, (), f"no base {SD15}$"), ("base", (), f"no base {SD15}$")):
        with pytest.raises(UserError, match=f"^{said}"):
            generate.main([str(word) for word in ("--unet_path", unet, "--prompts", prompt_file, *more)])


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("fault, said", [
    ("other base", r"does not fit this UNet2DConditionModel .*other base model"),
    ("evil pickle", "nothing in it was executed"),
    ("no pipeline", "is no diffusers pipeline"),
    ("sdxl", "--sdxl, but .* is SD1.5: leave --sdxl out"),
    ("output is a file", "--output_dir: the folder .* cannot be made"),
    ("list is a folder", "--manifest_list: .* is a folder"),
    ("damaged settings", "settings.json is damaged"),
])
def test_bad_input_is_reported_in_one_line(fault, said, tiny_sd15, tiny_sdxl, sd15_run, prompt_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, more = tiny_sd15, []
    if fault == "other base":
        base = tiny_sdxl
    elif fault == "evil pickle":
        sd15_run.write_bytes(pickle.dumps(Evil()))
    elif fault == "no pipeline":
        base = tmp_path
    elif fault == "sdxl":
        more = ["--sdxl"]
    elif fault == "output is a file":
        more = ["--output_dir", prompt_file]
    elif fault == "list is a folder":
        more = ["--manifest_list", tmp_path]
    elif fault == "damaged settings":
        (sd15_run.parent / STEM).mkdir()
        (sd15_run.parent / STEM / "settings.json").write_text('{"seed"')
    with pytest.raises(UserError, match=said) as error:
        generate.main(arguments(sd15_run, base, prompt_file, *more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
