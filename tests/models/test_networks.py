"""Every kind of unet argument, and what is refused."""

import functools
import json
import os
import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from common.errors import UserError
from common.train_options import ModelOptions
from models.family import open_family
from models.identity import identity
from models.networks import load_network


@functools.cache  # reading a tokenizer takes a moment
def family(base):
    return open_family(ModelOptions(str(base)))


def load_unet(base, source=None):
    return load_network(family(base), source)


@pytest.fixture(params=["sd15", "sdxl"])
def base(request):
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def trained(base) -> UNet2DConditionModel:
    """The base's UNet after some training."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return unet


def same(unet, expected: dict) -> bool:
    state = unet.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state) and all(
        value.dtype == torch.float32 for value in state.values())


def test_state_dicts(base, trained, tmp_path):
    state = trained.state_dict()
    torch.save(state, tmp_path / "unet.pth")
    torch.save(state, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "unet.safetensors")
    (tmp_path / "checkpoint-2000").mkdir()
    torch.save(state, tmp_path / "checkpoint-2000" / "unet.pth")
    for name in ("unet.pth", "legacy.bin", "unet.safetensors", "checkpoint-2000"):
        assert same(load_unet(base, tmp_path / name), state), name
    assert same(load_unet(base, "base"), load_unet(base).state_dict()) and not same(load_unet(base), state)


def test_half_precision_weights_come_out_in_float32(base, trained, tmp_path):
    torch.save({key: value.half() for key, value in trained.state_dict().items()}, tmp_path / "unet.pth")
    assert same(load_unet(base, tmp_path / "unet.pth"), {k: v.half().float() for k, v in trained.state_dict().items()})


def test_folders(base, trained, tmp_path):
    trained.save_pretrained(tmp_path / "bare")
    trained.save_pretrained(tmp_path / "bin", safe_serialization=False)
    trained.save_pretrained(tmp_path / "pipeline" / "unet")
    torch.save({}, tmp_path / "pipeline" / "unet.pth")  # a pipeline's unet/ comes first
    for name in ("bare", "bin", "pipeline"):
        assert same(load_unet(base, tmp_path / name), trained.state_dict()), name


def write_lora(base, folder, sdxl: bool) -> dict:
    """LoRA weights as diffusers saves them; returns the state dict of the merged UNet."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_out.0"]))
    torch.manual_seed(2)
    for name, parameter in unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    pipeline.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)))
    merged = {}
    adapters = dict(unet.named_modules())
    for key, value in UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict().items():
        module = adapters.get(key.removesuffix(".weight"))
        if hasattr(module, "lora_A") and key.endswith(".weight"):
            value = value + module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
        merged[key] = value
    return merged


def test_lora_is_merged_into_the_base(base, tmp_path, request):
    merged = write_lora(base, tmp_path / "lora", sdxl="sdxl" in request.node.name)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    renamed = tmp_path / "named" / "spo_10ep_lora_diffusers.safetensors"
    renamed.parent.mkdir()
    renamed.write_bytes(file.read_bytes())
    from safetensors.torch import load_file
    torch.save(load_file(file), tmp_path / "pytorch_lora_weights.bin")
    for path in (tmp_path / "lora", file, renamed.parent, tmp_path / "pytorch_lora_weights.bin"):
        state = load_unet(base, path).state_dict()
        assert state.keys() == merged.keys()
        assert all(torch.allclose(state[key], merged[key], atol=1e-6) for key in merged), path
    assert any(not torch.equal(merged[key], value) for key, value in load_unet(base).state_dict().items())


