"""What makes a step faster or smaller must not change what it computes."""

import json
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from models.speed import recompute_cheap
from tests.flow_pipelines import KINDS, build_flow_pipeline

NAMES = ("train_loss", "model_mse_unaccumulated", "ref_mse_unaccumulated", "margin_mean", "avg_lose_l_scale")


def arguments(base, pairs, *more) -> list:
    return ["--pretrained_model_name_or_path", base, "--train_data_dir", pairs, "--resolution", 64, "--mixed_precision",
            "no", "--use_winner_preserving", *more]


def largest_difference(a: list[dict], b: list[dict]) -> float:
    return max(abs(x[name] - y[name]) for x, y in zip(a, b, strict=True) for name in NAMES)


# --- selective checkpointing ----------------------------------------------------------------------------------------------

class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step(base, prepare) -> tuple[torch.Tensor, list[torch.Tensor], Counter]:
    """The prediction, the gradients, and what the backward pass calls."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").train()
    prepare(unet)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, unet.config.cross_attention_dim)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        prediction = unet(*inputs).sample
    with Calls() as calls:
        prediction.float().square().mean().backward()
    return prediction, [parameter.grad for parameter in unet.parameters()], calls.count


def test_costly_operations_run_once_and_no_bit_changes(tiny_sd15):
    prediction, gradients, plain = step(tiny_sd15, lambda unet: None)
    selective_prediction, selective_gradients, selective = step(tiny_sd15, recompute_cheap)
    _, _, full = step(tiny_sd15, lambda unet: unet.enable_gradient_checkpointing())
    assert torch.equal(prediction, selective_prediction)
    assert all(map(torch.equal, gradients, selective_gradients))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert plain["convolution"] == plain["native_group_norm"] == plain[attention] == 0
    assert selective["convolution"] == selective[attention] == 0 < min(full["convolution"], full[attention])
    assert selective["native_group_norm"] > 0 and selective["gelu"] > 0
    unet = UNet2DConditionModel.from_pretrained(tiny_sd15, subfolder="unet")
    transformer_blocks = sum(type(module).__name__ == "GEGLU" for module in unet.modules())
    assert selective["addmm"] == transformer_blocks  # their first feed-forward product, and no other


# --- whole runs -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one_block_sd15(tiny_sd15, tmp_path_factory):
    """The smallest UNet that has every kind of compiled region: compiling takes a CPU seconds a region and shape."""
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                                cross_attention_dim=32, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",),
                                up_block_types=("CrossAttnUpBlock2D",))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, unet=unet, safety_checker=None)
    folder = tmp_path_factory.mktemp("pipelines") / "one_block"
    pipeline.save_pretrained(folder)
    return folder


def test_savings_of_memory_change_no_bit_and_channels_last_agrees(train_run, tiny_sd15, pairs_dir):
    plain = train_run(arguments(tiny_sd15, pairs_dir, "--max_train_steps", 20))
    assert len(plain) == 20 and plain[-1]["train_loss"] != plain[0]["train_loss"]
    saving = train_run(arguments(tiny_sd15, pairs_dir, "--max_train_steps", 20, "--offload_reference", "--gradient_checkpointing"))
    assert largest_difference(plain, saving) == 0.0
    for flag, bound in (("--selective_checkpointing", 0.0), ("--channels_last", 1e-4)):
        assert largest_difference(plain[:3], train_run(arguments(tiny_sd15, pairs_dir, flag))) <= bound


def compile_by(backend, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr("models.policy.check_compiler", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda module, options, **flags: compile_module(module, backend=backend, **flags))


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_transformers_save_memory_without_a_bit_and_compiled_agree(kind, train_run, pairs_dir, built_once, monkeypatch):
    base = built_once(kind, partial(build_flow_pipeline, kind=kind))
    flags = ["--pretrained_model_name_or_path", base, "--train_data_dir", pairs_dir, "--resolution=32", "--mixed_precision=no",
             "--use_winner_preserving", "--max_sequence_length=96", "--lora_rank=4", "--max_train_steps=2", "--learning_rate=1e-3"]
    plain = train_run(flags)
    assert plain[0]["train_loss"] != plain[1]["train_loss"]
    for saving in ("--gradient_checkpointing", "--selective_checkpointing"):
        assert largest_difference(plain, train_run([*flags, saving])) == 0.0
    compile_by("eager", monkeypatch)  # captures and splits; what follows is the UNets' test
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert largest_difference(plain, train_run([*flags, "--compile"])) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[
    pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available() and shutil.which("g++") is None,
                                         reason="needs a GPU or a C++ compiler")])])
def test_compiled_agrees(train_run, one_block_sd15, pairs_dir, monkeypatch, backend):
    """inductor is what --compile uses; aot_eager captures, splits and caches as it does, and runs torch's own kernels."""
    if backend == "aot_eager":
        compile_by(backend, monkeypatch)
    from torch._inductor import config
    monkeypatch.setattr(config.cpp, "vec_isa_ok", False)  # scalar kernels: a third less for g++ to do
    eager = train_run(arguments(one_block_sd15, pairs_dir))
    compiled = train_run(arguments(one_block_sd15, pairs_dir, "--compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert abs(compiled[0]["margin_mean"]) < 1e-3
    assert largest_difference(eager, compiled) < 1e-4


# --- collectives ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_an_optimizer_step_of_two_processes_communicates_gradients_and_one_vector(program, tmp_path):
    """The gradients' all-reduce, in DDP's buckets (two here), and one more for all scalars; nothing while accumulating."""
    from benchmarks.communication import COUNTED
    program("benchmarks.communication", ["--accumulation", 3, "--json", tmp_path / "counted.json"])
    counted = json.loads((tmp_path / "counted.json").read_text())
    ours, official = counted["uncached"], counted["baseline"]
    assert ours["calls"] == {"all_reduce": 2 + 1}
    gradients = 4 * ours["parameters"]
    assert gradients < ours["bytes"]["all_reduce"] < gradients + 200
    assert set(official["calls"]) <= set(COUNTED) and sum(official["calls"].values()) == 2 + 3 * 7
