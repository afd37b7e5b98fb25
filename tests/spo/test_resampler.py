"""The step-wise resampler on a linear predictor and a counting scorer, where every number can be followed."""

from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import chisquare

from common.errors import UserError
from losses.spo import best_and_worst, ddim_gaussian
from models.stable_diffusion import ddim_scheduler
from spo.resampler import ResamplerConfig, prompt_generator, resample

SHAPE = (4, 4, 4)
CPU = torch.device("cpu")
SD15 = ResamplerConfig(threshold=-1.0)  # keeps every pair
SDXL = ResamplerConfig(pool_size=2, num_inner_step=3, threshold=-1.0)


def scheduler(num_steps: int = 20) -> DDIMScheduler:
    base = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                         set_alpha_to_one=False, clip_sample=False)
    return ddim_scheduler(base, num_steps)


def ddim(steps: DDIMScheduler):
    """resample()'s transition."""
    def transition(prediction, x_t, step):
        times = steps.timesteps[step]
        return ddim_gaussian(prediction, x_t, times, times - 1000 // steps.num_inference_steps, steps.alphas_cumprod)
    return transition


class Recorder:
    """A predictor and a scorer that remember their calls."""

    def __init__(self):
        self.predicted, self.scored = [], []

    def predict(self, latents, t, prompts):
        self.predicted.append((t, latents.clone(), prompts.clone()))
        return 0.5 * latents + 0.01 * prompts.view(-1, 1, 1, 1)

    def score(self, latents, t, prompts):
        self.scored.append((t, latents.clone(), prompts.clone()))
        return latents.mean(dim=(1, 2, 3)) * 10


def run(config, prompts=range(3), seed=0, epoch=0):
    recorder = Recorder()
    generators = [prompt_generator(seed, epoch, index) for index in prompts]
    steps = scheduler(config.num_steps)
    pairs, comparisons = resample(recorder.predict, recorder.score, ddim(steps), steps.timesteps, config, generators,
                                  SHAPE, CPU)
    return pairs, comparisons, recorder


def test_every_sd15_pool_gives_one_pair_sharing_x_t():
    pairs, comparisons, recorder = run(SD15)
    assert len(pairs) == 3 * 16 and [c.step for c in comparisons] == list(range(4, 20))
    assert pairs.x_t.shape == (48, 1, *SHAPE) and pairs.x_next.shape == (48, 2, *SHAPE)
    assert not torch.equal(pairs.x_next[:, 0], pairs.x_next[:, 1])
    # one pass a step: b latents up to the first pool, then the 4-wide pool of each of the 3 prompts
    assert [len(x) for _, x, _ in recorder.predicted] == [3] * 5 + [12] * 15
    # compared at the next timestep t', and after the last step on the candidates themselves at timestep 0
    assert [t for t, _, _ in recorder.scored] == scheduler().timesteps.tolist()[5:] + [0]
    assert all(c.scores.shape == (4, 3) for c in comparisons)


def test_winner_and_loser_are_the_best_and_worst_of_the_pool_that_was_scored():
    pairs, comparisons, recorder = run(SD15)
    last = recorder.scored[-1][1].unflatten(0, (4, 3))  # timestep 0 scores the candidates themselves
    best, worst, _ = best_and_worst(comparisons[-1].scores, -1.0)
    rows = pairs.step == 19
    for prompt in range(3):
        pair = pairs[rows][pairs.prompt[rows] == prompt]
        assert torch.equal(pair.x_next[0, 0], last[best[prompt], prompt])
        assert torch.equal(pair.x_next[0, 1], last[worst[prompt], prompt])
        assert pair.x_next[0, 0].mean() > pair.x_next[0, 1].mean()


def test_the_pool_is_drawn_from_the_ddim_step_of_x_t():
    pairs, _, _ = run(SD15, prompts=range(1))
    steps = scheduler()
    for row in range(len(pairs)):
        t = steps.timesteps[pairs.step[row]]
        x_t = pairs.x_t[row, 0]
        mean = steps.step(0.5 * x_t, t, x_t, eta=1.0, variance_noise=torch.zeros_like(x_t)).prev_sample
        ones = steps.step(0.5 * x_t, t, x_t, eta=1.0, variance_noise=torch.ones_like(x_t)).prev_sample
        noise = (pairs.x_next[row] - mean) / (ones - mean)  # (2, C, h, w): standard normal, but for the selection
        assert noise.std() == pytest.approx(1, abs=0.35)


def test_the_successor_is_uniform_over_the_pool():
    """Chi-square over many seeds: which pool member the next pool starts from, and its rank by score."""
    places, ranks = Counter(), Counter()
    config = ResamplerConfig(num_steps=4, divert_start_step=1, threshold=-1.0)
    for seed in range(200):
        pairs, comparisons, recorder = run(config, prompts=range(4), seed=seed)
        for comparison, (_, pool, _) in zip(comparisons, recorder.predicted[2:]):
            pool = pool.unflatten(0, (4, 4))
            rows = pairs.step == comparison.step + 1
            for x_t, prompt in zip(pairs.x_t[rows, 0], pairs.prompt[rows]):
                (place,) = [k for k in range(4) if torch.equal(pool[k, prompt], x_t)]
                places[place] += 1
                ranks[int((comparison.scores[:, prompt] < comparison.scores[place, prompt]).sum())] += 1
    assert sum(places.values()) == 200 * 4 * 2
    for counts in (places, ranks):
        assert chisquare([counts[k] for k in range(4)]).pvalue > 0.001, counts


def test_sdxl_segments_share_x_t_first_and_follow_their_own_branch_later():
    pairs, comparisons, recorder = run(SDXL)
    assert [c.step for c in comparisons] == [7, 11, 15, 19]
    assert [t for t, _, _ in recorder.scored] == [scheduler().timesteps[i].item() for i in (8, 12, 16)] + [0]
    assert sorted(pairs.step.tolist()) == sorted(list(range(4, 20)) * 3)
    for prompt in range(3):
        trajectory = pairs[pairs.prompt == prompt]
        for i, step in enumerate(range(4, 20)):
            first = step % 4 == 0
            shared = torch.equal(trajectory.x_t[i, 0], trajectory.x_t[i, 1])
            assert shared == first
            if not first:  # each goes on from where its own branch was
                assert torch.equal(trajectory.x_t[i], trajectory.x_next[i - 1])


def test_with_inner_steps_the_last_timestep_never_opens_a_pool():
    """A segment due at the last timestep is extended by it instead, as in the official SDXL program."""
    config = ResamplerConfig(num_steps=10, divert_start_step=1, pool_size=2, num_inner_step=3, threshold=-1.0)
    pairs, comparisons, _ = run(config)  # pools at 1 and 5; the second is due at 9, the last
    assert [c.step for c in comparisons] == [4, 9]
    last_segment = pairs[(pairs.step >= 5) & (pairs.prompt == 0)]
    assert [torch.equal(x[0], x[1]) for x in last_segment.x_t] == [True] + [False] * 4


def test_a_prompt_draws_the_same_in_every_batch():
    """2 processes with a prompt each, or 1 process with both: the same pairs. Another epoch or seed: others."""
    for config in (SD15, SDXL):
        together, _, _ = run(config, prompts=[7, 2])
        for position, prompt in enumerate([7, 2]):
            recorder = Recorder()
            alone, _ = resample(lambda x, t, p: recorder.predict(x, t, p + position), recorder.score, ddim(scheduler()),
                                scheduler().timesteps, config, [prompt_generator(0, 0, prompt)], SHAPE, CPU)
            same = together[together.prompt == position]
            assert torch.equal(same.step, alone.step)
            torch.testing.assert_close(same.x_t, alone.x_t)
            torch.testing.assert_close(same.x_next, alone.x_next)
        for other in (run(config, [7, 2], epoch=1), run(config, [7, 2], seed=1)):
            assert not torch.isclose(other[0].x_next, together.x_next).all(dim=(1, 2, 3, 4)).any()


def test_threshold_drops_close_pools_and_may_drop_all():
    everything, comparisons, _ = run(SD15)
    some, _, _ = run(ResamplerConfig(threshold=0.3))
    expected = sum(int(best_and_worst(c.scores, 0.3)[2].sum()) for c in comparisons)
    assert 0 < len(some) == expected < len(everything)
    none, comparisons, _ = run(ResamplerConfig(threshold=1.0))
    assert len(none) == 0 and none.x_t.shape == (0, 1, *SHAPE) and not any(c.kept.any() for c in comparisons)


@pytest.mark.parametrize("start", [0, 19])
def test_pools_from_the_first_or_only_at_the_last_step(start):
    pairs, _, _ = run(ResamplerConfig(divert_start_step=start, threshold=-1.0))
    assert len(pairs) == 3 * (20 - start)


def test_as_many_steps_as_the_schedule_has_room_for():
    most = scheduler(999).timesteps
    assert most[0] == 999 and most[-1] == 1
    for number in (1000, 1001):
        with pytest.raises(UserError, match=f"--spo_num_steps {number} is too many .* at most 999 fit"):
            scheduler(number)


def test_a_schedule_whose_last_step_has_no_noise_is_refused():
    base = DDIMScheduler(steps_offset=0)
    with pytest.raises(UserError, match="steps_offset 0"):
        ddim_scheduler(base, 20)
