"""Which of a prompt's images make a pair, from their scores: rules as functions of numbers alone."""

import itertools
from dataclasses import dataclass
from typing import Literal

Rule = Literal["best_worst", "all", "margin"]
Vote = Literal["rank", "agree"]


@dataclass(frozen=True)
class Found:
    """A pair of a prompt's images by their places. gap: how far apart they are; in the score of one metric, or in the mean
    rank, from 0 (worst) to 1 (best), of several."""

    winner: int
    loser: int
    gap: float


def find_pairs(scores: dict[str, list[float]], rule: Rule, vote: Vote = "rank", min_gap: float = 0.0) -> list[Found]:
    """The pairs of one prompt's images, the widest gap first; scores: of each metric, an image each.

    best_worst: the pair that is furthest apart. all: every two images that are not equal. margin: every two at least
    min_gap apart (for the other rules, too, nothing nearer is taken). vote, with several metrics: by their mean rank, or
    only pairs whose order all of them agree on. Of equally wide pairs the first images' comes first.
    """
    strengths = strength(scores)
    pairs = []
    for a, b in itertools.combinations(range(len(strengths)), 2):
        winner, loser = (a, b) if strengths[a] > strengths[b] else (b, a)
        gap = strengths[winner] - strengths[loser]
        agreed = all(values[winner] > values[loser] for values in scores.values())
        if gap > 0 and gap >= min_gap and (vote == "rank" or agreed):
            pairs.append(Found(winner, loser, gap))
    pairs.sort(key=lambda pair: -pair.gap)
    return pairs[:1] if rule == "best_worst" else pairs


def strength(scores: dict[str, list[float]]) -> list[float]:
    """One number for each image: the score of one metric, the mean rank of several."""
    columns = list(scores.values())
    if len(columns) == 1:
        return columns[0]
    return [sum(ranks) / len(ranks) for ranks in zip(*map(ranks_of, columns))]


def ranks_of(values: list[float]) -> list[float]:
    """The rank of each value from 0 (lowest) to 1 (highest); equal values share the mean of theirs."""
    last = max(len(values) - 1, 1)
    return [(sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2) / last
            for value in values]


def histogram(gaps: list[float], bins: int = 10, width: int = 40) -> list[str]:
    """Lines that show how many gaps lie where, from 0 to the widest."""
    if not gaps:
        return []
    step = max(gaps) / bins
    counts = [0] * bins
    for gap in gaps:
        counts[min(int(gap / step), bins - 1)] += 1
    return [f"  {number * step:>9.4g} to {(number + 1) * step:<9.4g} {'#' * -(-count * width // max(counts))} {count}"
            for number, count in enumerate(counts)]
