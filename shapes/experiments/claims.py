"""The claims, each by a stated test: confirmed, refuted or undecided.

A test compares an interval over seeds with a bound. Confirmed: the whole interval lies on the claim's side of it. Refuted: the
whole interval lies on the other side, for a claim that something is better beyond a difference that does not matter.
Undecided: anything else, as with a single seed.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from common.files import read_json
from shapes.experiments.instruments import overhead_path
from shapes.experiments.plan import FRONTIERS, SEED, Config, Settings, short
from shapes.experiments.results import Cell, Interval, Point, Results, interval, score

WINNER_TOLERANCE = 1.0  # % of the reference's error: a smaller rise is none
SCORE_TOLERANCE = 0.01  # of the oracle's score, in [0, 1]: a smaller difference does not matter
OVERHEAD_TOLERANCE = 0.05


@dataclass(frozen=True)
class Claim:
    text: str
    frontier: Config
    shown: str  # what was measured, with its interval
    verdict: str
    reason: str  # one sentence


def winner_rise(point: Point) -> float | None:
    """The winner's error above the reference's, in % of it; None for an objective without a reference."""
    return 100 * point["winner"] / point["reference"] if "winner" in point else None


def verdict(value: Interval, above: float, refuted_below: float | None = None) -> str:
    if value.low > above:
        return "confirmed"
    return "refuted" if value.high < (above if refuted_below is None else refuted_below) else "undecided"


def negative(value: Interval) -> Interval:
    return Interval(-value.mean, -value.high, -value.low)


def weigh(text: str, frontier: Config, value: Interval, sentence: str, form: str = "+.3f", above: float | None = None,
         below: float | None = None, refuted_below: float | None = None) -> Claim:
    """sentence: with {} for what was measured. One of above and below is the claim's bound."""
    if math.isnan(value.mean):
        return Claim(text, frontier, "not run", "undecided", "Its runs are missing.")
    found = verdict(value, above, refuted_below) if below is None else verdict(negative(value), -below)
    bound = format(above if below is None else below, form)
    refuting = bound if refuted_below is None else format(refuted_below, form)
    if math.isnan(value.low):
        why = "one seed has no interval"
    elif found == "undecided":
        why = f"the interval holds {bound}" if refuted_below is None else f"the interval fits both {bound} and {refuting}"
    else:
        side = "above" if (found == "confirmed") == (below is None) else "below"
        why = f"all of it lies {side} {bound if found == 'confirmed' else refuting}"
    return Claim(text, frontier, value.show(form), found, f"{sentence.format(value.show(form))}; {why}.")


def harmful_rate(results: Results, config: Config) -> float | None:
    """The lowest rate from the best one on whose whole run, of SEED, draws worse than the base."""
    best = results.best(config)
    base = score(results.base(config.world)) if best else 0.0
    return next((rate for rate in (results.rates(config) if best else []) if rate >= best.rate
                 and score(results.points(config, rate, SEED)[results.end(rate).step]) < base), None)


def claims_in(results: Results, plain: Config) -> list[Claim]:
    """Every claim that has runs in a frontier, which is named by its plain variant."""
    chosen = {name: plain.with_variant(name) for name in
              ("plain", "safeguarded", "fixed lambda", "per pair", "winners only", "winner's error added")}
    best = {name: results.best(config) for name, config in chosen.items()}
    if not (best["plain"] and best["safeguarded"]):
        return []
    safe = chosen["safeguarded"]
    rate = harmful_rate(results, plain)
    harm = results.end(rate) if rate else None

    def rise(config: Config, cell: Cell | None) -> Interval:
        return interval(list(results.over_seeds(config, cell, winner_rise).values()))

    def at(cell: Cell | None) -> str:
        return f"At rate {short(cell.rate)}, step {cell.step}," if cell else "At no rate of the grid"

    harmed, at_best = results.gain(plain, harm), results.gain(plain, best["plain"])
    found = [
        weigh("Plain training raises the winner's error", plain, rise(plain, best["plain"]),
             f"{at(best['plain'])} plain's best, it stands {{}}% above the reference's", "+.1f", above=0.0),
        weigh("Plain training comes to harm", plain,
             interval([max(value, value - at_best[seed]) for seed, value in harmed.items() if seed in at_best]),
             f"{at(harm)} it scores {{}} against the base or its own best, whichever is nearer", below=0.0),
        weigh("The safeguard holds the winner's error", plain, rise(safe, best["safeguarded"]),
             f"{at(best['safeguarded'])} its best, it stands {{}}% above the reference's", "+.1f", below=WINNER_TOLERANCE),
        weigh("It holds it even where plain comes to harm", plain, rise(safe, harm),
             f"{at(harm)} it stands {{}}% above the reference's", "+.1f", below=WINNER_TOLERANCE),
        weigh("Where plain comes to harm it is at least as good as the base", plain, interval(results.gains(safe, harm)),
             f"{at(harm)} it scores {{}} against the base", above=-SCORE_TOLERANCE),
        weigh("Its best is better than the base", plain, interval(results.gains(safe, best["safeguarded"])),
             f"{at(best['safeguarded'])} it scores {{}} against the base", above=0.0),
        weigh("Its best is at least as good as plain's best", plain, results.difference(safe, plain),
             "It scores {} against plain", above=-SCORE_TOLERANCE),
    ]
    room, censored = results.room(safe, plain) or (Interval(math.nan, math.nan, math.nan), False)
    found.append(weigh("It has more room: a larger rate still draws better than the base", plain, room,
                      f"Its largest good rate is {'at least ' if censored else ''}{{}} times plain's", ".1f", above=1.0))
    better, as_good = {"above": 0.0, "refuted_below": SCORE_TOLERANCE}, {"above": -SCORE_TOLERANCE}
    for name, text, bounds in (
            ("fixed lambda", "The adaptive lambda is better than a fixed one", better),
            ("per pair", "One lambda a batch is at least as good as one a pair", as_good),
            ("winners only", "Training on winners alone is not enough", better),
            ("winner's error added", "It is at least as good as adding the winner's error to the loss", as_good)):
        if best[name]:
            found.append(weigh(text, plain, results.difference(safe, chosen[name]),
                              f"Each at its best, the safeguard scores {{}} against {name}", **bounds))
    return found


def overhead(settings: Settings) -> list[Claim]:
    """The share of processor time that the safeguard adds to a step, bootstrapped over rounds."""
    seconds = read_json(overhead_path(settings))
    if not seconds:
        return []
    low, high = stats.bootstrap((seconds["safeguarded"], seconds["plain"]), lambda a, b: np.median(a) / np.median(b),
                                vectorized=False, paired=True, rng=0, method="percentile").confidence_interval
    value = Interval(np.median(seconds["safeguarded"]) / np.median(seconds["plain"]) - 1, low - 1, high - 1)
    return [weigh("Its overhead is negligible", FRONTIERS[0], value, "It adds {} of a step's processor time", "+.1%",
                  below=OVERHEAD_TOLERANCE)]


def all_claims(results: Results) -> list[Claim]:
    return [claim for plain in FRONTIERS for claim in claims_in(results, plain)] + overhead(results.settings)
