"""Generation on tiny pipelines: equal to diffusers, independent of batches and interruptions, clear in its errors."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from eval import generate
from eval.generate import IMAGE_DESCRIPTION, base_files, identity, read_prompt, unet_files, vae_files
from common.errors import UserError
from common.locks import hold, release

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red cat", "naïve café in 東京", "<img src=x onerror=alert(1)>", "a dog & a \"hat\"", "a house"]
STEM = "own_seed0_64x64_3s_7.5cfg"


def arguments(unet, pipeline, prompts, *more) -> list[str]:
    return [str(word) for word in ("--unet_path", unet, "--pretrained_model_name_or_path", pipeline,
                                   "--pretrained_vae_model_name_or_path", "base", "--prompts", prompts, "--height", 64,
                                   "--width", 64, "--num_inference_steps", 3, *more)]


def pixels(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*.png"), key=lambda path: [int(part) for part in path.stem.split("_")[:-1]])
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("convention", ["official", "diffusers"])
def test_equals_a_plain_diffusers_pipeline(kind, convention, request, prompt_file, tmp_path):
    base, unet = request.getfixturevalue(f"tiny_{kind}"), request.getfixturevalue(f"{kind}_run")
    generate.main(arguments(unet, base, prompt_file, "--cfg_convention", convention, "--batch_size", 2))
    ours = pixels(unet.parent / STEM)

    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for image, prompt in zip(ours, PROMPTS):
        theirs = pipeline(prompt, negative_prompt="", height=64, width=64, num_inference_steps=3,
                          guidance_scale=8.5 if convention == "official" else 7.5,
                          generator=torch.Generator().manual_seed(0)).images[0]
        assert np.abs(image - np.asarray(theirs).astype(int)).max() <= 1
    assert np.abs(ours[0] - ours[4]).max() > 1  # the prompt matters


@pytest.mark.parametrize("zeros", [True, False])
def test_the_pipelines_own_empty_prompt(zeros, tiny_sdxl, sdxl_run, prompt_file, tmp_path):
    """The base's model_index.json decides: zeros as diffusers has them, or the encoded "" that is the default."""
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    for name in ("encoded", "pipeline"):
        generate.main(arguments(sdxl_run, base, prompt_file, "--cfg_convention", "diffusers", "--limit", 2, "--empty_prompt",
                                name, "--output_dir", tmp_path / name))
    encoded, ours = (pixels(tmp_path / name / STEM) for name in ("encoded", "pipeline"))
    assert (np.abs(encoded - ours).max() > 1) == zeros
    assert json.loads((tmp_path / "pipeline" / f"{STEM}.json").read_text())[0]["metadata"]["empty_prompt"] == "pipeline"

    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for image, prompt in zip(ours, PROMPTS):
        theirs = pipeline(prompt, height=64, width=64, num_inference_steps=3, guidance_scale=7.5,
                          generator=torch.Generator().manual_seed(0)).images[0]
        assert np.abs(image - np.asarray(theirs).astype(int)).max() <= 1


def test_a_folder_from_before_that_option_goes_on(tiny_sd15, sd15_run, prompt_file):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 1))
    path = sd15_run.parent / STEM / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("empty_prompt") == "encoded"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="empty_prompt was encoded, now pipeline"):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--empty_prompt", "pipeline"))
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 2))


