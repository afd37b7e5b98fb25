"""What the runs of shapes/claims.py say: claims.md, claims.html and plots, from OUTPUT/runs/*.json.

Intervals are 95% t-intervals over seeds (prompts, their noise and the held-out pairs are the same for all runs, so
differences are paired by seed); with one seed there is none, and every claim stays undecided.
"""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from shapes.claims_options import METHODS, VARIANTS  # noqa: E402

WINNER_TOLERANCE = 0.01  # of the reference's winner error: a smaller rise is none
QUALITY_TOLERANCE = 0.01  # of the oracle's score, in [0, 1]: a smaller difference does not matter
OVERHEAD_TOLERANCE = 0.05
COLOURS = {"base": "black", "plain": "#c0392b", "safeguarded": "#2471a3", "lambda 0": "#7d8f2d",
           "fixed lambda": "#d68910", "winner only": "#7d3c98"}


@dataclass
class Section:
    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    images: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def show(self, digits: int = 3, sign: bool = False) -> str:
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if np.isnan(self.low) else f"{mean} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def interval(values) -> Interval:
    """Mean and 95% t-interval; (mean, nan, nan) of a single value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(values.mean(), np.nan, np.nan)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(values.mean(), values.mean() - half, values.mean() + half)


def verdict(value: Interval, at_least: float, refuted_below: float | None = None) -> str:
    """confirmed where the whole interval lies above `at_least`; refuted where it lies below `refuted_below` (by
    default the same bound); else undecided, as with a single seed."""
    if value.low > at_least:
        return "confirmed"
    return "refuted" if value.high < (at_least if refuted_below is None else refuted_below) else "undecided"


def win_rate(scores, others) -> float:
    """Share of prompts on which the first images score higher than the second; ties count one half."""
    difference = np.subtract(scores, others)
    return float(np.mean(np.where(np.abs(difference) < 1e-6, 0.5, difference > 0)))


class Results:
    """The final runs by (method, variant) at the own or the common learning rate."""

    def __init__(self, settings, rates):
        self.runs, self.rates, self.seeds = Path(settings.output, "runs"), rates, range(settings.seeds)
        self.base = json.loads((self.runs / "base.json").read_text())["test"]
        self._records = {}

    def rate(self, method, variant, which):
        return self.rates["common"].get(method, self.rates["own"][method, variant]) if which == "common" \
            else self.rates["own"][method, variant]

    def rates_differ(self, method) -> bool:
        """Whether any of the method's configurations has another best rate than the method's common one."""
        return any(own != self.rates["common"][method] for (name, _), own in self.rates["own"].items() if name == method)

    def record(self, method, variant, which, seed):
        name = f"{method}_{variant}_lr{self.rate(method, variant, which):g}_seed{seed}".replace(" ", "-")
        if name not in self._records:
            self._records[name] = json.loads((self.runs / f"{name}.json").read_text())
        return self._records[name]

    def over_seeds(self, method, variant, which, value) -> np.ndarray:
        return np.array([value(self.record(method, variant, which, seed)) for seed in self.seeds])

    def images(self, method, variant, which):
        name = f"{method}_{variant}_lr{self.rate(method, variant, which):g}_seed0".replace(" ", "-")
        return np.load(self.runs / f"{name}_test.npy")


def quality(record):
    return np.mean(record["test"]["score"])


def winner_rise(record):
    """The winner's error against the reference's, at the end."""
    return record["curve"][-1]["winner"] - record["curve"][-1]["ref_winner"]


def loser_rise(record):
    return record["curve"][-1]["loser"] - record["curve"][-1]["ref_loser"]


def write_report(settings, rates, instruments: list[Path], minutes: float) -> None:
    """claims.md, claims.html and images/ in the settings' output folder."""

    output = Path(settings.output)
    (output / "images").mkdir(parents=True, exist_ok=True)
    results = Results(settings, rates)
    sections = [
        _verdicts(results, METHODS),
        *[_runs(results, METHODS, VARIANTS, which) for which in ("common", "own")
          if which == "common" or any(results.rates_differ(method) for method in METHODS)],
        _selection(settings, rates),
        _instruments(instruments),
    ]
    plot_errors(results, METHODS, VARIANTS, output / "images/claims_errors.png")
    plot_quality(results, METHODS, VARIANTS, output / "images/claims_quality.png")
    plot_grid(results, METHODS, settings, output / "images/claims_grid.png")
    base, reference = results.base, results.record("diffusion-dpo", "plain", "common", 0)["curve"][-1]["ref_winner"]
    introduction = (
        f"{settings.seeds} seed{'s' * (settings.seeds > 1)}, {settings.steps} steps of {settings.batch_size} pairs "
        f"from {settings.train_pairs}, AdamW, published beta, alpha and mu. Errors on {settings.held_out_pairs} held-out "
        f"pairs (the reference's winner error is {reference:.4f}), oracle quality on {settings.test_prompts} prompts that the base was never trained on, "
        f"{settings.inference_steps} DDIM steps. The base: oracle score {np.mean(base['score']):.3f}, all attributes "
        f"right in {np.mean(base['all_right']):.1%}, cleanliness {np.mean(base['cleanliness']):.3f}. "
        f"Brackets are 95% t-intervals over seeds. {minutes:.0f} minutes with {settings.workers} workers.")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    (output / "claims.md").write_text(environment.from_string(MARKDOWN).render(
        introduction=introduction, sections=sections))
    inline = {image: base64.b64encode((output / image).read_bytes()).decode()
              for section in sections for image in section.images}
    environment.autoescape = True
    (output / "claims.html").write_text(environment.from_string(HTML).render(
        introduction=introduction, sections=sections, inline=inline))
    print(f"{output / 'claims.md'}, {output / 'claims.html'} and plots in {output / 'images'}")


