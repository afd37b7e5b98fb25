"""The benchmarks run at tiny size, and print what their docs promise."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import communication, generation, memory, objectives, safeguard, train_step
from benchmarks.communication import CommunicationOptions, model_times
from benchmarks.step_memory import LiveBytes, Setting, as_on_a_gpu, count_step, recomputed_share
from benchmarks.models import make_family, make_unet
from benchmarks.step import unet_forward_flops
from common.errors import UserError
from models.speed import recompute_cheap


@pytest.mark.parametrize("name, parameters", [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_unets_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make_unet(name).parameters()) == parameters


def test_encoders_have_the_published_sizes():
    family = make_family("sdxl")
    family.load_encoders(torch.float32, torch.device("meta"))
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (family.vae, *family.text_encoders)]
    assert sizes == [83_653_863, 123_060_480, 694_659_840]


@pytest.mark.slow
def test_the_one_command_prints_the_step_s_table_and_the_ratio(tmp_path, run):
    run(["bash", "scripts/benchmark.sh", "tiny"], timeout=500, OUTPUT=str(tmp_path))
    tables = (tmp_path / "tables.md").read_text()
    assert "python -m benchmarks.safeguard --models tiny --micro_step_ms" in tables and "| batches of 2 |" in tables
    for row in ("| data |", "| vae |", "| text |", "| reference |", "| policy |", "| backward |", "| optimizer |", "| logging |",
                "| pairs/s |", "| UNets' share of the matrix rate |", "| pairs/s against baseline | 1.00x |"):
        assert row in tables
    figures = {result["variant"]: result for result in json.loads((tmp_path / "tiny.json").read_text())}
    assert set(figures) == {"baseline", "uncached", "cached", "compact"}
    for part in ("vae", "text"):
        assert figures["cached"]["milliseconds"].get(part, 0) == 0 < figures["baseline"]["milliseconds"][part]
    assert all(figure["pairs_per_second"] > 0 for figure in figures.values())


def test_the_tests_that_the_one_command_runs_on_a_gpu_are_there():
    named = re.findall(r"tests/\S+\.py", Path("scripts/benchmark.sh").read_text())
    assert len(named) == 4 and all(Path(name).is_file() for name in named)


def test_a_wrong_choice_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_step", "--model", "sd3"])
    with pytest.raises(UserError, match="argument --model: invalid choice: .sd3. .*tiny.*sd15.*sdxl"):
        train_step.main()


def test_mapo_needs_no_reference(monkeypatch, capsys, fresh_accelerate):
    monkeypatch.setattr("sys.argv", ["objectives", "--batch", "1", "--repeats", "1"])
    objectives.main()
    dpo, mapo = [line.split("|") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert dpo[1].strip() == "diffusion-dpo" and mapo[1].strip() == "mapo" and dpo[3].strip() == dpo[5].strip() == "1.00"
    with torch.device("meta"):
        reference = sum(4 * parameter.numel() for parameter in make_unet("tiny").parameters()) / 2**20
    assert float(dpo[4]) - float(mapo[4]) > 0.99 * reference


def test_live_bytes_counts_storages_while_they_live():
    outside = torch.ones(1000)
    with LiveBytes([outside]) as counter:
        outside.add_(1)
        outside.view(10, 100)
        a = torch.ones(256)
        b = a.view(16, 16)
        assert counter.live == 1024
        c = a + 1
        del a, b
        assert counter.live == 1024 and counter.peak == 2048
        del c
    assert counter.live == 0


@pytest.mark.slow
def test_checkpointing_lora_and_offloading_take_less_memory():
    plain_setting = Setting("tiny")
    plain, twice = count_step(plain_setting, 1), count_step(plain_setting, 2)
    assert twice["activations"] == pytest.approx(2 * plain["activations"], rel=0.3)
    less = [Setting("tiny", flags) for flags in ("--gradient_checkpointing", "--selective_checkpointing", "--use_8bit_adam",
                                                 "--lora_rank 16", "--offload_reference")]
    assert all(count_step(setting, 1)["total"] < plain["total"] for setting in less)
    assert 0 == recomputed_share(plain_setting) < recomputed_share(less[1]) < recomputed_share(less[0]) < 1
    official = count_step(Setting("tiny", official=True), 1)
    assert official["total"] > plain["total"] + official["encoders"] > plain["total"]


def test_what_is_counted_is_what_train_py_runs():
    optimizers = {(model, flags): Setting(model, flags).options().optimizer.optimizer
                  for model in ("sd15", "sdxl") for flags in ("", "--lora_rank 16", "--use_8bit_adam")}
    assert optimizers == {("sd15", ""): "adamw", ("sd15", "--lora_rank 16"): "adamw", ("sd15", "--use_8bit_adam"): "adamw8bit",
                          ("sdxl", ""): "adafactor", ("sdxl", "--lora_rank 16"): "adamw", ("sdxl", "--use_8bit_adam"): "adamw8bit"}


def test_flops_of_the_unets_are_of_the_known_order():
    assert 0.6e12 < unet_forward_flops("sd15", 1, 512) < 0.9e12  # about 0.8 TFLOP an image
    assert 5e12 < unet_forward_flops("sdxl", 1, 1024) < 7e12  # about 6


def test_more_gpus_are_faster_and_never_more_than_linear():
    lines = model_times(CommunicationOptions(micro_step_ms=800), 860_000_000)[2:]
    rates = [float(line.split("|")[4]) for line in lines]
    efficiencies = [float(line.split("|")[5].strip(" %")) for line in lines]
    assert rates == sorted(rates) and max(efficiencies) <= 100.0 and efficiencies == sorted(efficiencies, reverse=True)


@pytest.mark.parametrize("program, words, said", [
    (train_step, ["--steps", "0"], "--steps must be a finite number of at least 1, not 0"),
    (train_step, ["--json", "."], "--json: . is a folder"),
    (train_step, ["--variants", "fast"], "invalid choice: .fast."),
    (train_step, ["--train_flags=--channels_last"], r"cannot change what is compared \(channels_last\)"),
    (train_step, ["--train_flags=--train_method=dmpo"], r"cannot change what is compared \(train_method\)"),
    (communication, ["--model", "nope"], "argument --model: invalid choice"),
    (communication, ["--effective_batch", "100"], "no multiple of the 8 pairs"),
    (safeguard, ["--models", "foo"], "argument --models: invalid choice"),
    (safeguard, ["--repeats", "0"], "--repeats must be a finite number of at least 1, not 0"),
    (objectives, ["--methods", "sft"], "argument --methods: invalid choice"),
    (generation, ["--images", "0"], "--images must be a finite number of at least 1"),
    (memory, ["--batches", "1", "0"], "--batches must be a finite number of at least 1, not 0")])
def test_wrong_options_are_refused_before_anything_is_measured(monkeypatch, program, words, said):
    monkeypatch.setattr("sys.argv", ["benchmark", *words])
    with pytest.raises(UserError, match=said):
        program.main()


def test_a_batch_that_so_many_gpus_cannot_share_has_no_row():
    lines = model_times(CommunicationOptions(micro_step_ms=800, effective_batch=1024), 860_000_000)[2:]
    assert [int(line.split("|")[1]) for line in lines] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert all(float(line.split("|")[8].strip(" %")) <= 100.0 for line in lines)


@pytest.mark.slow
def test_the_count_of_memory_is_torch_s_own():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    setting = Setting("tiny", "--selective_checkpointing")
    counted = count_step(setting, 2)
    with FakeTensorMode():
        policy = make_unet("tiny").train()
        recompute_cheap(policy)
        for parameter in policy.parameters():
            parameter.grad = torch.empty_like(parameter)
        inputs = torch.empty(4, 4, 16, 16), torch.empty(4, dtype=torch.long), torch.empty(4, 77, 32)
        tracker = MemTracker()
        tracker.track_external(policy, *inputs)
        with tracker, as_on_a_gpu():
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                prediction = policy(*inputs, return_dict=False)[0]
            prediction.float().square().mean().backward()
        [peak] = tracker.get_tracker_snapshot("peak").values()
    ours = counted["total"] - counted["reference"] - counted["moments"]
    assert ours * 2**30 == pytest.approx(peak["Total"], rel=0.01)