def test_the_pipelines_own_scheduler(tiny_sd15, sd15_run, prompt_file):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--scheduler", "default", "--cfg_convention", "diffusers"))
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for image, prompt in zip(pixels(sd15_run.parent / STEM), PROMPTS):
        theirs = pipeline(prompt, negative_prompt="", height=64, width=64, num_inference_steps=3, guidance_scale=7.5,
                          generator=torch.Generator().manual_seed(0)).images[0]
        assert np.abs(image - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("latents", ["float32", "unet"])
def test_bfloat16_is_close_and_told(latents, tiny_sd15, sd15_run, prompt_file, tmp_path):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 2))
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 2, "--mixed_precision", "bf16",
                            "--latents_dtype", latents, "--output_dir", tmp_path / "half"))
    metadata = json.loads((tmp_path / "half" / f"{STEM}.json").read_text())[0]["metadata"]
    told = [metadata[f"{name}_dtype"] for name in ("unet", "text_encoder", "noise", "vae", "latents")]
    assert told == ["bfloat16"] * 3 + ["float32", {"unet": "bfloat16"}.get(latents, "float32")]
    difference = np.abs(pixels(sd15_run.parent / STEM) - pixels(tmp_path / "half" / STEM))
    assert 0 < difference.mean() < 8


def test_a_cheaper_vae_and_compilation_are_told(tiny_sd15, sd15_run, prompt_file, tmp_path, monkeypatch):
    """The compiler itself is tested in tests/training/test_speed.py: for a CPU it would take minutes here."""
    compiled = []
    monkeypatch.setattr(generate, "check_compiler", lambda device: None)
    monkeypatch.setattr(generate, "compile_blocks", compiled.append)
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 2, "--mixed_precision", "bf16"))
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 2, "--mixed_precision", "bf16", "--vae_dtype", "unet",
                            "--vae_tiling", "--compile", "--output_dir", tmp_path / "cheap"))
    metadata = json.loads((tmp_path / "cheap" / f"{STEM}.json").read_text())[0]["metadata"]
    assert (metadata["vae_dtype"], metadata["vae_tiling"], metadata["compiled"]) == ("bfloat16", True, True)
    assert len(compiled) == 1
    assert 0 < np.abs(pixels(sd15_run.parent / STEM) - pixels(tmp_path / "cheap" / STEM)).mean() < 8


def test_manifest_names_files_and_settings(tiny_sd15, sd15_run, prompt_file):
    listed = sd15_run.parent / "lists" / "listed"
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--manifest_list", listed))
    folder = sd15_run.parent / STEM
    entries = json.loads((sd15_run.parent / f"{STEM}.json").read_text())
    assert listed.read_text() == f"{sd15_run.parent / STEM}.json\n"
    assert [entry["prompt"] for entry in entries] == PROMPTS
    assert [entry["gen_image_path"] for entry in entries] == [f"{STEM}/{index}_64x64.png" for index in range(5)]
    metadata = entries[3]["metadata"]
    assert (metadata["cfg"], metadata["cfg_convention"], metadata["guidance_scale_diffusers"]) == (7.5, "official", 8.5)
    assert (metadata["seed"], metadata["index"], metadata["latents_dtype"]) == (0, 3, "float32")
    assert [read_prompt(folder / f"{index}_64x64.png") for index in range(5)] == PROMPTS
    assert Image.open(folder / "0_64x64.png").getexif()[IMAGE_DESCRIPTION] == PROMPTS[0]
    assert len(zipfile.ZipFile(sd15_run.parent / f"{STEM}.zip").namelist()) == 5


def test_image_depends_on_neither_batch_nor_neighbours(tiny_sd15, sd15_run, prompt_file, tmp_path):
    for size in (1, 3, 8):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--batch_size", size, "--output_dir", tmp_path / f"{size}"))
    one, three, eight = (pixels(tmp_path / f"{size}" / STEM) for size in (1, 3, 8))
    assert np.abs(one - eight).max() <= 1 and np.abs(three - eight).max() <= 1


