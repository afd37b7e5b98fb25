"""LoRA runs: what their files say of the base, dropout, targets, and the adapter alone as the result."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.train_checks import parse_options
from common.train_options import ModelOptions
from models.family import open_family
from models.lora import COMFYUI_FILE, LORA_FILE, read_metadata
from models.networks import load_network

LORA = ["--mixed_precision=no", "--resolution=64", "--lora_rank=2", "--lora_alpha=6", "--learning_rate=1e-2",
        "--no_merged_result"]


def unet_of(base, source=None):
    return load_network(open_family(ModelOptions(str(base))), source).state_dict()


def moved(base, file, seed):
    """A unet.pth with other weights than the base's."""
    state, draws = unet_of(base), torch.Generator().manual_seed(seed)
    torch.save({name: value + 0.02 * torch.randn(value.shape, generator=draws) for name, value in state.items()}, file)
    return file


@pytest.fixture(scope="module")
def flags(tiny_sd15, pairs_dir):
    return ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, *LORA]


@pytest.fixture(scope="module")
def adapter(flags, train_run, tmp_path_factory):
    """The folder of a finished LoRA run."""
    folder = tmp_path_factory.mktemp("lora") / "fox"
    train_run([*flags, "--max_train_steps=2", "--checkpointing_steps=1", "--output_dir", folder])
    return folder


def test_the_file_says_what_the_adapter_was_trained_on(adapter, tiny_sd15):
    for folder in (adapter, adapter / "checkpoint-1"):
        with safe_open(folder / LORA_FILE, framework="pt") as handle:
            told = handle.metadata()
        assert told["base"] == str(tiny_sd15) and (told["family"], told["rank"], told["alpha"]) == ("sd15", "2", "6")
        assert told["unet_init"] == "" and json.loads(told["run"]) == {"output_dir": "fox", "method": "diffusion-dpo", "seed": 0}
        assert len(json.loads(told["base_weights"])) == 32
        assert json.loads(told["lora_adapter_metadata"])["unet.lora_alpha"] == 6  # as diffusers reads it


def test_the_adapter_alone_is_left(adapter, flags, train_run, tmp_path, capsys):
    names = {path.name for path in adapter.iterdir()}
    assert LORA_FILE in names and not names & {"unet.pth", "unet", "model_index.json", "vae"}
    train_run([*flags[:-1], "--max_train_steps=1", "--output_dir", tmp_path])
    assert {LORA_FILE, "unet.pth", "unet", "model_index.json"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="contradict each other"):
        parse_options([*map(str, flags), "--merge_lora"])


def test_its_own_base_takes_it_without_a_word_in_any_precision(adapter, tiny_sd15, tmp_path, capsys):
    plain = unet_of(tiny_sd15)
    merged = unet_of(tiny_sd15, adapter / LORA_FILE)
    assert any(not torch.equal(merged[name], plain[name]) for name in plain)
    family = open_family(ModelOptions(str(tiny_sd15)))
    for dtype in (torch.float16, torch.bfloat16):
        copy = tmp_path / str(dtype)
        copy.mkdir()
        for file in tiny_sd15.iterdir():
            if file.name != "unet":
                (copy / file.name).symlink_to(file)
        load_network(family).to(dtype).save_pretrained(copy / "unet")
        unet_of(copy, adapter / LORA_FILE)
    assert "warning" not in capsys.readouterr().err


