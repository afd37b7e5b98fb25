"""The task of preference pairs: what a micro-batch becomes, what it costs, and which pairs a bad step had."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.images import scale_pixels
from tests.pretended_gpu import GPU, move, pretended_gpu
from tests.runs import equal, weights
from tests.tasks import first_batch, preference_task
from tests.training import broken_loss
from training.preference import winners_first
from training.records import StepScalars, read_metrics
from training.run import Run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# --- what a micro-batch becomes -----------------------------------------------------------------------------------------

def test_winners_come_first():
    per_pair = torch.tensor([[1, -1], [2, -2], [3, -3]])
    assert winners_first(per_pair).tolist() == [1, 2, 3, -1, -2, -3]


def test_a_pair_shares_noise_timestep_and_caption(tiny_sd15, pairs_dir):
    task = preference_task(tiny_sd15, pairs_dir, "--proportion_empty_prompts=0")
    batch = first_batch(task)
    x_t, target, times, text = task.noised(batch)
    assert torch.equal(times[:2], times[2:]) and times[0] != times[1]
    assert torch.equal(target, batch["noise"].repeat(2, 1, 1, 1))
    assert torch.equal(text["embeddings"][:2], text["embeddings"][2:])
    assert not torch.equal(text["embeddings"][0], text["embeddings"][1])
    moments = task.family.encode_images(scale_pixels(winners_first(batch["pixel_values"])))
    latents = task.family.latents(moments, winners_first(batch["vae_noise"]))
    alpha = task.family.scheduler.alphas_cumprod[times].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, alpha.sqrt() * latents + (1 - alpha).sqrt() * target)
    assert not torch.equal(latents[:2], latents[2:])


def test_perturbed_input_keeps_the_target_and_is_shared_by_the_pair(tiny_sd15, pairs_dir):
    plain = preference_task(tiny_sd15, pairs_dir)
    perturbed = preference_task(tiny_sd15, pairs_dir, "--input_perturbation=0.1")
    x_t, target, _, _ = plain.noised(first_batch(plain))
    shifted, same, _, _ = perturbed.noised(first_batch(perturbed))
    assert torch.equal(target, same)
    shift = shifted - x_t
    torch.testing.assert_close(shift[:2], shift[2:])
    assert shift.abs().max() > 0


def test_sft_takes_winners_alone_and_no_reference(tiny_sd15, pairs_dir):
    task = preference_task(tiny_sd15, pairs_dir, "--train_method=sft")
    batch = first_batch(task)
    assert task.policy.reference is None and not task.policy.has_reference
    assert task.noised(batch)[0].shape == (2, 4, 8, 8)
    assert task.loss(task.trained, batch).loss > 0
    assert task.summary()["reference"] == "none" and "beta" not in task.summary()["method"]


# --- what it costs -------------------------------------------------------------------------------------------------------

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


SETTINGS = [("tiny_sd15", []), ("tiny_sdxl", []), ("tiny_sd15", ["--lora_rank=2"]),
            ("tiny_sd15", ["--noise_offset=0.1", "--input_perturbation=0.1", "--train_method=dmpo"]),
            ("tiny_sd15", ["--train_method=dspo", "--winner_preserving_granularity=sample", "--gradient_checkpointing"])]
SAFEGUARD = "--use_winner_preserving"


def forward(task, batch, scalars: StepScalars) -> torch.Tensor:
    result = task.loss(task.trained, batch)
    scalars.add(result.logs, result.weight)
    return result.loss


@pytest.mark.parametrize("kind, more", SETTINGS)
def test_a_micro_step_reads_nothing_back(kind, more, request, pairs_dir):
    task, scalars = preference_task(request.getfixturevalue(kind), pairs_dir, SAFEGUARD, *more), StepScalars()
    batch = first_batch(task)
    forward(task, batch, scalars).backward()
    with Waits() as waits:
        forward(task, batch, scalars).backward()
    assert waits.found == []


def test_the_count_sees_what_it_should():
    value = torch.arange(4.0)
    with Waits() as waits:
        float(value.sum()), value[value > 1], value.nonzero(), bool(value[0])
    assert len(waits.found) == 4


class OnPretendedGpu(Run):
    device = GPU


@pytest.mark.parametrize("kind, more", SETTINGS)
def test_on_a_gpu_nothing_stays_behind_and_no_copy_is_waited_for(kind, more, request, pairs_dir):
    """Reads, which raise on a pretended GPU, and copies to and from the device, which a CPU cannot show."""
    task = preference_task(request.getfixturevalue(kind), pairs_dir, SAFEGUARD, *more)
    batch, scalars = first_batch(task), StepScalars()
    task.run = OnPretendedGpu(task.run.options, task.run.accelerator, task.run.stop)
    with pretended_gpu() as blocking_copies:
        for module in (task.family.vae, *task.family.text_encoders, task.policy.network, task.policy.reference):
            if module is not None:
                move(module)
        batch = {name: move(tensor) for name, tensor in batch.items()}
        forward(task, batch, scalars)  # the scheduler's table goes to the device once
        blocking_copies.clear()
        loss = forward(task, batch, scalars)
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
    task, scalars = preference_task(request.getfixturevalue(kind), pairs_dir, SAFEGUARD, *more), StepScalars()
    batch = first_batch(task)
    forward(task, batch, scalars).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(task, batch, scalars).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- a step that is not finite --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("processes, value", [(1, "nan"), (2, "inf")])
def test_a_step_that_is_not_finite_is_skipped_and_located(train_tiny, tmp_path, processes, value):
    """Pairs 13 and 14: with 4 pairs a step they are in the fourth and no other."""
    flags = (f"--train_batch_size={4 // processes}", "--max_train_steps=6", "--checkpointing_steps=1")
    output = train_tiny(tmp_path / "run", *flags, processes=processes, prelude=broken_loss.prelude(13, 14, value))
    assert output.count("step 4 is skipped") == 1 and "step 5 is skipped" not in output

    before, after, later = (tmp_path / "run" / f"checkpoint-{step}" for step in (3, 4, 5))
    assert equal(weights(before), weights(after)) and not equal(weights(before), weights(later))
    first, second = (torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (before, after))
    for index in first:
        assert all(torch.equal(first[index][name], second[index][name]) for name in first[index])
    assert train_tiny.losses[6]["skipped_steps"] == 1 and not math.isfinite(train_tiny.losses[4]["train_loss"])

    events = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert {event["step"] for event in events} == {4} and len(events) == processes
    pairs = [pair for event in events for pair in event["pairs"]]
    assert sorted(pair["position"] for pair in pairs) == [13, 14]
    assert all(0 <= pair["timestep"] < 1000 and pair["row"] >= 0 for pair in pairs)


def test_metrics_tell_of_pairs_and_epochs(train_run, tiny_sd15, pairs_dir, tmp_path):
    logs = train_run(["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, "--resolution", 64,
                      "--mixed_precision", "no", "--max_train_samples", 8, "--output_dir", tmp_path])
    assert [(step["pairs_seen"], step["epoch"], step["bad_pairs"]) for step in logs] == [(2, 0.25, 0), (4, 0.5, 0), (6, 0.75, 0)]
    assert logs[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-7) and logs[0]["margin_mean"] == logs[0]["margin_std"] == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["train_loss"] for line in lines] == [step["train_loss"] for step in logs]
