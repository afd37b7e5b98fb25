"""Intervals and tests against closed forms."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from eval.statistics import by_prompt, holm, sign_test, win_rate_interval


def test_interval_matches_the_binomial_one():
    winners = np.array([1.0] * 640 + [-1.0] * 360)
    low, high = win_rate_interval(winners, [str(index) for index in range(1000)])
    assert (low, high) == pytest.approx(tuple(binom.ppf([0.025, 0.975], 1000, 0.64) / 1000), abs=0.004)


def test_swapping_mirrors_the_interval_exactly():
    rng = np.random.default_rng(0)
    winners, prompts = rng.integers(-1, 2, 300).astype(float), [f"p{index // 2}" for index in range(300)]
    for count_ties in (True, False):
        low, high = win_rate_interval(winners, prompts, count_ties)
        mirrored = win_rate_interval(-winners, prompts, count_ties)
        assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-15)


def test_repeated_prompts_are_one_unit():
    winners = np.array([1.0, -1.0] * 50)
    alone = win_rate_interval(np.repeat(winners, 4), [str(index) for index in range(400)])
    clustered = win_rate_interval(np.repeat(winners, 4), [str(index // 4) for index in range(400)])
    assert clustered[1] - clustered[0] == pytest.approx(2 * (alone[1] - alone[0]), rel=0.1)  # sqrt(4) times as wide


@pytest.mark.parametrize("count_ties", [True, False])
def test_where_all_prompts_agree_the_interval_is_the_exact_one(count_ties):
    won, prompts = np.ones(24), [str(index // 2) for index in range(24)]  # 12 prompts
    exact = binomtest(12, 12).proportion_ci()
    assert exact.low == pytest.approx(0.735, abs=1e-3)
    assert win_rate_interval(won, prompts, count_ties) == pytest.approx((exact.low, 1.0))
    assert win_rate_interval(-won, prompts, count_ties) == pytest.approx((0.0, 1 - exact.low))


def test_one_prompt_has_no_interval():
    assert win_rate_interval(np.array([1.0, 1.0, -1.0]), ["a", "a", "a"]) is None


def test_prompts_that_differ_in_a_trailing_null_are_two():
    assert by_prompt(np.array([1.0, -1.0, 1.0]), ["b", "b\0", "a"]).tolist() == [1.0, 1.0, -1.0]


def test_ties_count_one_half_or_not_at_all():
    winners, prompts = np.array([0.0] * 50 + [1.0] * 50), [str(index) for index in range(100)]
    assert np.mean(win_rate_interval(winners, prompts)) == pytest.approx(0.75, abs=0.02)
    assert win_rate_interval(winners, prompts, count_ties=False) == (0.025 ** (1 / 50), 1.0)  # of those that count
    assert win_rate_interval(np.zeros(10), prompts[:10]) == (0.5, 0.5)


def test_sign_test_by_hand():
    prompts = [str(index) for index in range(10)]
    assert sign_test(np.array([1.0] * 9 + [-1.0]), prompts) == pytest.approx(2 * (10 + 1) / 2**10)
    assert sign_test(np.array([1.0] * 8 + [0.0, 0.0]), prompts) == pytest.approx(2 / 2**8)
    assert sign_test(np.zeros(10), prompts) == 1.0
    assert sign_test(np.array([1.0, 1.0, -1.0, -1.0]), ["a", "a", "a", "b"]) == 1.0  # one prompt each


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
