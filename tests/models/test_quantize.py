"""LoRA on a quantised base: exact reference, resume, an adapter that diffusers opens; what is refused."""

import math
from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from common.errors import UserError
from common.train_checks import parse_options
from common.train_options import MemoryOptions, ModelOptions
from models.devices import start_accelerator
from models.family import open_family
from models.lora import LORA_FILE, check_base
from models.networks import load_network
from models.policy import load_policy
from models.quantize import check_quantization, quantization_config
from tests.flow_pipelines import KINDS, build_flow_pipeline
from tests.runs import continue_from
from tests.stub_family import stub_family

CPU = torch.device("cpu")
INT8 = ["--quantize_base=int8", "--gradient_checkpointing", "--lora_rank=4", "--lora_alpha=6", "--no_merged_result"]


@pytest.fixture(scope="module")
def bases(tiny_sd15, built_once):
    return {"sd15": tiny_sd15} | {kind: built_once(kind, partial(build_flow_pipeline, kind=kind)) for kind in KINDS}


def flags(base, pairs, *more):
    side = ["--resolution=64"] if base.name == "sd15" else ["--resolution=32", "--max_sequence_length=96"]
    return ["--pretrained_model_name_or_path", base, "--train_data_dir", pairs, *side, *INT8, *more]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["sd15", *KINDS])
def test_the_margin_is_0_at_first_and_the_adapter_opens_in_diffusers(kind, precision, bases, pairs_dir, train_run, tmp_path):
    logs = train_run(flags(bases[kind], pairs_dir, "--mixed_precision", precision, "--max_train_steps=2", "--learning_rate=1e-2",
                           "--output_dir", tmp_path / "run"))
    assert logs[0]["margin_mean"] == logs[0]["margin_std"] == 0
    assert logs[0]["train_loss"] == torch.tensor(math.log(2.0)).item() and logs[0]["grad_norm"] > 0
    assert logs[1]["margin_std"] > 0, "it learns"
    pipeline = DiffusionPipeline.from_pretrained(bases[kind])
    pipeline.load_lora_weights(tmp_path / "run")
    network = getattr(pipeline, "unet" if kind == "sd15" else "transformer")
    adapter = network.peft_config["default_0"]
    assert (adapter.r, adapter.lora_alpha) == (4, 6)
    held = {name: value for name, value in network.named_parameters() if ".lora_" in name}
    assert len(held) == len(load_file(tmp_path / "run" / LORA_FILE)) and any(value.abs().max() > 0 for value in held.values())


def test_the_frozen_weights_are_bytes_and_the_reference_is_them(bases):
    family = open_family(ModelOptions(str(bases["sd3"]), lora_rank=2, lora_alpha=2.0))
    policy = load_policy(family, MemoryOptions(quantize_base="int8"), torch.bfloat16, CPU, needs_reference=True)
    layer = policy.network.transformer_blocks[0].attn.to_q
    assert policy.reference is None and layer.base_layer.weight.qdata.dtype == torch.int8
    assert layer.lora_A["default"].weight.dtype == torch.float32 and not layer.base_layer.weight.requires_grad
    assert policy.network.transformer_blocks[0].attn.norm_q.weight.dtype == torch.float32
    own = load_network(family).transformer_blocks[0].attn.to_q.weight
    scale = own.abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.base_layer.weight.dequantize().float() - own).abs() <= 1.1 * scale).all()


def test_two_processes_are_one_and_a_resumed_run_is_the_unbroken_one(bases, pairs_dir, train_run, train, tmp_path, capsys):
    words = flags(bases["sd3"], pairs_dir, "--mixed_precision=no", "--max_train_steps=2", "--checkpointing_steps=1", "--seed=0",
                  "--beta_dpo=100", "--report_to=none", "--lr_warmup_steps=0", "--learning_rate=1e-3")
    one = train_run([*words, "--train_batch_size=2", "--output_dir", tmp_path / "one"])
    continue_from(tmp_path / "one", tmp_path / "resumed", "checkpoint-2", "pytorch_lora_weights.safetensors")
    [last] = train_run([*words, "--train_batch_size=2", "--output_dir", tmp_path / "resumed"])
    assert last["train_loss"] == one[1]["train_loss"]
    ends = [load_file(tmp_path / name / LORA_FILE) for name in ("one", "resumed")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    train([*words, "--train_batch_size=1", "--output_dir", tmp_path / "two"], 2)
    both = load_file(tmp_path / "two" / LORA_FILE)
    assert all((both[key] - ends[0][key]).abs().max() < 1e-4 for key in both)

    family = open_family(ModelOptions(str(bases["sd3"])))
    check_base(family, load_network(family), tmp_path / "one" / LORA_FILE)
    assert "other weights" not in capsys.readouterr().err, "the base that is not quantised is its own"


# --- what is refused -----------------------------------------------------------------------------------------------------

def parsed(*words):
    return parse_options(["--pretrained_model_name_or_path=base", "--train_data_dir=pairs", *words])


def test_what_it_needs_is_said_before_anything_is_loaded(monkeypatch, capsys):
    family = stub_family("sd3")
    with pytest.raises(UserError, match="--quantize_base int8 freezes the base: train LoRA on it with --lora_rank"):
        check_quantization(parsed("--quantize_base=int8", "--lora_rank=0"), family)
    check_quantization(parsed("--quantize_base=int8", "--lora_rank=4"), family)
    assert "without --gradient_checkpointing keeps a fp16 copy of every layer's weights" in capsys.readouterr().err
    monkeypatch.setattr("models.quantize.find_spec", lambda name: None)
    for kind, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        with pytest.raises(UserError, match=f"the package {package} is not installed: pip install {package}"):
            check_quantization(parsed(f"--quantize_base={kind}", "--lora_rank=4"), family)
    monkeypatch.setattr("models.quantize.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--quantize_base nf4 needs a GPU: on the CPU take int8"):
        check_quantization(parsed("--quantize_base=nf4", "--lora_rank=4"), family)


def test_a_backend_that_diffusers_does_not_take(monkeypatch):
    def too_old(*_):
        raise ValueError("TorchAoConfig requires torchao >= 0.15.0")
    monkeypatch.setattr("diffusers.TorchAoConfig", too_old)
    with pytest.raises(UserError, match=r"cannot be used here \(TorchAoConfig requires .*\): pip install -U torchao"):
        quantization_config("int8", torch.bfloat16)


def test_a_state_dict_is_not_quantised_and_nothing_is_sharded(bases, tmp_path, fresh_accelerate, monkeypatch):
    family = open_family(ModelOptions(str(bases["sd3"]), lora_rank=2))
    torch.save(load_network(family).state_dict(), tmp_path / "transformer.pth")
    with pytest.raises(UserError, match="takes a base or a diffusers folder, and .*transformer.pth holds a state dict or LoRA"):
        load_network(family, tmp_path / "transformer.pth", quantization=quantization_config("int8", torch.bfloat16))
    monkeypatch.setattr("models.devices.sharded", lambda accelerator: True)
    with pytest.raises(UserError, match="--quantize_base int8 is for one GPU or one copy a GPU"):
        start_accelerator(parsed("--quantize_base=int8", "--lora_rank=4", "--mixed_precision=no", "--report_to=none"))