def _verdicts(results, methods):
    rows = []
    for which in ("common", "own"):
        for method in methods:
            if which == "own" and not results.rates_differ(method):
                continue

            def over(variant, value):
                return results.over_seeds(method, variant, which, value)

            reference = results.record(method, "plain", which, 0)["curve"][-1]["ref_winner"]
            rise = interval(over("plain", winner_rise))
            kept = interval(over("safeguarded", winner_rise))
            against_plain = interval(over("safeguarded", quality) - over("plain", quality))
            against_base = interval(over("safeguarded", quality) - np.mean(results.base["score"]))
            against_fixed = interval(over("safeguarded", quality) - over("fixed lambda", quality))
            where = [method, which if results.rates_differ(method) else "common and own"]
            rows += [
                ["plain raises the winner's error", *where, rise.show(4, sign=True), verdict(rise, 0)],
                ["the safeguard keeps it from rising", *where, kept.show(4, sign=True),
                 verdict(_negative(kept), -WINNER_TOLERANCE * reference)],
                ["quality at least plain's", *where, against_plain.show(3, sign=True),
                 verdict(against_plain, -QUALITY_TOLERANCE)],
                ["quality at least the base's", *where, against_base.show(3, sign=True),
                 verdict(against_base, -QUALITY_TOLERANCE)],
                ["ours: the adaptive lambda beats a fixed one", *where, against_fixed.show(3, sign=True),
                 verdict(against_fixed, 0, refuted_below=QUALITY_TOLERANCE)],
            ]
    seconds = json.loads((results.runs / "overhead.json").read_text())
    ratio = stats.bootstrap((seconds["safeguarded"], seconds["plain"]), lambda a, b: np.median(a) / np.median(b),
                            vectorized=False, paired=True, rng=0, method="percentile").confidence_interval
    overhead = Interval(np.median(seconds["safeguarded"]) / np.median(seconds["plain"]) - 1, ratio.low - 1, ratio.high - 1)
    rows.append(["overhead is negligible", "diffusion-dpo", "-", overhead.show(3, sign=True),
                 verdict(_negative(overhead), -OVERHEAD_TOLERANCE)])
    claims = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: claims.index(row[0]))
    text = (
        "Tests. Winner's error: its change against the reference on held-out pairs; plain raises it where the interval "
        f"lies above 0; the safeguard keeps it where the interval lies below {WINNER_TOLERANCE:.0%} of the reference's "
        "error. Quality: the difference of mean oracle scores (safeguarded minus plain, base or fixed lambda); at least "
        f"as good where the interval lies above -{QUALITY_TOLERANCE}; the adaptive lambda beats the fixed 1 - mu where it "
        f"lies above 0, and does not where it lies below {QUALITY_TOLERANCE}. Overhead: the share of processor time that "
        f"the safeguard adds to a training step, bootstrapped; negligible below {OVERHEAD_TOLERANCE:.0%}. Refuted is an "
        "interval wholly on the other side of its bound, undecided one that holds it.")
    return Section("Claims", text, ["claim", "method", "learning rate", "measured", "verdict"], rows,
                   ["images/claims_grid.png"])