def test_another_base_is_a_warning(adapter, tiny_sd15, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_sd15.iterdir():
        if file.name != "unet":
            (other / file.name).symlink_to(file)
    unet = load_network(open_family(ModelOptions(str(tiny_sd15))), moved(tiny_sd15, tmp_path / "unet.pth", 3))
    unet.save_pretrained(other / "unet")
    unet_of(other, adapter / LORA_FILE)
    assert f"were trained on {tiny_sd15}, and the network here has other weights" in capsys.readouterr().err


@pytest.mark.parametrize("file", [LORA_FILE, COMFYUI_FILE])
def test_another_family_is_refused_by_its_name(adapter, tiny_sdxl, file):
    with pytest.raises(UserError, match="are of a sd15 base, and SDXL is none"):
        unet_of(tiny_sdxl, adapter / file)


@pytest.mark.parametrize("file", [LORA_FILE, COMFYUI_FILE])
def test_one_that_does_not_say_whose_it_is_and_does_not_fit_is_one_line(adapter, tiny_sdxl, tmp_path, caplog, file):
    save_file(load_file(adapter / file), tmp_path / file)
    with pytest.raises(UserError, match="do not fit SDXL .*another base model") as error:
        unet_of(tiny_sdxl, tmp_path / file)
    assert "\n" not in str(error.value) and not caplog.text


def test_comfyui_s_file_is_the_adapter_with_alpha_multiplied_in(adapter, tiny_sd15):
    named = load_file(adapter / COMFYUI_FILE)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"} <= named.keys() and len(named) == len(load_file(adapter / LORA_FILE))
    own = load_file(adapter / LORA_FILE)["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.up.weight"]
    assert torch.equal(named[f"{layer}.lora_up.weight"], 3 * own)
    merged, here = unet_of(tiny_sd15, adapter / COMFYUI_FILE), unet_of(tiny_sd15, adapter / LORA_FILE)
    assert all(torch.allclose(merged[name], here[name], atol=1e-6) for name in here)


def test_it_goes_onto_the_weights_that_it_began_from(flags, train_run, tiny_sd15, tmp_path, capsys):
    init = moved(tiny_sd15, tmp_path / "began.pth", 4)
    train_run([*flags, "--unet_init", init, "--max_train_steps=1", "--output_dir", tmp_path / "run"])
    capsys.readouterr()
    found = unet_of(tiny_sd15, tmp_path / "run" / LORA_FILE)
    frozen = "conv_in.weight"
    assert torch.equal(found[frozen], torch.load(init, weights_only=True)[frozen]) and "warning" not in capsys.readouterr().err
    init.unlink()
    found = unet_of(tiny_sd15, tmp_path / "run" / LORA_FILE)
    assert torch.equal(found[frozen], unet_of(tiny_sd15)[frozen])
    assert f"trained on {tiny_sd15} with the weights {init}" in capsys.readouterr().err


def test_training_on_top_of_another_bases_adapter_warns(adapter, flags, train_run, tiny_sd15, tmp_path, capsys):
    """--unet_init names the adapter; its file is made to say that it is another base's."""
    told = read_metadata(adapter / LORA_FILE)
    weights = {name: value + 1 for name, value in json.loads(told["base_weights"]).items()}
    save_file(load_file(adapter / LORA_FILE), tmp_path / "other.safetensors",
              metadata=told | {"base_weights": json.dumps(weights)})
    train_run([*flags, "--unet_init", tmp_path / "other.safetensors", "--max_train_steps=1"])
    assert "the network here has other weights" in capsys.readouterr().err


@pytest.mark.parametrize("change, said", [
    ({"base_weights": "no JSON"}, "metadata is damaged"), ({"base_weights": "[" * 5000}, "metadata is damaged"),
    ({"base_weights": "[1]"}, "metadata is damaged"), ({"base_weights": '{"no.such.weight": 1.0}'}, "other weights"),
    ({"base_weights": '{"conv_in.weight": "x"}'}, "other weights"),
])
def test_damaged_facts_are_a_warning(adapter, tiny_sd15, tmp_path, capsys, change, said):
    told = read_metadata(adapter / LORA_FILE) | change
    save_file(load_file(adapter / LORA_FILE), tmp_path / "a.safetensors", metadata=told)
    unet_of(tiny_sd15, tmp_path / "a.safetensors")
    assert said in capsys.readouterr().err


def test_an_adapter_that_names_itself_is_refused(adapter, tiny_sd15, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(load_file(adapter / LORA_FILE), file, metadata=read_metadata(adapter / LORA_FILE) | {"unet_init": str(file)})
    with pytest.raises(UserError, match="names itself"):
        unet_of(tiny_sd15, file)


def test_dropout_leaves_the_first_step_exact_and_changes_the_second(flags, train_run):
    def losses(*more):
        return [line["train_loss"] for line in train_run([*flags, "--max_train_steps=3", *more])]

    with_it, without = losses("--lora_dropout=0.5"), losses()
    assert with_it[0] == without[0] == torch.tensor(math.log(2.0)).item() and with_it[2] != without[2]
    assert losses("--lora_dropout=0.5") == with_it


def test_dropout_does_not_go_with_spo():
    with pytest.raises(UserError, match="does not go with spo"):
        parse_options(["--pretrained_model_name_or_path=x", "--train_method=spo", "--lora_rank=2", "--lora_dropout=0.1"])


@pytest.mark.parametrize("targets", [["attn2.to_q", "ff.net.2"], ["conv1", "to_v"]])
def test_targets_are_the_layers_that_get_it(flags, train_run, tiny_sd15, tmp_path, targets, capsys):
    train_run([*flags, "--max_train_steps=2", "--output_dir", tmp_path, "--lora_targets", *targets])
    layers = {name.removeprefix("unet.").partition(".lora")[0] for name in load_file(tmp_path / LORA_FILE)}
    named = {name.removesuffix(".weight") for name in unet_of(tiny_sd15) if name.endswith(".weight")}
    assert layers == {name for name in named if name.endswith(tuple(f".{target}" for target in targets))}
    merged, plain = unet_of(tiny_sd15, tmp_path), unet_of(tiny_sd15)
    assert {name.removesuffix(".weight") for name in plain if not torch.equal(plain[name], merged[name])} == layers
    assert "warning" not in capsys.readouterr().err


def test_targets_that_no_layer_has_are_refused(flags, train_run):
    with pytest.raises(UserError, match="--lora_targets nonsense does not fit SD1.5 .*name layers as to_q"):
        train_run([*flags, "--lora_targets", "nonsense"])


def test_without_lora_its_options_are_warned_of(tiny_sd15, pairs_dir, train_run, capsys):
    train_run(["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, "--mixed_precision=no",
               "--resolution=64", "--max_train_steps=1", "--lora_dropout=0.5", "--lora_alpha=4"])
    told = capsys.readouterr().err
    assert "--lora_dropout does nothing here" in told and "--lora_alpha does nothing here" in told


def test_validation_prompts_may_be_a_file(flags, train_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("# two\na red circle\na blue square\n")
    train_run([*flags, "--max_train_steps=1", "--validation_prompts", tmp_path / "prompts.txt",
               "--validation_inference_steps=1", "--output_dir", tmp_path / "run"])
    drawn = tmp_path / "run" / "validation" / "step-1"
    assert [(drawn / f"{number}.txt").read_text() for number in range(2)] == ["a red circle", "a blue square"]
