"""What generation leaves on the disk: resumed, never mixed, whole. The images are a stub's: no model is loaded."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common.errors import UserError
from common.locks import hold, release
from common.train_options import ModelOptions
from eval import folders, generation
from eval.folders import IMAGE_DESCRIPTION, read_prompt
from eval.generation import base_files, identity, network_files, vae_files
from eval.options import GenerateOptions
from models.family import open_family
from prompts import read_group

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red cat", "naïve café in 東京", "<img src=x onerror=alert(1)>", "a dog & a \"hat\"", "a house"]
STEM = "own_seed0_64x64_3s_7.5cfg"


@pytest.fixture(scope="module")
def family(tiny_sd15):
    return open_family(ModelOptions(str(tiny_sd15)))


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[str, int]]:
    """The prompts and seeds that were drawn, instead of the models' images of them."""
    calls = []

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        calls.extend(zip(prompts, seeds))
        return [Image.new("RGB", (64, 64), tuple(prompt.encode()[:2]) + (seed,)) for prompt, seed in zip(prompts, seeds)]

    monkeypatch.setattr(generation, "load_models", lambda *_: draw)
    return calls


@pytest.fixture
def generate(family, drawn, sd15_run, prompt_file):
    """generate(**options): one run of the group `own` into the run's folder."""
    def run(of=family, **more) -> None:
        options = replace(GenerateOptions(str(sd15_run), prompts=[str(prompt_file)], height=64, width=64,
                                          num_inference_steps=3), **more)
        generation.generate(options, of, {name: read_group(name)[:options.limit] for name in options.prompts})
    return run


@pytest.fixture
def folder(sd15_run) -> Path:
    return sd15_run.parent / STEM


@pytest.fixture
def manifest(sd15_run) -> Path:
    return sd15_run.parent / f"{STEM}.json"


def entries(manifest: Path) -> list[dict]:
    return json.loads(manifest.read_text())


def test_the_manifest_names_files_and_settings(generate, folder, manifest):
    listed = folder.parent / "lists" / "listed"
    generate(manifest_list=str(listed))
    assert listed.read_text() == f"{manifest}\n"
    assert [entry["prompt"] for entry in entries(manifest)] == PROMPTS
    assert [entry["gen_image_path"] for entry in entries(manifest)] == [f"{STEM}/{index}_64x64.png" for index in range(5)]
    metadata = entries(manifest)[3]["metadata"]
    assert (metadata["cfg"], metadata["cfg_convention"], metadata["guidance_scale_diffusers"]) == (7.5, "official", 8.5)
    assert (metadata["seed"], metadata["index"], metadata["latents_dtype"]) == (0, 3, "float32")
    assert [read_prompt(folder / f"{index}_64x64.png") for index in range(5)] == PROMPTS
    assert Image.open(folder / "0_64x64.png").getexif()[IMAGE_DESCRIPTION] == PROMPTS[0]
    assert len(zipfile.ZipFile(manifest.with_suffix(".zip")).namelist()) == 5


def test_a_damaged_png_and_another_programs_have_no_prompt(tmp_path):
    path, exif = tmp_path / "0.png", Image.Exif()
    exif[IMAGE_DESCRIPTION] = "caf\u00e9".encode("latin-1")
    Image.new("RGB", (16, 16)).save(path, exif=exif)
    assert read_prompt(path) is None
    path.write_bytes(path.read_bytes().replace(b"\0\0\0\rIHDR", b"\0\0\0\1IHDR"))
    assert read_prompt(path) is None


def test_several_images_a_prompt_are_seeded_with_seed_plus_k(generate, drawn, folder, manifest):
    generate(num_images_per_prompt=2, limit=2, batch_size=3)
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{i}_{k}_64x64.png" for i in (0, 1) for k in (0, 1)]
    assert drawn == [(prompt, seed) for prompt in PROMPTS[:2] for seed in (0, 1)]
    assert [entry["metadata"]["image_seed"] for entry in entries(manifest)] == [0, 1, 0, 1]