def test_several_images_a_prompt_are_seeded_with_seed_plus_k(tiny_sd15, sd15_run, prompt_file, tmp_path):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--num_images_per_prompt", 2, "--limit", 2,
                            "--output_dir", tmp_path / "two"))
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--seed", 1, "--limit", 2, "--output_dir", tmp_path / "one"))
    two = tmp_path / "two" / STEM
    assert sorted(path.name for path in two.glob("*.png")) == [f"{i}_{k}_64x64.png" for i in (0, 1) for k in (0, 1)]
    seed_one = pixels(tmp_path / "one" / STEM.replace("seed0", "seed1"))
    for index in (0, 1):
        assert np.abs(np.asarray(Image.open(two / f"{index}_1_64x64.png")).astype(int) - seed_one[index]).max() <= 1
    entries = json.loads((tmp_path / "two" / f"{STEM}.json").read_text())
    assert [entry["metadata"]["image_seed"] for entry in entries] == [0, 1, 0, 1]


def test_a_finished_run_is_skipped_and_a_longer_one_goes_on(tiny_sd15, sd15_run, prompt_file, capsys, monkeypatch):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 2))
    first = (sd15_run.parent / STEM / "0_64x64.png").stat().st_mtime_ns
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file))
    assert len(json.loads((sd15_run.parent / f"{STEM}.json").read_text())) == 5
    assert (sd15_run.parent / STEM / "0_64x64.png").stat().st_mtime_ns == first
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: pytest.fail("nothing is left to generate"))
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file))
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 1))
    assert len(json.loads((sd15_run.parent / f"{STEM}.json").read_text())) == 5  # a longer manifest is kept


def test_changed_settings_are_never_mixed(tiny_sd15, sd15_run, prompt_file):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 1))
    with pytest.raises(UserError, match="cfg_convention was official, now diffusers"):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--cfg_convention", "diffusers"))
    state = torch.load(sd15_run, weights_only=True)
    torch.save({key: value + 0.01 for key, value in state.items()}, sd15_run)  # trained on
    with pytest.raises(UserError, match="unet_identity"):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file))
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--overwrite"))
    assert len(json.loads((sd15_run.parent / f"{STEM}.json").read_text())) == 5
    prompt_file.write_text(json.dumps(["another prompt", *PROMPTS[1:]]))
    with pytest.raises(UserError, match="made for the prompt 'a red cat'"):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file))


def test_a_mistake_that_made_no_image_does_not_bind_the_folder(tiny_sd15, sd15_run, prompt_file):
    with pytest.raises(UserError, match="no weights at"):
        generate.main(arguments(sd15_run.with_suffix(".pt"), tiny_sd15, prompt_file, "--output_dir", sd15_run.parent))
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 1))
    assert len(list((sd15_run.parent / STEM).glob("*.png"))) == 1


def test_a_damaged_image_names_its_remedy(tiny_sd15, sd15_run, prompt_file):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 1))
    [image] = (sd15_run.parent / STEM).glob("*.png")
    image.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged, or no image of this program: delete it"):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 1))
    image.unlink()
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 1))
    assert image.stat().st_size > 0


def test_a_second_program_leaves_the_images_of_the_first_alone(tiny_sd15, sd15_run, prompt_file):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file))
    folder = sd15_run.parent / STEM
    hold(folder)  # as the first program does while it runs
    words = arguments(sd15_run, tiny_sd15, prompt_file, "--overwrite")
    second = subprocess.run([sys.executable, "-m", "eval.generate", *words], cwd=ROOT, capture_output=True, text=True)
    release(folder)
    assert second.returncode == 1 and "another program is at work" in second.stderr
    assert len(list(folder.glob("*.png"))) == 5


