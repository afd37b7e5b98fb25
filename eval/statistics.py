"""How sure a win rate is: bootstrap over prompts, paired sign test, Holm's correction over the metrics."""

import numpy as np

RESAMPLES = 10_000
CHUNK = 250  # resamples at a time: 3,200 prompts x 250 indices are 6 MB


def by_prompt(values: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Sums (P,) of `values` (N,) over the P distinct prompts, the units that are independent of each other."""
    places = {prompt: place for place, prompt in enumerate(sorted(set(prompts)))}  # numpy's text loses trailing NULs
    return np.bincount([places[prompt] for prompt in prompts], weights=values)


def count_wins(winners: np.ndarray, count_ties: bool = True) -> dict:
    """Wins, ties and A's win rate of (N,) +1, -1 and 0; a tie counts one half or not at all."""
    wins_a, wins_b, ties = (int((winners == sign).sum()) for sign in (1, -1, 0))
    half, counted = (ties / 2, len(winners)) if count_ties else (0, wins_a + wins_b)
    return {"wins_a": wins_a, "wins_b": wins_b, "ties": ties, "win_rate_a_over_b": (wins_a + half) / counted if counted else 0.5}


def ratio_interval(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95% percentile-bootstrap interval of sums.sum() / counts.sum(), resampling the prompts (P,). Changing the sign of the
    sums mirrors it exactly. None for a single prompt, which shows nothing of how prompts differ."""
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    ratios = []
    for start in range(0, RESAMPLES, CHUNK):
        drawn = rng.integers(len(sums), size=(min(CHUNK, RESAMPLES - start), len(sums)))
        ratios.append(sums[drawn].sum(axis=1) / np.maximum(counts[drawn].sum(axis=1), 1))
    ratios = np.concatenate(ratios)
    return float(np.quantile(ratios, 0.025)), float(-np.quantile(-ratios, 0.025))


def mean_interval(values: np.ndarray, prompts: list[str]) -> tuple[float, float] | None:
    """95% interval of the mean of `values` (N,), resampling prompts."""
    return ratio_interval(by_prompt(values, prompts), by_prompt(np.ones(len(values)), prompts))


def win_rate_interval(winners: np.ndarray, prompts: list[str], count_ties: bool = True) -> tuple[float, float] | None:
    """95% interval of A's win rate, resampling prompts.

    winners: (N,) of +1 where A wins, -1 where B wins, 0 for a tie; prompts: the N pairs' prompts. A tie counts one
    half, or not at all with count_ties False. Swapping A and B mirrors the interval. None for a single prompt. Where A wins all
    or none and so resampling finds no width, the exact binomial interval (Clopper-Pearson) of the prompts that count.
    """
    net = by_prompt(winners, prompts)  # the win rate is 1/2 + net / (2 * count)
    count = by_prompt(np.ones(len(winners)) if count_ties else np.abs(winners), prompts)
    interval = ratio_interval(net, count)
    if interval in ((1, 1), (-1, -1)):
        least = 0.025 ** (1 / int((count > 0).sum()))  # of n in n
        return (least, 1.0) if interval[0] == 1 else (0.0, 1 - least)
    return interval and (0.5 + interval[0] / 2, 0.5 + interval[1] / 2)


def sign_test(winners: np.ndarray, prompts: list[str]) -> float:
    """Two-sided paired sign test: p of A and B winning equally many prompts. Each prompt counts once, by the sign of
    its pairs' sum; tied prompts are left out. 1 when all are tied."""
    from scipy.stats import binomtest  # its import takes most of a second

    signs = np.sign(by_prompt(winners, prompts))
    wins, decided = int((signs > 0).sum()), int((signs != 0).sum())
    return float(binomtest(wins, decided, 0.5).pvalue) if decided else 1.0


def outcome(winners: np.ndarray, prompts: list[str], count_ties: bool) -> dict:
    """What a summary says of +1, -1 and 0: count_wins, the win rate's interval and the sign test's p."""
    return {**count_wins(winners, count_ties), "win_rate_ci95": win_rate_interval(winners, prompts, count_ties),
            "sign_test_p": sign_test(winners, prompts)}


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): adjusted p, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
