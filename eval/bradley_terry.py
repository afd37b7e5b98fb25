"""Bradley-Terry strengths: model i beats model j with probability 1 / (1 + exp(s_j - s_i))."""

import numpy as np

PRIOR = 1.0  # drawn games of each model against one of strength 0: keeps finite what never lost, or never met
RESAMPLES, CHUNK = 2_000, 250
NO_WIDTH = 1e-6  # of an interval: the fit is exact to less
STEPS, LARGEST_STEP = 200, 1.0


def fit(wins: np.ndarray) -> np.ndarray:
    """Log strengths (..., M), their mean 0, of wins (..., M, M): how often row beat column, a tie one half each way.

    Newton's method on the concave log-likelihood, all leading dimensions at once.
    """
    models = wins.shape[-1]
    games = wins + np.swapaxes(wins, -1, -2)
    strengths, eye = np.zeros(wins.shape[:-1]), np.eye(models)
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))  # row beats column
        against_0 = 1 / (1 + np.exp(-strengths))
        slope = wins.sum(-1) - (games * chance).sum(-1) + PRIOR * (0.5 - against_0)
        weight = games * chance * (1 - chance)
        curvature = eye * (weight.sum(-1) + PRIOR * against_0 * (1 - against_0))[..., None] - weight
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        strengths = strengths + step.clip(-LARGEST_STEP, LARGEST_STEP)
        if np.abs(step).max(initial=0) < 1e-9:
            break
    return strengths - strengths.mean(-1, keepdims=True)


def fit_with_intervals(wins: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Log strengths (M,) and their 95% percentile-bootstrap intervals (M, 2), resampling prompts; None for a single prompt.
    wins: (P, M, M) of each prompt. NaN is the strength of a model without a game, which moves no other's, and the interval of
    one that won or lost everything or that all resamples rate alike: it would look certain."""
    won, lost = wins.sum((0, 2)), wins.sum((0, 1))
    met = won + lost > 0
    wins = wins[:, met][:, :, met]
    prompts, models, _ = wins.shape
    strengths, intervals = np.full(len(met), np.nan), np.full((len(met), 2), np.nan)
    strengths[met] = fit(wins.sum(0))
    if prompts < 2:
        return strengths, None
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, CHUNK):
        times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=CHUNK).astype(float)
        drawn.append(fit((times @ wins.reshape(prompts, -1)).reshape(CHUNK, models, models)))
    intervals[met] = np.quantile(np.concatenate(drawn), (0.025, 0.975), axis=0).T
    intervals[(won == 0) | (lost == 0) | (intervals[:, 1] - intervals[:, 0] < NO_WIDTH)] = np.nan
    return strengths, intervals
