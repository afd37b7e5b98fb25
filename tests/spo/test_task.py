"""The parts of spo/task.py and spo/sampling.py: what a checkpoint keeps, dealing out, weights, the judge, devices."""

import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import CLIPModel

from common.errors import UserError
from common.locks import release
from common.signals import StopSignal
from models.family import open_family
from models.guidance import encode_with_empty
from models.policy import Policy, load_policy
from models.tokens import tokenize
from spo.preference_model.model import PIXEL_MEAN, PIXEL_STD
from spo.resampler import Pairs
from spo.sampling import Progress, Round, Sampler, deal_out, load_judge
from spo.task import SPOTask, digest_of
from tests.spo.conftest import PROMPTS
from training.checkpoints import read_progress
from training.fit import StepLoss, fit
from training.run import start_run


def numbered_pairs(n, members=1):
    return Pairs(torch.arange(n).view(n, 1, 1, 1, 1).expand(n, members, 1, 1, 1).float(), torch.zeros(n, 2, 1, 1, 1),
                 torch.arange(n) % 4, torch.arange(n) // 4)


@pytest.mark.parametrize("inner", [0, 3])
def test_every_pair_is_dealt_once_in_an_order_of_its_own(inner):
    """The order follows from (seed, epoch, round) alone, not from the order in which the pairs were gathered."""
    n = 10
    pairs, accelerator = numbered_pairs(n, 2 if inner else 1), Accelerator(cpu=True)
    dealt = deal_out(pairs, 0, Progress(), accelerator)
    reverse = deal_out(pairs[torch.arange(n).flip(0)], 0, Progress(), accelerator)
    assert sorted(dealt.x_t[:, 0].flatten().tolist()) == list(range(n))
    assert torch.equal(dealt.x_t, reverse.x_t) and not torch.equal(dealt.x_t, pairs.x_t)
    assert not torch.equal(dealt.x_t, deal_out(pairs, 0, Progress(round=1), accelerator).x_t)


# --- what a checkpoint keeps ---------------------------------------------------------------------------------------------

def checked(record, step, max_steps=0, prompts=PROMPTS, allowed=False):
    task = SPOTask.__new__(SPOTask)
    run = SimpleNamespace(options=SimpleNamespace(run=SimpleNamespace(allow_changed_resume=allowed),
                                                  data=SimpleNamespace(source=None)))
    vars(task).update(run=run, spo=SimpleNamespace(spo_prompts="prompts.txt"), max_steps=max_steps, digest=digest_of(prompts),
                      sampler=SimpleNamespace(prompts=prompts), progress=Progress())
    task.restore(record, step)
    return task.progress


def record_of(**changes):
    progress = dict(epoch=1, prompts=4, round=2, compared=10, kept=5, learned=4, widest=0.25)
    return {"prompts": digest_of(PROMPTS), "cut": False, "progress": progress} | changes


def test_progress_goes_on_where_it_stood():
    assert checked({}, 0) == Progress()
    assert checked(record_of(), 6) == Progress(1, 4, 2, 10, 5, 4, 0.25)
    done = record_of(progress=record_of()["progress"] | {"prompts": 9})
    assert checked(done, 6) == Progress(epoch=2)


def test_other_prompts_are_no_continuation():
    for changed in (PROMPTS[::-1], PROMPTS[1:], ["".join(PROMPTS)], []):
        with pytest.raises(UserError, match="the prompts of prompts.txt are not those .* --allow_changed_resume"):
            checked(record_of(), 6, prompts=changed)
    checked(record_of(), 6, prompts=PROMPTS[::-1], allowed=True)


def test_run_cut_in_mid_round_can_end_again_but_not_go_on():
    for steps in (0, 7):
        with pytest.raises(UserError, match="step 6 in the middle of a round.* --resume_from_checkpoint"):
            checked(record_of(cut=True), 6, max_steps=steps)
        checked(record_of(cut=True), 6, max_steps=steps, allowed=True)
    for steps in (5, 6):
        checked(record_of(cut=True), 6, max_steps=steps)


@pytest.mark.parametrize("progress", [None, [], {}, {"epoch": 1}, record_of()["progress"] | {"round": -1},
                                      record_of()["progress"] | {"kept": "5"}])
def test_a_damaged_record_is_named(progress):
    with pytest.raises(UserError, match="progress.json .*--resume_from_checkpoint"):
        checked(record_of(progress=progress), 6)


# --- a step --------------------------------------------------------------------------------------------------------------

class FakeTask(SPOTask):
    """Rounds of `rounds` pairs each; a pair's loss is its step times the only weight, or what `losses` says by step."""

    losses = {}

    def __init__(self, run, family, rounds):
        network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(network.weight)
        super().__init__(run, family, Policy(network, copy.deepcopy(network), lora=False), None, PROMPTS)
        times, rounds = self.sampler.times, iter(rounds)

        def deal(progress):
            pairs = numbered_pairs(next(rounds))
            progress.prompts, progress.learned = progress.prompts + 2, progress.learned + len(pairs)
            return Round(PROMPTS[:4], {}, {}, pairs, {"spo/pairs": len(pairs)})

        deal.prompts, deal.times = PROMPTS, times
        self.sampler = deal

    def summary(self):
        return {}

    def loss(self, model, batch):
        pairs, weight = batch
        scale = torch.tensor([self.losses.get(step, float(step)) for step in pairs.step.tolist()])
        loss = (model.weight.sum() * scale).mean()
        self.results.append((pairs, loss.detach()))
        return StepLoss(loss, {"train_loss": loss.detach()}, weight)


@pytest.fixture
def fake(spo_options, tiny_sd15, tmp_path, fresh_accelerate):
    """fake(rounds, **options) -> a task and its run."""
    def make(rounds, kind=FakeTask, **options):
        options = spo_options(tiny_sd15, tmp_path / "run", **dict(optimizer="sgd", lora_rank=0, learning_rate=1) | options)
        family = open_family(options.model)
        run = start_run(options, StopSignal())
        return kind(run, family, rounds), run
    yield make
    release(tmp_path / "run")


def test_scalars_and_gradient_count_micro_batches_by_their_size(fake):
    """5 pairs in micro-batches of 4 and 1: both are the mean over the pairs, (0 + 1 + 2 + 3 + 0) / 5."""
    task, run = fake([5], train_batch_size=4, gradient_accumulation_steps=2, max_train_steps=1, max_grad_norm=100)
    seen = []
    fit(task, run, lambda step, network, scalars: seen.append((network.weight.item(), scalars)))
    assert seen[1][0] == pytest.approx(1 - 1.2) and seen[1][1]["train_loss"] == pytest.approx(1.2)
    assert not read_progress(run.output_dir / "checkpoint-1")["record"]["cut"]


def test_a_round_without_pairs_is_no_step(fake):
    task, run = fake([0, 4, 0, 8], train_batch_size=4, max_train_steps=3)
    seen = []
    fit(task, run, lambda step, network, scalars: seen.append((step, scalars.get("spo/pairs"))))
    assert seen == [(0, None), (0, None), (1, 4), (1, None), (2, 8), (3, 8)], "a round without pairs is seen too"


def test_an_epoch_without_pairs_ends_the_run(fake, capsys):
    """9 prompts, 2 a round: the second epoch's five rounds have nothing."""
    task, run = fake([4, 0, 0, 0, 0] + [0] * 5, train_batch_size=4, max_train_steps=9)
    outcome = fit(task, run)
    assert (outcome.step, outcome.finished) == (1, True)
    assert "no pair of epoch 2 could be learned from" in capsys.readouterr().err


def test_checkpoints_wait_for_the_rounds_end(fake):
    task, run = fake([12, 12], train_batch_size=4, max_train_steps=5, checkpointing_steps=2)
    fit(task, run)
    cuts = {folder.name: read_progress(folder)["record"]["cut"] for folder in run.output_dir.glob("checkpoint-*")}
    assert cuts == {"checkpoint-3": False, "checkpoint-5": True}


def test_steps_without_a_finite_loss_name_prompts_and_timesteps_and_leave_a_cut_checkpoint(fake):
    class Infinite(FakeTask):
        losses = {3: float("inf")}

    task, run = fake([4] + [16] * 9, Infinite, train_batch_size=4, max_train_steps=30, max_nonfinite_steps=2)
    with pytest.raises(UserError, match="checkpoint-0 is saved.*the objective's beta"):
        fit(task, run)
    lines = [json.loads(line) for line in (run.output_dir / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    timesteps = task.sampler.times.tolist()
    assert [(pair["prompt"], pair["timestep"]) for pair in lines[1]["pairs"]] == [(PROMPTS[0], timesteps[i]) for i in range(4)]
    record = read_progress(run.output_dir / "checkpoint-0")["record"]
    assert record["cut"] and record["skipped_steps"] == 0


# --- models --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, members", [("tiny_sd15", 1), ("tiny_sdxl", 2)])
def test_on_a_gpu_nothing_of_sampling_and_learning_stays_behind(judge, spo_options, request, tmp_path, kind, members):
    from tests.pretended_gpu import GPU, move, pretended_gpu
    options = spo_options(request.getfixturevalue(kind), tmp_path, lora_rank=2, spo_num_steps=6)
    family, cpu = open_family(options.model), torch.device("cpu")
    family.load_encoders(torch.float32, cpu)
    policy = load_policy(family, options.memory, torch.float32, cpu, needs_reference=True)
    referee = load_judge(options.more[0], None, cpu)
    accelerator = SimpleNamespace(device=GPU, autocast=nullcontext, num_processes=1, process_index=0)
    run = SimpleNamespace(options=options, accelerator=accelerator, device=GPU, seed=0)
    task = SPOTask(run, family, policy, referee, PROMPTS)
    with pretended_gpu():
        for module in (family.vae, *family.text_encoders, policy.network, referee.spm):
            move(module)
        text, empty = encode_with_empty(family, PROMPTS[:2], GPU)
        shape = family.latent_shape(64, 64)
        pairs = Pairs(torch.zeros(3, members, *shape, device=GPU), torch.zeros(3, 2, *shape, device=GPU),
                      torch.zeros(3, dtype=torch.int64, device=GPU), torch.zeros(3, dtype=torch.int64, device=GPU))
        task.round = Round(PROMPTS[:2], text, empty, pairs, {})
        result = task.loss(policy.network, (pairs, 1.0))
        assert result.loss.device == GPU and all(value.device == GPU for value in result.logs.values())
        score = the_score(task.sampler)(pairs.x_next[:2, 0], 0, torch.zeros(2, dtype=torch.int64, device=GPU))
        assert score.device == GPU and score.shape == (2,)


def the_score(sampler, chosen=(1, 4)):
    """The scoring program that a sampler hands to the resampler."""
    handed = []

    def resample(predict, score, transition, times, config, generators, shape, device):
        handed.append(score)
        return Pairs.none(shape, config, device), []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spo.sampling.resample", resample)
        sampler.sample({}, {}, np.array(chosen), epoch=0)
    return handed[0]


def test_the_judge_scores_in_float32_what_is_resized_before_it_is_clamped(judge, spo_options, tiny_sd15, tmp_path):
    """Under bf16 too. The VAE here only undoes the scaling; a score by hand is CLIP's own, of the images
    halved by the bicubic's weights (-3, 19, 19, -3) / 32 a side, and then clamped."""
    options = spo_options(tiny_sd15, tmp_path)
    family = open_family(options.model)
    family.vae = SimpleNamespace(dtype=torch.float32, decode=lambda latents, return_dict: [latents[:, :3]])
    family.scaling_factor = 0.5
    accelerator = SimpleNamespace(num_processes=1, process_index=0, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    run = SimpleNamespace(options=options, accelerator=accelerator, device=torch.device("cpu"), seed=0)
    referee = load_judge(options.more[0], None, run.device)
    score = the_score(Sampler(run, family, None, referee, PROMPTS))
    latents = torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 1, 0, 1])
    ours = score(latents, 0, rows)

    images = torch.nn.functional.pad(2 * latents[:, :3], (1, 1, 1, 1), mode="replicate")
    weights = torch.tensor([-3, 19, 19, -3]) / 32
    half = torch.nn.functional.conv2d(images, (weights[:, None] * weights).expand(3, 1, 4, 4), stride=2, groups=3)
    pixels = (half / 2 + 0.5).clamp(0, 1)
    assert (pixels == 0).any() and (pixels == 1).any()
    clip = CLIPModel.from_pretrained(judge)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (PIXEL_MEAN, PIXEL_STD))
    with torch.no_grad():
        image = clip.get_image_features(pixel_values=(pixels - mean) / std).pooler_output
        text = clip.get_text_features(input_ids=tokenize(referee.tokenizer, [PROMPTS[1], PROMPTS[4]])).pooler_output
        expected = clip.logit_scale.exp() * torch.cosine_similarity(image, text[rows])
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)
    with accelerator.autocast():
        assert (score(latents, 0, rows) - expected).abs().max() > 2e-3  # what the old way made of them
