"""A single checkpoint file as a base: told by its keys, turned into a folder once, refused in one line."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.numpy import save_file

from common.errors import UserError
from common.files import fingerprint
from common.train_options import ModelOptions
from eval.generation import settings_record, settle_defaults
from eval.options import GenerateOptions
from models.family import open_family
from models.sampling import SamplingSettings
from models.single_file import SD15_KEY, SDXL_KEY, as_folder, pipeline_class


def checkpoint(path, *keys):
    save_file({key: np.zeros(1, np.float32) for key in keys}, path)
    return path


def test_its_keys_say_what_it_is(tmp_path):
    assert pipeline_class(checkpoint(tmp_path / "a.safetensors", SD15_KEY)) is StableDiffusionPipeline
    assert pipeline_class(checkpoint(tmp_path / "b.safetensors", SDXL_KEY, "x")) is StableDiffusionXLPipeline


def test_it_becomes_a_folder_once(tmp_path, tiny_sd15, monkeypatch):
    opened = []

    def from_single_file(path, **parts):
        opened.append(path)
        return StableDiffusionPipeline.from_pretrained(tiny_sd15)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)
    path = checkpoint(tmp_path / "dreamy-turbo.safetensors", SD15_KEY)
    options = ModelOptions(str(path), cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        family = open_family(options)
    assert opened == [str(path)]
    assert family.name == "sd15" and family.turbo, "the file's name counts"
    assert options.pretrained_model_name_or_path == str(path), "the run is still named after the file"

    made = GenerateOptions("base", pretrained_model_name_or_path=str(path), pretrained_vae_model_name_or_path="base", prompts=["x"])
    settle_defaults(made, family, torch.device("cpu"))
    record = settings_record(made, family, SamplingSettings(64, 64, 3, 7.5, "official", "euler", torch.float32), torch.device("cpu"))
    assert record["pretrained_model_name_or_path"] == str(path) and record["base_identity"] == f"sha256:{fingerprint(path)}"


def test_of_several_processes_one_makes_the_folder(tmp_path, tiny_sd15, monkeypatch):
    opened = []

    def from_single_file(path, **parts):
        opened.append(path)
        time.sleep(0.3)
        return StableDiffusionPipeline.from_pretrained(tiny_sd15)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)
    path = checkpoint(tmp_path / "dreamy.safetensors", SD15_KEY)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: as_folder(path, tmp_path / "cache"), range(2))
    assert first == second and len(opened) == 1 and (first / "model_index.json").is_file()


@pytest.mark.slow
def test_lora_on_it_is_merged_as_on_a_folder(tmp_path, tiny_sd15, pairs_dir, train_run, monkeypatch, capsys):
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file",
                        lambda path, **parts: StableDiffusionPipeline.from_pretrained(tiny_sd15))
    path = checkpoint(tmp_path / "dreamy.safetensors", SD15_KEY)
    train_run(["--pretrained_model_name_or_path", path, "--cache_dir", tmp_path / "cache", "--train_data_dir", pairs_dir,
               "--resolution", 64, "--mixed_precision", "no", "--lora_rank", 2, "--output_dir", tmp_path / "out"])
    assert (tmp_path / "out" / "unet.pth").is_file() and (tmp_path / "out" / "model_index.json").is_file()
    assert f"test_sd15.sh {tmp_path / 'out' / 'unet.pth'}" in capsys.readouterr().out


@pytest.mark.parametrize("keys, words", [(["unet.conv_in.weight"], ["no checkpoint file", "--unet_init"]),
                                         ([SD15_KEY], ["cannot be opened", "configs come from the hub"])])
def test_what_cannot_be_opened_is_one_line(tmp_path, keys, words):
    path = checkpoint(tmp_path / "x.safetensors", *keys)
    with pytest.raises(UserError) as error:
        open_family(ModelOptions(str(path), cache_dir=str(tmp_path / "cache")))
    assert all(word in str(error.value) for word in words)
    assert not list((tmp_path / "cache").rglob("model_index.json"))


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="damaged or no .safetensors file"):
        open_family(ModelOptions(str(tmp_path / "x.safetensors")))