@pytest.mark.parametrize("kind", ["pipeline", "unet", "checkpoint", "lora"])
def test_a_models_folder_may_hold_its_images(kind, tiny_sd15, sd15_run, tmp_path):
    """The identities cover what is loaded, not the settings, manifests and scores that a run leaves beside it."""
    folder = sd15_run.parent if kind == "checkpoint" else tmp_path / "model"
    if kind == "lora":
        folder.mkdir()
        save_file({"unet.x.lora_A.weight": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")
    elif kind != "checkpoint":
        shutil.copytree(tiny_sd15 if kind == "pipeline" else tiny_sd15 / "unet", folder)
    base = folder if kind == "pipeline" else tiny_sd15

    def identities() -> tuple[str, ...]:
        return identity(str(base), base_files), identity(str(folder), unet_files), identity(str(base), vae_files)

    before = identities()
    assert all(told.startswith("sha256:") for told in before)
    (folder / STEM).mkdir()
    for name in (f"{STEM}/settings.json", f"{STEM}.json", f"{STEM}_scores.json"):
        (folder / name).write_text("[]")
    assert identities() == before
    weights, = (folder / "unet" if kind == "pipeline" else folder).glob(
        {"checkpoint": "unet.pth", "lora": "pytorch_lora*"}.get(kind, "diffusion_pytorch_model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identities()[1] != before[1]


def test_a_diffusers_folder_is_generated_from_twice(tiny_sd15, prompt_file, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_sd15, tmp_path / "model")
    generate.main(arguments(folder, folder, prompt_file, "--limit", 1))
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: pytest.fail("nothing is left to generate"))
    generate.main(arguments(folder, folder, prompt_file, "--limit", 1))
    assert (folder / f"{STEM}.json").exists()


@pytest.mark.parametrize("flags, told", [
    (["--height", 0], "--height 0 is no multiple of 8 above 0"), (["--width", -64], "--width -64 is no multiple"),
    (["--batch_size", 0], "--batch_size must be at least 1"), (["--seed", 2**63], "--seed must not be negative, nor"),
    (["--seed", 2**63 - 1, "--num_images_per_prompt", 2], "a prompt's last seed above"),
    (["--cfg", "nan"], "--cfg nan is no finite number"), (["--cfg", "inf"], "--cfg inf is no"),
    (["--num_inference_steps", 1001], "more than the 1000"),
])
def test_values_that_no_sampler_takes(flags, told, tiny_sd15, sd15_run, prompt_file):
    with pytest.raises(UserError, match=told):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file, *flags))
    assert [path.name for path in sd15_run.parent.iterdir()] == ["unet.pth"]


def test_two_groups_of_one_name_are_refused(tiny_sd15, sd15_run, prompt_file):
    other = prompt_file.parent / "other" / prompt_file.name
    other.parent.mkdir()
    other.write_text('["another prompt"]')
    with pytest.raises(UserError, match="names two groups own"):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--prompts", prompt_file, other))
    assert not (sd15_run.parent / STEM).exists()


def test_a_manifest_of_other_prompts_or_a_damaged_one_is_written_anew(tiny_sd15, sd15_run, prompt_file):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 2))
    manifest = sd15_run.parent / f"{STEM}.json"
    right = manifest.read_text()
    for wrong in (right.replace(PROMPTS[0], "another prompt"), right[:40], "{}", "[]"):
        manifest.write_text(wrong)
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--limit", 2))
        assert manifest.read_text() == right