def test_a_lora_run_is_its_merged_model_and_its_checkpoint_goes_onto_what_it_began_from(base, tmp_path, request):
    merged = write_lora(base, tmp_path / "checkpoint-1", sdxl="sdxl" in request.node.name)
    began = {key: value + 1 for key, value in load_unet(base).state_dict().items()}
    torch.save(began, tmp_path / "began.pth")
    settings = {"settings": {"unet_init": str(tmp_path / "began.pth")}}
    (tmp_path / "checkpoint-1" / "progress.json").write_text(json.dumps(settings))
    state = load_unet(base, tmp_path / "checkpoint-1").state_dict()
    assert all(torch.allclose(state[key], merged[key] + 1, atol=1e-5) for key in merged)
    torch.save(began, tmp_path / "checkpoint-1" / "unet.pth")
    assert all(torch.equal(value, began[key]) for key, value in load_unet(base, tmp_path / "checkpoint-1").state_dict().items())


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_the_other_base_model_is_refused(tiny_sd15, tiny_sdxl, tmp_path):
    for base, other in ((tiny_sd15, tiny_sdxl), (tiny_sdxl, tiny_sd15)):
        unet = UNet2DConditionModel.from_pretrained(other, subfolder="unet")
        torch.save(unet.state_dict(), tmp_path / "unet.pth")
        with pytest.raises(UserError, match=r"\S+ is \(.*the model has \(.*other base model"):
            load_unet(base, tmp_path / "unet.pth")
        with pytest.raises(UserError, match="does not fit .*other base model"):
            load_unet(base, other)
        write_lora(other, tmp_path / f"lora-{other.name}", sdxl=other == tiny_sdxl)
        with pytest.raises(UserError, match="do not fit (SD1.5|SDXL)"):
            load_unet(base, tmp_path / f"lora-{other.name}")


@pytest.mark.parametrize("write, told", [
    (lambda path: path.write_bytes(pickle.dumps(Evil())), "nothing in it was executed"),
    (lambda path: torch.save({"state": Evil()}, path), "nothing in it was executed"),
    (lambda path: torch.save([1, 2], path), "no plain state dict"),
    (lambda path: torch.save({"optimizer": {"lr": 1}}, path), "no plain state dict"),
    (lambda path: path.write_bytes(b""), "damaged"),
    (lambda path: path.write_bytes(b"PK\x03\x04 cut short"), "damaged"),
    (lambda path: path.write_bytes(b"<html>404</html>"), "damaged|was refused"),
    (lambda path: None, "no weights at"),
])
def test_files_that_are_no_weights_are_refused(write, told, tiny_sd15, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "unet.pth")
    with pytest.raises(UserError, match=told) as error:
        load_unet(tiny_sd15, tmp_path / "unet.pth")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


def test_a_pickle_in_a_folder_is_not_executed(tiny_sd15, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tiny_sd15, subfolder="unet")
    unet.save_pretrained(tmp_path / "bin", safe_serialization=False)
    (tmp_path / "bin" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        load_unet(tiny_sd15, tmp_path / "bin")
    assert not (tmp_path / "executed").exists()


def test_names_that_are_nowhere(tiny_sd15, tmp_path):
    with pytest.raises(UserError, match="no file or folder nobody/nothing here"):
        load_unet(tiny_sd15, "nobody/nothing")
    with pytest.raises(UserError, match="no base model at"):
        load_unet(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot load the unet from"):
        load_unet(tiny_sd15, tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        load_unet(tiny_sd15, tmp_path / "bad.safetensors")


def test_the_commit_of_a_hubs_model_is_told_by_what_is_kept_of_it(monkeypatch):
    kept = {"vae/config.json": "c0ffee/vae/config.json", "tokenizer/tokenizer_config.json": "c0ffee/tokenizer/tokenizer_config.json",
            "config.json": "c0ffee/config.json"}

    def download(name, file, subfolder, revision, cache_dir):
        path = f"{subfolder}/{file}" if subfolder else file
        if path not in kept:
            raise LocalEntryNotFoundError("no network")
        return f"/hub/snapshots/{kept[path]}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert [identity("org/base", part, None, None) for part in ("vae", "tokenizer", None)] == ["hub:c0ffee"] * 3
    with pytest.raises(UserError, match="org/base.* no config of text_encoder, or cannot be reached .no network."):
        identity("org/base", "text_encoder", None, None)
