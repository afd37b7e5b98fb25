"""SPO and its preference model on flow matching: the families' random steps, in the same loop as SD1.5's."""

import pytest
import torch
from safetensors.torch import load_file

from spo.preference_model.options import parse_spm_options
from spo.preference_model.train import train as train_spm
from tests.conftest import reset_accelerate
from tests.flow_pipelines import KINDS, build_flow_pipeline
from training.records import read_metrics

LORA = "pytorch_lora_weights.safetensors"
SMALL = dict(resolution=32, spo_num_steps=6, spo_threshold=0, train_batch_size=16)
WORDS = {"qwen_image": 64, "z_image": 96}  # tokens that its template alone takes here


@pytest.fixture(scope="module")
def flow_base(tmp_path_factory):
    """flow_base(kind) -> a tiny pipeline's folder, made once."""
    folder = tmp_path_factory.mktemp("flow")
    return lambda kind: folder / kind if (folder / kind).exists() else build_flow_pipeline(folder / kind, kind)


@pytest.mark.parametrize("kind", list(KINDS))
def test_policy_equals_reference_at_first_and_then_moves(kind, train_here, flow_base, tmp_path):
    _, (first, second) = train_here(flow_base(kind), tmp_path / "out", lora_rank=4, max_sequence_length=WORDS.get(kind, 16),
                                    **SMALL)
    assert first["train_loss"] == torch.tensor(2.0).log().item()  # to the last bit
    assert first["ratio_w"] == first["ratio_l"] == 1.0 and first["grad_norm"] > 0
    assert second["train_loss"] != first["train_loss"] and second["spo/score_spread"] > 0
    assert (tmp_path / "out" / LORA).is_file()


def test_resumed_run_ends_where_an_uninterrupted_one_does(train_here, flow_base, tmp_path):
    """The whole network against a frozen copy."""
    base, whole, cut = flow_base("sd3"), tmp_path / "whole", tmp_path / "cut"
    common = SMALL | dict(lora_rank=0, checkpointing_steps=1, max_sequence_length=16)
    train_here(base, whole, max_train_steps=2, **common)
    train_here(base, cut, max_train_steps=1, **common)
    train_here(base, cut, max_train_steps=2, **common)
    a, b, start = (load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (whole, cut, base))
    assert all(torch.equal(a[key], b[key]) for key in a) and any(not torch.equal(a[key], start[key]) for key in a)


def test_the_preference_model_learns_from_images_that_a_flow_restores(judge, flow_base, pairs_dir, tmp_path):
    options = dict(pretrained_model_name_or_path=flow_base("sd3"), train_data_dir=pairs_dir, validation_split="none",
                   resolution=32, spm_clip=judge, spm_tokenizer=judge, train_batch_size=2, max_train_steps=2,
                   max_sequence_length=16, learning_rate=1e-3, lr_warmup_steps=0, mixed_precision="no", report_to="none",
                   seed=0, output_dir=tmp_path / "spm")
    reset_accelerate()
    train_spm(parse_spm_options([f"--{name}={value}" for name, value in options.items()]))
    metrics = read_metrics(tmp_path / "spm" / "metrics.jsonl")
    assert len(metrics) == 2 and all(line["grad_norm"] > 0 for line in metrics)
    assert (tmp_path / "spm" / "step-aware_preference_model.bin").is_file()