def test_a_manifest_of_the_published_program_is_kept(tiny_sd15, sd15_run, prompt_file, capsys):
    manifest = sd15_run.parent / f"{STEM}.json"
    manifest.write_text("[]")
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file))
    assert manifest.read_text() == "[]" and "exists" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_and_resumed_equals_an_unbroken_run(tiny_sd15, sd15_run, prompt_file, tmp_path):
    prompts = tmp_path / "own.json"
    prompts.write_text(json.dumps([f"prompt {index}" for index in range(30)]))
    command = [sys.executable, "-m", "eval.generate", *arguments(sd15_run, tiny_sd15, prompts, "--batch_size", 3)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--output_dir", str(tmp_path / "broken")], cwd=ROOT, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "broken" / STEM
    deadline = time.time() + 200
    while len(list(folder.glob("*.png"))) < 7 and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
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


def test_a_committed_batch_is_finished_and_a_partial_one_thrown_away(tiny_sd15, sd15_run, prompt_file):
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--batch_size", 2))
    folder, manifest = sd15_run.parent / STEM, sd15_run.parent / f"{STEM}.json"
    expected = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    manifest.unlink()
    (folder / ".batch-0.ready").mkdir()
    (folder / "1_64x64.png").rename(folder / ".batch-0.ready" / "1_64x64.png")  # killed between two renames
    committed = (folder / ".batch-0.ready" / "1_64x64.png").stat().st_mtime_ns
    (folder / ".batch-1.partial").mkdir()
    (folder / "3_64x64.png").unlink()
    (folder / ".batch-1.partial" / "3_64x64.png").write_bytes(expected["3_64x64.png"][:100])
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--batch_size", 2))
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == expected
    assert (folder / "1_64x64.png").stat().st_mtime_ns == committed
    assert not list(folder.glob(".batch-*")) and manifest.exists()


def test_a_full_disk_leaves_finished_images(tiny_sd15, sd15_run, prompt_file, monkeypatch):
    written = []

    def write_until_full(image, prompt, path):
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        written.append(path.name)
        return write_image(image, prompt, path)

    write_image = generate.write_image
    monkeypatch.setattr(generate, "write_image", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--batch_size", 2))
    folder = sd15_run.parent / STEM
    assert sorted(path.name for path in folder.glob("*.png")) == ["0_64x64.png", "1_64x64.png"]
    assert not list(folder.glob(".batch-*"))


@pytest.mark.slow
def test_two_processes_give_the_images_of_one(tiny_sd15, sd15_run, prompt_file, tmp_path, program):
    told = program("eval.generate", arguments(sd15_run, tiny_sd15, prompt_file, "--batch_size", 3,
                                              "--output_dir", tmp_path / "two"), processes=2)
    assert "process 1 of 2" in told and told.count("wrote") == 1
    generate.main(arguments(sd15_run, tiny_sd15, prompt_file, "--batch_size", 3, "--output_dir", tmp_path / "one"))
    for path in (tmp_path / "one" / STEM).glob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / STEM / path.name).read_bytes()
    assert (tmp_path / "two" / f"{STEM}.json").exists()


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("fault, told", [
    ("other base", r"does not fit this UNet2DConditionModel .*other base model"),
    ("evil pickle", "nothing in it was executed"),
    ("no file", "no weights at|no file or folder"),
    ("empty prompts", "lists no prompt"),
    ("odd height", "no multiple of 8"),
    ("no pipeline", "no diffusers pipeline at"),
    ("sdxl", "is no SDXL pipeline"),
    ("no steps", "num_inference_steps must be at least 1"),
    ("output is a file", "--output_dir: the folder .* cannot be made"),
    ("list is a folder", "--manifest_list: .* is a folder"),
    ("damaged settings", "settings.json is damaged"),
])
def test_bad_input_is_told_in_one_line(fault, told, tiny_sd15, tiny_sdxl, sd15_run, prompt_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, unet, more = tiny_sd15, sd15_run, []
    if fault == "other base":
        base = tiny_sdxl
    elif fault == "evil pickle":
        sd15_run.write_bytes(pickle.dumps(Evil()))
    elif fault == "no file":
        unet = tmp_path / "absent" / "unet.pth"
    elif fault == "empty prompts":
        prompt_file.write_text("[]")
    elif fault == "odd height":
        more = ["--height", 60]
    elif fault == "no pipeline":
        base = tmp_path
    elif fault == "sdxl":
        more = ["--sdxl"]
    elif fault == "no steps":
        more = ["--num_inference_steps", 0]
    elif fault == "output is a file":
        more = ["--output_dir", prompt_file]
    elif fault == "list is a folder":
        more = ["--manifest_list", tmp_path]
    elif fault == "damaged settings":
        (sd15_run.parent / STEM).mkdir()
        (sd15_run.parent / STEM / "settings.json").write_text('{"seed"')
    with pytest.raises(UserError, match=told) as error:
        generate.main(arguments(unet, base, prompt_file, *more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
