"""What the runs say: the records, the best (rate, steps) of each configuration, the room, and intervals over seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from common.files import read_json
from shapes.experiments.plan import SEED, SHORT, Config, Run, Settings, World
from shapes.experiments.runs import base_path, judged_steps, record_path

Point = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def show(self, form: str = "+.3f") -> str:
        mean = format(self.mean, form)
        return mean if np.isnan(self.low) else f"{mean} [{format(self.low, form)}, {format(self.high, form)}]"


def interval(values) -> Interval:
    """Mean and 95% t-interval; (mean, nan, nan) of a single value, nan of none."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(values[0] if len(values) else np.nan, np.nan, np.nan)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(values.mean(), values.mean() - half, values.mean() + half)


class Cell(NamedTuple):
    rate: float
    step: int


def score(point: Point) -> float:
    return float(np.mean(point["scores"]))


class Results:
    """The records that are there."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._records: dict[Run, dict | None] = {}

    def base(self, world: World) -> Point | None:
        return read_json(base_path(world, self.settings))

    def points(self, config: Config, rate: float, seed: int) -> dict[int, Point]:
        """A run's judgements by step; after a collapse the last one stands for those that were left out. {} of no run."""
        run = Run(config, rate, seed)
        if run not in self._records:
            paths = [record_path(run, self.settings), record_path(run._replace(share=SHORT), self.settings)]
            self._records[run] = read_json(paths[0]) or read_json(paths[1])
        record, points = self._records[run], {}
        if record:
            for step in judged_steps(self.settings, record["share"]):
                points[step] = next((point for point in record["points"] if point["step"] == step), record["points"][-1])
        return points

    def rates(self, config: Config, seed: int = SEED, share: float = 1.0) -> list[float]:
        """The rates of the grid that were run with a seed, to that share of the steps at least."""
        return [rate for rate in self.settings.rates if self.end(rate, share).step in self.points(config, rate, seed)]

    def best(self, config: Config, share: float = 1.0) -> Cell | None:
        """The (rate, steps) whose drawings score highest with SEED; a share below 1 takes the smaller grid of rates too."""
        allowed = judged_steps(self.settings, share)
        rates = [rate for rate in self.rates(config, share=share) if share == 1.0 or rate in self.settings.lower]
        cells = {Cell(rate, step): score(point) for rate in rates
                 for step, point in self.points(config, rate, SEED).items() if step in allowed}
        return max(cells, key=cells.__getitem__) if cells else None

    def best_rate(self, config: Config, share: float = 1.0) -> float | None:
        best = self.best(config, share)
        return best and best.rate

    def over_seeds(self, config: Config, cell: Cell | None,
                   value: Callable[[Point], float | None] = score) -> dict[int, float]:
        """`value` of each further seed's judgement at a cell; of SEED's where none was run, {} of an objective without it."""
        for seeds in (self.settings.further, [SEED]) if cell else ():
            points = {seed: self.points(config, cell.rate, seed).get(cell.step) for seed in seeds}
            found = {seed: value(point) for seed, point in points.items() if point}
            if found := {seed: number for seed, number in found.items() if number is not None}:
                return found
        return {}

    def gain(self, config: Config, cell: Cell | None) -> dict[int, float]:
        """Score above the base's, by seed."""
        return {seed: value - score(self.base(config.world)) for seed, value in self.over_seeds(config, cell).items()}

    def gains(self, config: Config, cell: Cell | None) -> list[float]:
        return list(self.gain(config, cell).values())

    def difference(self, one: Config, other: Config) -> Interval:
        """Of their scores, each at its best, over the further seeds that both have; of SEED where they have none."""
        cells = [(config, best) for config in (one, other) if (best := self.best(config))]
        for seeds in (self.settings.further, [SEED]) if len(cells) == 2 else ():
            points = [[self.points(config, best.rate, seed).get(best.step) for config, best in cells] for seed in seeds]
            if found := [score(first) - score(second) for first, second in points if first and second]:
                return interval(found)
        return interval([])

    def end(self, rate: float, share: float = 1.0) -> Cell:
        return Cell(rate, judged_steps(self.settings, share)[-1])

    # --- the room --------------------------------------------------------------------------------------------------------

    def largest_good_rate(self, config: Config, seed: int) -> tuple[float, bool] | None:
        """The highest rate at which a whole run still draws better than the base, interpolated in log(rate) to where the
        difference is 0; and whether the grid ends there, so that it may lie beyond. None without the seed's runs."""
        rates = self.rates(config, seed)
        if len(rates) < 2:
            return None
        base = score(self.base(config.world))
        gains = [score(self.points(config, rate, seed)[self.end(rate).step]) - base for rate in rates]
        good = [place for place, gain in enumerate(gains) if gain > 0]
        if not good or good[-1] == len(rates) - 1:
            return rates[good[-1] if good else 0], True
        last = good[-1]
        share = gains[last] / (gains[last] - gains[last + 1])
        return float(np.exp(np.log(rates[last]) * (1 - share) + np.log(rates[last + 1]) * share)), False

    def room(self, config: Config, against: Config) -> tuple[Interval, bool] | None:
        """Ratio of the largest good rates over the further seeds, and whether any of them met the grid's end."""
        pairs = [(self.largest_good_rate(config, seed), self.largest_good_rate(against, seed))
                 for seed in self.settings.further]
        pairs = [(one, other) for one, other in pairs if one and other]
        if not pairs:
            return None
        logs = interval([np.log(one[0] / other[0]) for one, other in pairs])
        return Interval(*np.exp([logs.mean, logs.low, logs.high])), any(one[1] or other[1] for one, other in pairs)
