import numpy as np
import torch

from data.draws import PairStream, draw_pair, epoch_order


def positions(stream):
    return [place for batch in stream for place in batch]


def test_a_pairs_draws_depend_on_seed_and_position_alone():
    one, again, other = (draw_pair(seed, 5, (4, 8, 8)) for seed in (1, 1, 2))
    assert torch.equal(one.noise, again.noise) and one.timestep == again.timestep
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise, draw_pair(1, 6, (4, 8, 8)).noise)
    perturbed = draw_pair(1, 5, (4, 8, 8), perturb=True)
    assert torch.equal(one.noise, perturbed.noise), "perturbation leaves the shared noise as it was"


def test_timesteps_are_uniform_and_noise_is_standard_normal():
    draws = [draw_pair(0, position, (4, 8, 8)) for position in range(2000)]
    counts = np.histogram([draw.timestep for draw in draws], bins=10, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    noise = torch.stack([draw.noise for draw in draws])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    flips = torch.stack([draw.flip for draw in draws])
    assert abs(np.corrcoef(flips[:, 0], flips[:, 1])[0, 1]) < 0.08, "winner and loser flip independently"


def test_processes_share_one_stream():
    one = positions(PairStream(10, 4, 0, 1, seed=3, shuffle=True, first_position=0, micro_steps=6))
    ranks = [list(PairStream(10, 2, rank, 2, seed=3, shuffle=True, first_position=0, micro_steps=6))
             for rank in range(2)]
    two = [place for pair_of_batches in zip(*ranks) for batch in pair_of_batches for place in batch]
    assert one == two


def test_every_epoch_visits_every_pair_once_in_its_own_order():
    indices = [index for _, index in positions(PairStream(10, 4, 0, 1, 3, True, 0, 5))]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:] != list(range(10))
    assert [index for _, index in positions(PairStream(10, 4, 0, 1, 3, False, 0, 5))] == 2 * list(range(10))
    assert list(epoch_order(10, 3, 1, True)) == indices[10:]


def test_a_stream_continues_anywhere():
    whole = list(PairStream(7, 2, 1, 2, 0, True, 0, 9))
    assert list(PairStream(7, 2, 1, 2, 0, True, 4 * 2 * 2, 5)) == whole[4:]