def _runs(results, methods, variants, which):
    rows = []
    for method, variant in [(m, v) for m in methods for v in variants] + [("sft", "winner only")]:
        def over(value):
            return interval(results.over_seeds(method, variant, which, value))

        def against(other):
            return over(lambda record: win_rate(record["test"]["score"], other(record["seed"])))

        plain = "-"
        if variant not in ("plain", "winner only"):
            plain = against(lambda seed: results.record(method, "plain", which, seed)["test"]["score"]).show(2)
        last = [over(lambda record, key=key: record["curve"][-1][key]).mean for key in ("margin", "implicit_accuracy")]
        preference = method != "sft"
        rows.append([method, variant, f"{results.rate(method, variant, which):g}",
                     over(winner_rise).show(4, sign=True), over(loser_rise).show(4, sign=True),
                     f"{last[0]:.3g}" if preference else "-", f"{last[1]:.2f}" if preference else "-",
                     f"{over(lambda record: np.mean(record['winner_scale'])).mean:.2f}" if preference else "-",
                     over(quality).show(3), f"{over(lambda r: np.mean(r['test']['all_right'])).mean:.2f}",
                     against(lambda seed: results.base["score"]).show(2), plain])
    text = ("At each method's common learning rate (winner only: at its own)." if which == "common" else
            "Each configuration at its own best learning rate.")
    if not any(results.rates_differ(name) for name in methods):
        text += " Every configuration's own best rate is its method's common one."
    return Section(f"Runs at the {which} learning rate", text + " Changes of error are against the reference, on held-out "
                   "pairs, at the end; win rates are of oracle scores, image by image from the same noise.",
                   ["method", "variant", "rate", "winner's error", "loser's error", "margin", "implicit acc.", "lambda",
                    "oracle score", "all right", "wins against base", "against plain"], rows,
                   ["images/claims_errors.png", "images/claims_quality.png"] if which == "common" else [])


def _selection(settings, rates):
    rows = []
    for method, variant in rates["own"]:
        scores = [rates["scores"][method, variant, rate] for rate in settings.learning_rates]
        rows.append([method, variant, *[f"{score:.3f}" for score in scores], f"{rates['own'][method, variant]:g}",
                     f"{rates['common'][method]:g}" if method in rates["common"] else "-"])
    base = f"{np.mean(json.loads(Path(settings.output, 'runs', 'base.json').read_text())['selection']['score']):.3f}"
    rows.append(["base", "-", *[base] * len(settings.learning_rates), "-", "-"])
    return Section("Choice of learning rates", "Mean oracle score on the selection prompts (one seed, none of the final "
                   "ones); the highest is the configuration's own rate, the highest mean over a method's rows its common "
                   "rate.", ["method", "variant", *[f"{rate:g}" for rate in settings.learning_rates], "own", "common"],
                   rows)


def _instruments(paths):
    records = [json.loads(path.read_text()) for path in paths]
    rows = []
    for record in records:
        rises = np.array(record["rises"])
        share = stats.binomtest(int((rises > 0).sum()), len(rises)).proportion_ci(method="wilson")
        rows.append([record["optimizer"], f"{record['learning_rate']:g}", record["kind"],
                     "-" if record["kind"] == "none" else f"{record['mu']:g}", f"{np.mean(record['winner_scale']):.2f}",
                     f"{np.mean(rises > 0):.2f} [{share.low:.2f}, {share.high:.2f}]", f"{rises.mean():+.2e}",
                     f"{1000 * np.median(record['seconds']):.0f}"])
    return Section("How good is the output-space lambda?", "Diffusion-DPO: the share of steps after which the same batch's "
                   "mean winner error (same noise and timesteps) had risen, under each kind of lambda; intervals are "
                   "Wilson's over steps. The parameter-space lambda takes two backward passes. Time: median processor "
                   "milliseconds of a step, without the reference's forward pass.",
                   ["optimizer", "rate", "lambda from", "mu", "mean lambda", "share of steps that raised it",
                    "mean change", "ms"], rows)


