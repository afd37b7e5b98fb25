"""--dry_run: what it prints, and that nothing stays."""

import re
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from common.train_options import ModelOptions
from training import dry_run


@pytest.fixture
def base(tiny_sd15, pairs_dir, tmp_path):
    return ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, "--resolution", 64, "--mixed_precision",
            "no", "--output_dir", tmp_path / "new" / "out", "--dry_run", "--report_to", "tensorboard"]


def line(told: str, name: str) -> str:
    return next(line for line in told.splitlines() if line.startswith(f"  {name} "))


def test_memory_time_and_disk_of_the_whole_run_and_nothing_left(base, tmp_path, train_run, capsys, tiny_sd15):
    train_run([*base, "--max_train_steps", 1000, "--train_batch_size", 2, "--gradient_accumulation_steps", 8,
               "--checkpointing_steps", 300])
    told = capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "not even the folders above"
    assert "16 pairs per step = 1 device(s) x 2 x 8" in line(told, "batch") and "nothing is written" in line(told, "output")
    per_step, pairs = map(float, re.search(r"([\d.]+) s per step, ([\d.]+) pairs/s", line(told, "time")).groups())
    assert pairs == pytest.approx(16 / per_step, rel=0.02) and "2 of its 8 micro-steps" in line(told, "time")
    assert "1000 steps in" in line(told, "whole run")
    size = 3 * (tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size / 2**20  # weights and two moments
    count, one = re.search(r"(\d+) checkpoints of ([\d.e-]+) MiB", line(told, "disk")).groups()
    assert count == "4" and float(one) == pytest.approx(size, rel=0.05)
    result = float(re.search(r"the result ([\d.e-]+) MiB and the base's other parts", told).group(1))
    assert result == pytest.approx(size * 2 / 3, rel=0.05), "unet.pth, and the pipeline's"
    assert "--train_batch_size 1 --gradient_accumulation_steps 16" in line(told, "less memory")
    assert "--gradient_checkpointing" in told and "--use_8bit_adam" in told and "--checkpoints_total_limit" in told


def test_a_folder_that_is_there_stays_as_it_is(base, tmp_path, train_run):
    (tmp_path / "new" / "out").mkdir(parents=True)
    (tmp_path / "new" / "out" / "metrics.jsonl").write_text("mine")
    train_run([*base, "--choice_model", "oracle"])
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "new", "new/out", "new/out/metrics.jsonl"]
    assert (tmp_path / "new" / "out" / "metrics.jsonl").read_text() == "mine"


def test_it_exits_with_0_on_two_processes(base, tmp_path, train):
    told = train([*base, "--max_train_steps", 50, "--lr_warmup_steps", 0, "--seed", 0, "--train_batch_size", 2], processes=2)
    assert told.count("Dry run\n") == 1 and "2 device(s)" in told and not list(tmp_path.iterdir())


def test_memory_that_does_not_suffice_is_one_line_with_what_would_help(base, tmp_path, train_run, monkeypatch):
    def full(task, run, watch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dry_run, "fit", full)
    with pytest.raises(UserError, match="out of memory on cpu.*--gradient_checkpointing.*--lora_rank 16"):
        train_run(base)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backbone, lora_rank, merge_lora, parameters", [
    ("unet", 0, None, 2 * 30), ("unet", 4, True, 10 + 2 * 30), ("transformer", 0, None, 30), ("transformer", 4, False, 10)])
def test_the_result_on_disk_is_what_is_left(backbone, lora_rank, merge_lora, parameters):
    trained = torch.nn.ParameterList([torch.zeros(10), torch.zeros(20)])
    trained[1].requires_grad = False
    run = SimpleNamespace(options=SimpleNamespace(model=ModelOptions(lora_rank=lora_rank, merge_lora=merge_lora)))
    assert dry_run.result_bytes(SimpleNamespace(trained=trained), run, SimpleNamespace(backbone=backbone)) == 4 * parameters


def test_sizes_have_their_unit():
    assert [dry_run.size(count) for count in (3 * 2**20, 5e8, 2**31)] == ["3 MiB", "0.466 GiB", "2 GiB"]