def test_a_seed_per_prompt_is_its_own_for_every_image(generate, drawn, folder, manifest):
    generate(seed_per_prompt=True, num_images_per_prompt=2, seed=3, limit=3)
    seeds = [seed for _, seed in drawn]
    assert seeds == [3, 4, 5, 6, 7, 8]
    entries = json.loads(manifest.with_name(manifest.name.replace("seed0", "seed3")).read_text())
    assert [entry["metadata"]["image_seed"] for entry in entries] == seeds and entries[0]["metadata"]["seed_per_prompt"]
    with pytest.raises(UserError, match="seed_per_prompt was True, now False"):
        generate(num_images_per_prompt=2, seed=3, limit=3)


def test_a_generate_whose_model_is_not_there_leaves_nothing(generate, family, folder, manifest, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(generation, "load_models", lambda *_: (_ for _ in ()).throw(UserError("no such model")))
        with pytest.raises(UserError, match="no such model"):
            generate()
        assert not folder.exists() and not manifest.exists() and (folder.parent / "unet.pth").exists()
        with pytest.raises(UserError, match="no such model"):
            generate(unet_path="org/name", output_dir=str(folder.parent / "output"))
        assert not (folder.parent / "output").exists()
    generate(limit=2)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "load_models", lambda *_: (_ for _ in ()).throw(UserError("no such model")))
        with pytest.raises(UserError, match="no such model"):
            generate()
    assert len(list(folder.glob("*.png"))) == 2 and (folder / "settings.json").exists()


def test_a_finished_run_is_skipped_and_a_longer_one_goes_on(generate, drawn, folder, manifest):
    generate(limit=2)
    first = (folder / "0_64x64.png").stat().st_mtime_ns
    generate()
    assert len(entries(manifest)) == 5 and (folder / "0_64x64.png").stat().st_mtime_ns == first
    drawn.clear()
    generate()
    generate(limit=1)
    assert not drawn and len(entries(manifest)) == 5  # a longer manifest is kept


def test_changed_settings_are_never_mixed(generate, sd15_run, prompt_file, manifest):
    generate(limit=1)
    with pytest.raises(UserError, match="cfg_convention was official, now diffusers"):
        generate(cfg_convention="diffusers")
    state = torch.load(sd15_run, weights_only=True)
    torch.save({key: value + 0.01 for key, value in state.items()}, sd15_run)  # trained on
    with pytest.raises(UserError, match="unet_identity"):
        generate()
    generate(overwrite=True)
    assert len(entries(manifest)) == 5
    prompt_file.write_text(json.dumps(["another prompt", *PROMPTS[1:]]))
    with pytest.raises(UserError, match="made for the prompt 'a red cat'"):
        generate()


def test_a_folder_from_before_the_option_empty_prompt_goes_on(generate, folder):
    generate(limit=1)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings.pop("empty_prompt") == "encoded"
    (folder / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="empty_prompt was encoded, now pipeline"):
        generate(empty_prompt="pipeline")
    generate(limit=2)