def plot_errors(results, methods, variants, path):
    """Winner and loser error against the reference over training, at the common rate: the paper's figure 1."""
    figure, axes = plt.subplots(2, len(methods), figsize=(4.2 * len(methods), 6), sharex=True, squeeze=False)
    for column, method in enumerate(methods):
        for row, member in enumerate(("winner", "loser")):
            axis = axes[row][column]
            for variant in variants:
                curves = results.over_seeds(method, variant, "common", lambda record: [
                    point[member] - point[f"ref_{member}"] for point in record["curve"]])
                steps = [point["step"] for point in results.record(method, variant, "common", 0)["curve"]]
                axis.plot(steps, curves.mean(axis=0), color=COLOURS[variant], label=variant)
                axis.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=COLOURS[variant], alpha=0.15)
            axis.axhline(0, color="black", linewidth=0.6)
            axis.set_title(f"{method}, rate {results.rate(method, variants[0], 'common'):g}" if row == 0 else "")
            axis.set_ylabel(f"{member}'s error - reference's" if column == 0 else "")
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes[1][column].set_xlabel("step")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_quality(results, methods, variants, path):
    """Oracle score of every configuration with its interval, at the common rate and, where they differ, at its own."""
    figure, axis = plt.subplots(figsize=(10, 4))
    names = [(method, variant) for method in methods for variant in variants] + [("sft", "winner only")]
    both = any(results.rates_differ(method) for method in methods)
    for offset, which, marker in ((-0.12, "common", "o"), (0.12, "own", "s"))[:1 + both]:
        for place, (method, variant) in enumerate(names):
            value = interval(results.over_seeds(method, variant, which, quality))
            half = 0 if np.isnan(value.low) else value.mean - value.low
            axis.errorbar(place + offset, value.mean, half, fmt=marker, color=COLOURS[variant], capsize=3,
                          label=f"{which} rate" if place == 0 else None)
    axis.axhline(np.mean(results.base["score"]), color="black", linewidth=0.8, label="base")
    axis.set_xticks(range(len(names)), [f"{method}\n{variant}" for method, variant in names], rotation=60, fontsize=8)
    axis.set_ylabel("oracle score")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_grid(results, methods, settings, path, columns: int = 12):
    """Base, plain and safeguarded images of the same prompts from the same noise, at the common rate, seed 0."""
    rows = [("base", np.load(results.runs / "base_test.npy"))]
    for method in methods:
        rows += [(f"{method}\n{variant}", results.images(method, variant, "common"))
                 for variant in ("plain", "safeguarded")]
    prompts = json.loads(Path(settings.output, "prompts.json").read_text())["test"]
    columns = min(columns, len(prompts))
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.25 * columns, 1.25 * len(rows) + 0.9), squeeze=False)
    for line, (name, images) in zip(axes, rows):
        for column, axis in enumerate(line):
            axis.imshow(images[column], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for column in range(columns):
        words = prompts[column].replace(" background", "").split()
        axes[0][column].set_title("\n".join(" ".join(words[i:i + 3]) for i in range(0, len(words), 3)), fontsize=6)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _negative(value: Interval) -> Interval:
    return Interval(-value.mean, -value.high, -value.low)


MARKDOWN = """\
# The published claims on the shapes world

{{ introduction }}
{% for section in sections %}

## {{ section.title }}

{{ section.text }}

| {{ section.header | join(" | ") }} |
|{{ " --- |" * section.header | length }}
{% for row in section.rows %}
| {{ row | join(" | ") }} |
{% endfor %}
{% for image in section.images %}

![{{ section.title }}]({{ image }})
{% endfor %}
{% endfor %}
"""

HTML = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>The published claims on the shapes world</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem; }
td, th { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; }
img { max-width: 100%; }
</style></head><body>
<h1>The published claims on the shapes world</h1>
<p>{{ introduction }}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.text }}</p>
<table><tr>{% for name in section.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in section.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% for image in section.images %}<img alt="{{ section.title }}" src="data:image/png;base64,{{ inline[image] }}">{% endfor %}
{% endfor %}
</body></html>
"""
