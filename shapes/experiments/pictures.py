"""The report's pictures."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.files import whole_file
from shapes.experiments.plan import CORE, SEED, SHORT, VARIANTS, Config, Run, short
from shapes.experiments.results import Results, interval, score
from shapes.experiments.runs import judged_steps, record_path

COLOURS = {"plain": "#c0392b", "safeguarded": "#2471a3", "winners only": "#7d3c98"}
GREATEST = 0.06  # of the map's colours, from the base's score


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside:
        figure.savefig(aside, format="png", dpi=100)


def configs_with_runs(results: Results, plain: Config) -> list[Config]:
    return [config for variant in VARIANTS if results.best(config := plain.with_variant(variant))]


def core_of(results: Results, plain: Config) -> tuple[list[Config], list[float]]:
    """Plain and safeguarded, and the rates at which both were run with SEED."""
    configs = [config for config in configs_with_runs(results, plain) if config.variant in CORE]
    return configs, [rate for rate in results.settings.rates if all(rate in results.rates(config) for config in configs)]


def quality(results: Results, plain: Config, path: Path) -> None:
    """Oracle's score over the steps, plain and safeguarded, a panel per rate: each seed's line and their mean."""
    configs, rates = core_of(results, plain)
    figure = Figure(figsize=(2.6 * len(rates) + 0.6, 3.3), layout="constrained")
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    base = score(results.base(plain.world))
    for axes, rate in zip(panels, rates):
        for config in configs:
            runs = [results.points(config, rate, seed) for seed in (SEED, *results.settings.further)]
            curves = [[base, *map(score, points.values())] for points in runs if points]
            steps = [0, *judged_steps(results.settings)]
            for curve in curves:
                axes.plot(steps, curve, color=COLOURS[config.variant], linewidth=0.8, alpha=0.4)
            axes.plot(steps, np.mean(curves, axis=0), color=COLOURS[config.variant], linewidth=2.4, marker="o", markersize=4,
                      label=config.variant)
        axes.axhline(base, color="black", linewidth=0.8, linestyle="--", label="base")
        axes.set_title(f"rate {short(rate)}")
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("oracle's score")
    figure.legend(*panels[-1].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    save(figure, path)


def room_map(results: Results, plain: Config, path: Path) -> None:
    """Score against the base over steps and rates, a panel per variant, seed SEED: blue is better than the base, red worse."""
    configs = configs_with_runs(results, plain)
    steps, base = judged_steps(results.settings), score(results.base(plain.world))
    columns = min(4, len(configs))
    figure = Figure(figsize=(3.1 * columns + 0.8, 2.6 * -(-len(configs) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(configs) // columns), columns, squeeze=False).flat
    for config, axes in zip(configs, panels):  # in this order, zip leaves the unused panels
        rates = results.rates(config)
        gains = np.array([[score(point) - base for point in results.points(config, rate, SEED).values()] for rate in rates])
        image = axes.imshow(gains, cmap="RdBu", vmin=-GREATEST, vmax=GREATEST, aspect="auto", origin="lower")
        for row, column in np.ndindex(gains.shape):
            axes.text(column, row, f"{100 * gains[row, column]:+.0f}", ha="center", va="center", fontsize=8,
                      color="white" if abs(gains[row, column]) > 0.7 * GREATEST else "black")
        axes.set_xticks(range(len(steps)), steps, fontsize=8)
        axes.set_yticks(range(len(rates)), [short(rate) for rate in rates], fontsize=8)
        axes.set_title(config.variant, fontsize=11)
    for axes in list(panels):
        axes.set_axis_off()
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="against the base")
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("rate", fontsize=10)
    save(figure, path)


def ranking(results: Results, configs: list[Config], path: Path) -> None:
    """Each configuration's score against the base at its best, with its interval over seeds."""
    figure = Figure(figsize=(8, 0.34 * len(configs) + 1), layout="constrained")
    axes = figure.subplots()
    for place, config in enumerate(reversed(configs)):
        gains = results.gains(config, results.best(config, SHORT))
        value = interval(gains)
        half = 0 if np.isnan(value.low) else value.mean - value.low
        axes.errorbar(value.mean, place, xerr=half, fmt="o", color=COLOURS[config.variant], capsize=3)
        axes.plot(gains, [place] * len(gains), "|", color=COLOURS[config.variant], alpha=0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(configs)), [f"{config.method}, {config.variant}" if config.variant in CORE else config.variant
                                          for config in reversed(configs)])
    axes.set_xlabel("oracle's score against the base's (95% interval over seeds)")
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def drawings(results: Results, plain: Config, path: Path, shown: int = 12) -> None:
    """The last drawings of each rate, plain above safeguarded: the same captions from the same noise, seed SEED."""
    configs, rates = core_of(results, plain)
    size = 0.72 * min(shown, results.settings.captions) + 2.2, 0.82 * len(rates) * len(configs)
    figure = Figure(figsize=size, layout="constrained")
    lines = figure.subplots(len(rates) * len(configs), 1, squeeze=False)[:, 0]
    for axes, (rate, config) in zip(lines, ((rate, config) for rate in rates for config in configs)):
        points = results.points(config, rate, SEED)
        images = np.load(record_path(Run(config, rate, SEED), results.settings).with_suffix(".npz"))
        last = images[images.files[-1]][:shown]
        axes.imshow(np.concatenate(last, axis=1), interpolation="nearest")
        axes.set_xticks([]), axes.set_yticks([])
        axes.set_ylabel(f"{config.variant}\nrate {short(rate)}\n{score(list(points.values())[-1]):.3f}", rotation=0,
                        ha="right", va="center", fontsize=8, color=COLOURS[config.variant])
        for side in axes.spines.values():
            side.set_color(COLOURS[config.variant]), side.set_linewidth(2)
    save(figure, path)
