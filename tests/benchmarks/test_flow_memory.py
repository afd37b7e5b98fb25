"""A LoRA step of the flow-matching families at their published sizes, on tensors without content."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.flow_memory import count_lora_step, make_lora_policy, step_options, storages
from benchmarks.flow_models import PUBLISHED, make_flow_family, make_transformer
from benchmarks.memory import CountOptions
from common.options import parse

PARAMETERS = {"sd3": 2_243_171_520, "flux": 11_901_408_320, "qwen_image": 20_430_401_088, "z_image": 6_154_908_736}
TINY = {  # the same classes, small: what a step does is counted, not how much of it
    "sd3": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "dual_attention_layers": [0]},
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "qwen_image": {"num_layers": 2, "num_attention_heads": 2},
    "z_image": {"n_layers": 2, "n_refiner_layers": 1, "dim": 256, "n_heads": 2, "n_kv_heads": 2}}


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_transformers_have_the_published_sizes(model):
    with torch.device("meta"):
        network = make_transformer(model, make_flow_family(model))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[model]


@pytest.mark.slow
@pytest.mark.parametrize("model", list(PUBLISHED))
def test_a_lora_step_of_the_published_size_runs(model):
    counted = count_lora_step(model, "--resolution 512 --gradient_checkpointing", 1)
    assert counted["base"] * 2**30 == pytest.approx(2 * PARAMETERS[model], rel=0.01), "bf16, but for norms; loaded once"
    assert counted["adapter"] * 2 == counted["moments"] < 0.06 * counted["base"]
    assert 0 < counted["total"] - counted["base"] < 5, "activations of a block, adapter and its moments"


@pytest.fixture
def small(monkeypatch):
    for model, config in TINY.items():
        monkeypatch.setitem(PUBLISHED, model, PUBLISHED[model] | {"config": PUBLISHED[model]["config"] | config})


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_what_saves_memory_is_counted_to_do_so(model, small):
    def count(kind, recompute="--gradient_checkpointing"):
        return count_lora_step(model, f"--resolution 256 --quantize_base {kind} {recompute}", 1)
    plain, kept, int8 = count("none"), count("none", ""), count("int8", "")
    assert plain["activations"] < kept["activations"] and plain["total"] < kept["total"]
    assert plain["base"] > 1.5 * int8["base"]
    assert int8["activations"] > kept["activations"], "the copies of int8 weights that autograd keeps"


def test_the_frozen_base_is_a_byte_or_half_a_weight_and_the_adapter_float32(small):
    for kind, most in (("int8", 1.1), ("nf4", 0.6)):
        options, family = step_options("flux", f"--quantize_base {kind} --resolution 256")
        with FakeTensorMode():
            policy = make_lora_policy("flux", family, options)
            weight = policy.network.transformer_blocks[0].attn.to_q.base_layer.weight
            assert sum(part.numel() * part.element_size() for part in storages([weight])) < most * 256 * 256
            trained = [parameter for parameter in policy.network.parameters() if parameter.requires_grad]
            assert trained and {parameter.dtype for parameter in trained} == {torch.float32}


def test_the_program_names_the_four_families():
    [options], _ = parse([CountOptions], ["--models", *PUBLISHED], program="memory")
    assert options.models == list(PUBLISHED) and options.resolutions == [512, 1024]
