"""What makes a step faster or smaller must not change what it computes, and a micro-step must not wait for the device."""

import json
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losses import preference_loss
from tests.pretended_gpu import GPU, move, pretended_gpu
from common.train_options import parse_arguments
from data.pairs import PairDataset, choose_pairs, load_table, make_loader
from models.stable_diffusion import noisy_batch, predict, predict_reference
from common.errors import UserError
from training.records import StepScalars
from models.policy import (keep_on_host, load_frozen_encoders, load_policy_and_reference, load_tokenizers_and_scheduler,
                             on_device)
from training.optimizers import adamw_8bit

NAMES = ("train_loss", "model_mse_unaccumulated", "ref_mse_unaccumulated", "margin_mean", "avg_lose_l_scale")


def arguments(base, pairs, *more) -> list:
    return ["--pretrained_model_name_or_path", base, "--train_data_dir", pairs, "--resolution", 64, "--mixed_precision",
            "no", "--report_to", "none", "--use_winner_preserving", *more]


def largest_difference(a: list[dict], b: list[dict]) -> float:
    return max(abs(x[name] - y[name]) for x, y in zip(a, b, strict=True) for name in NAMES)


@pytest.fixture(scope="module")
def one_block_sd15(tiny_sd15, tmp_path_factory):
    """The smallest UNet that has every kind of compiled region: compiling takes a CPU seconds a region and shape."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                                cross_attention_dim=32, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",),
                                up_block_types=("CrossAttnUpBlock2D",))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, unet=unet, safety_checker=None)
    folder = tmp_path_factory.mktemp("pipelines") / "one_block"
    pipeline.save_pretrained(folder)
    return folder


# --- equality over 20 steps ----------------------------------------------------------------------------------------

def test_savings_of_memory_change_no_bit_and_channels_last_agrees(train_run, tiny_sd15, pairs_dir):
    plain = train_run(arguments(tiny_sd15, pairs_dir))
    assert len(plain) == 20 and plain[-1]["train_loss"] != plain[0]["train_loss"]
    offloaded = train_run(arguments(tiny_sd15, pairs_dir, "--offload_reference", "--gradient_checkpointing"))
    assert largest_difference(plain, offloaded) == 0.0
    assert largest_difference(plain, train_run(arguments(tiny_sd15, pairs_dir, "--selective_checkpointing"))) == 0.0
    assert largest_difference(plain, train_run(arguments(tiny_sd15, pairs_dir, "--channels_last"))) < 1e-4


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[
    pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available() and shutil.which("g++") is None,
                                         reason="needs a GPU or a C++ compiler")])])
def test_compiled_agrees(train_run, one_block_sd15, pairs_dir, monkeypatch, backend):
    """inductor is what --compile uses; aot_eager captures, splits and caches as it does, and runs torch's own kernels."""
    if backend == "aot_eager":
        compile_module = torch.nn.Module.compile
        monkeypatch.setattr("models.policy.check_compiler", lambda device: None)
        monkeypatch.setattr(torch.nn.Module, "compile",
                            lambda module, options, **flags: compile_module(module, backend=backend, **flags))
    eager = train_run(arguments(one_block_sd15, pairs_dir))
    compiled = train_run(arguments(one_block_sd15, pairs_dir, "--compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert abs(compiled[0]["margin_mean"]) < 1e-3
    assert largest_difference(eager, compiled) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_reference_comes_and_goes_and_is_never_written_back():
    module = torch.nn.Linear(3, 3).requires_grad_(False)
    keep_on_host(module, torch.device("cuda"))
    home = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    with on_device(module, torch.device("cuda", 0)) as moved:
        assert all(parameter.is_cuda for parameter in moved.parameters())
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == home
    assert all(parameter.is_pinned() for parameter in module.parameters())


def test_8bit_adam_is_asked_of_two_libraries_and_missed_in_one_line(monkeypatch):
    asked = []

    def missing(name):
        asked.append(name)
        raise ImportError(name)

    monkeypatch.setattr("training.optimizers.importlib.import_module", missing)
    with pytest.raises(UserError, match="needs bitsandbytes or torchao"):
        adamw_8bit()
    assert asked == ["bitsandbytes.optim", "torchao.optim"]


@pytest.mark.parametrize("words, said", [(["--use_8bit_adam", "--use_adafactor"], "contradict each other"),
                                         (["--use_8bit_adam", "--optimizer", "sgd"], "contradict each other")])
def test_options_that_exclude_each_other_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        parse_arguments([str(word) for word in arguments("base", "pairs", *words)])


# --- host synchronisation ------------------------------------------------------------------------------------------

WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_unique2",
           "bincount", "repeat_interleave.Tensor")


class Waits(TorchDispatchMode):
    """Operations whose result the host must wait for: values read from tensors, and results whose size depends on them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        mask = name.startswith(("index.", "index_put")) and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1] or ())
        if name in WAITING or name.split(".")[0] in WAITING or mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def set_up(base, pairs, device, *more):
    """What train.py's inner loop knows: arguments, models and a batch on the device."""
    args = parse_arguments([str(word) for word in arguments(base, pairs, "--train_batch_size", 2, "--seed", 0, *more)])
    models = load_tokenizers_and_scheduler(args)
    load_frozen_encoders(models, args, torch.float32, device)
    load_policy_and_reference(models, args, torch.float32, device)
    dataset = PairDataset(choose_pairs(load_table(args), args, 0), models.tokenizers, args, 0, models.latent_shape)
    [batch] = make_loader(dataset, args, 0, 1, 0, 1, pin_memory=False)
    return args, models, {name: tensor.to(device) for name, tensor in batch.items()}


def forward(args, models, batch, scalars: StepScalars) -> torch.Tensor:
    """What train.py's inner loop does, up to the loss."""
    inputs = noisy_batch(batch, models, args)
    ref_pred = predict_reference(models, models.policy, inputs)
    result = preference_loss(predict(models.policy, inputs), ref_pred, inputs.target, args.loss_config())
    scalars.add(result.logs)
    return result.loss


SETTINGS = [("tiny_sd15", []), ("tiny_sdxl", ["--sdxl"]), ("tiny_sd15", ["--lora_rank", 2]),
            ("tiny_sd15", ["--noise_offset", 0.1, "--input_perturbation", 0.1, "--train_method", "dmpo"]),
            ("tiny_sd15", ["--train_method", "dspo", "--winner_preserving_granularity", "sample",
                           "--gradient_checkpointing"])]


@pytest.mark.parametrize("kind, more", SETTINGS)
def test_a_micro_step_reads_nothing_back(kind, more, request, pairs_dir):
    known, scalars = set_up(request.getfixturevalue(kind), pairs_dir, torch.device("cpu"), *more), StepScalars()
    forward(*known, scalars).backward()
    with Waits() as waits:
        forward(*known, scalars).backward()
    assert waits.found == []


def test_the_count_sees_what_it_should():
    value = torch.arange(4.0)
    with Waits() as waits:
        float(value.sum()), value[value > 1], value.nonzero(), bool(value[0])
    assert len(waits.found) == 4


@pytest.mark.parametrize("kind, more", SETTINGS)
def test_on_a_gpu_nothing_stays_behind_and_no_copy_is_waited_for(kind, more, request, pairs_dir):
    """Reads, which raise on a pretended GPU, and copies to and from the device, which a CPU cannot show."""
    args, models, batch = set_up(request.getfixturevalue(kind), pairs_dir, torch.device("cpu"), *more)
    scalars = StepScalars()
    with pretended_gpu() as blocking_copies:
        for module in (models.vae, *models.text_encoders, models.policy, models.reference):
            move(module)
        batch = {name: move(tensor) for name, tensor in batch.items()}
        forward(args, models, batch, scalars)  # the scheduler's table goes to the device once
        blocking_copies.clear()
        loss = forward(args, models, batch, scalars)
        assert loss.device == GPU and all(value.device == GPU for value in scalars.sums.values())
        assert blocking_copies == []


def test_the_pretended_gpu_sees_what_it_should():
    with pretended_gpu() as blocking_copies:
        there, here = torch.zeros(3, device=GPU), torch.zeros(3)
        for forbidden in (lambda: there + here, lambda: there.sum().item(), lambda: there[0] > 0 and None,
                          lambda: there.nonzero()):
            with pytest.raises(Exception, match="device|item|_local_scalar_dense|nonzero|data-dependent|is_nonzero"):
                forbidden()
        here.to(GPU, non_blocking=True)
        assert blocking_copies == []
        here.to(GPU), there.cpu(), there.copy_(here), torch.tensor([1.0], device=GPU)
        assert len(blocking_copies) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind, more", SETTINGS)
def test_a_micro_step_never_waits_for_the_gpu(kind, more, request, pairs_dir):
    known, scalars = set_up(request.getfixturevalue(kind), pairs_dir, torch.device("cuda"), *more), StepScalars()
    forward(*known, scalars).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(*known, scalars).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