def test_a_mistake_that_made_no_image_does_not_bind_the_folder(generate, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(generation, "load_models", lambda *_: (_ for _ in ()).throw(UserError("no such weights")))
        with pytest.raises(UserError, match="no such weights"):
            generate(cfg_convention="diffusers")
    generate(limit=1)
    assert len(list(folder.glob("*.png"))) == 1


def test_a_damaged_image_names_its_remedy(generate, folder):
    generate(limit=1)
    [image] = folder.glob("*.png")
    image.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged, or no image of this program: delete it"):
        generate(limit=1)
    image.unlink()
    generate(limit=1)
    assert image.stat().st_size > 0


def test_a_second_program_leaves_the_images_of_the_first_alone(generate, folder):
    generate()
    hold(folder)  # as the first program does while it runs
    try:
        program = ("from eval.folders import *\n"
                   f"prepare_folder(Group('own', {STEM!r}, Path({str(folder.parent)!r}), []), {{}}, overwrite=True)")
        second = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    finally:
        release(folder)
    assert second.returncode == 1 and "another program is at work" in second.stderr
    assert len(list(folder.glob("*.png"))) == 5


@pytest.mark.parametrize("kind", ["pipeline", "unet", "checkpoint", "lora"])
def test_a_models_folder_may_hold_its_images(kind, family, tiny_sd15, sd15_run, tmp_path):
    """The identities cover what is loaded, not the settings, manifests and scores that a run leaves beside it."""
    folder = sd15_run.parent if kind == "checkpoint" else tmp_path / "model"
    if kind == "lora":
        folder.mkdir()
        save_file({"unet.x.lora_A.weight": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")
    elif kind != "checkpoint":
        shutil.copytree(tiny_sd15 if kind == "pipeline" else tiny_sd15 / "unet", folder)
    base = folder if kind == "pipeline" else tiny_sd15

    def identities() -> tuple[str, ...]:
        return (identity(str(base), lambda path: base_files(path, family)),
                identity(str(folder), lambda path: network_files(path, family)), identity(str(base), vae_files))

    before = identities()
    assert all(found.startswith("sha256:") for found in before)
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


def test_a_diffusers_folder_is_generated_from_twice(generate, drawn, tiny_sd15, tmp_path):
    folder = shutil.copytree(tiny_sd15, tmp_path / "model")
    of = open_family(ModelOptions(str(folder)))
    generate(of, unet_path=str(folder), limit=1)
    generate(of, unet_path=str(folder), limit=1)
    assert len(drawn) == 1 and (folder / f"{STEM}.json").exists()


def test_a_manifest_of_other_prompts_or_a_damaged_one_is_written_anew(generate, manifest):
    generate(limit=2)
    right = manifest.read_text()
    for wrong in (right.replace(PROMPTS[0], "another prompt"), right[:40], "{}", "[]"):
        manifest.write_text(wrong)
        generate(limit=2)
        assert manifest.read_text() == right


def test_a_manifest_of_the_published_program_is_kept(generate, drawn, manifest, capsys):
    manifest.write_text("[]")
    generate()
    assert not drawn and manifest.read_text() == "[]" and "exists" in capsys.readouterr().out


def test_finished_images_of_a_batch_are_kept_and_half_an_image_is_thrown_away(generate, folder, manifest):
    generate(batch_size=2)
    expected = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    finished = (folder / "2_64x64.png").stat().st_mtime_ns
    manifest.unlink()
    (folder / "3_64x64.png").unlink()  # killed between the two images of the second batch
    (folder / ".3_64x64.png.x1.partial").write_bytes(expected["3_64x64.png"][:100])
    generate(batch_size=2)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == expected
    assert (folder / "2_64x64.png").stat().st_mtime_ns == finished
    assert not list(folder.glob("*.partial")) + list(folder.glob(".*.partial")) and manifest.exists()


def test_a_batch_is_drawn_whole_whatever_is_missing_of_it(generate, drawn, folder):
    generate(batch_size=2)
    (folder / "3_64x64.png").unlink()
    kept = (folder / "2_64x64.png").stat().st_mtime_ns
    drawn.clear()
    generate(batch_size=2)
    assert drawn == [(PROMPTS[2], 0), (PROMPTS[3], 0)] and (folder / "2_64x64.png").stat().st_mtime_ns == kept


def test_a_full_disk_leaves_finished_images(generate, folder, monkeypatch):
    written = []

    def write_until_full(image, prompt, path):
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        written.append(path.name)
        return write_image(image, prompt, path)

    write_image = folders.write_image
    monkeypatch.setattr(folders, "write_image", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        generate(batch_size=2)
    assert sorted(path.name for path in folder.glob("*.png")) == ["0_64x64.png", "1_64x64.png", "2_64x64.png"]
    assert not list(folder.glob(".*.partial"))


def test_a_size_that_the_base_cannot_take_is_refused(generate, family, monkeypatch):
    monkeypatch.setitem(family.vae_config, "block_out_channels", [8] * 5)
    with pytest.raises(UserError, match="both must be multiples of 16"):
        generate(height=72)
