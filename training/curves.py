"""A run's own picture: errors against the reference, margin and accuracy, lambda, gradient norm and rate, over the steps.

    python -m training.curves RUN [RUN ...] [--output FILE.png]

draws several runs together, from their metrics.jsonl, into curves_compared.png of the first (one alone: its curves.png).
Every training run leaves OUTPUT_DIR/curves.png at its checkpoints and at its end.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from common.errors import UserError, run_program
from common.files import whole_file

SMOOTHED_OVER = 20  # parts of a run: a curve shows the mean over each and, faintly, every step
PANELS = [  # title; (scalar, how it is drawn, its name)
    ("winner's and loser's error\nagainst the reference",
     [("avg_win_diff_loss", "-", "winner"), ("avg_lose_diff_loss", "--", "loser")]),
    ("margin (logits)", [("margin_mean", "-", "mean"), ("margin_std", ":", "spread")]),
    ("implicit accuracy", [("implicit_acc_accumulated", "-", ""), ("accuracy", "-", "")]),
    ("lambda, the loser's share", [("avg_lose_l_scale", "-", "")]),
    ("share of SPO's pairs kept", [("spo/kept_share", "-", "")]),
    ("loss", [("train_loss", "-", "")]),
    ("gradient norm", [("grad_norm", "-", "")]),
    ("learning rate", [("lr", "-", "")]),
]


def draw_curves(runs: dict[str, list[dict]], output: Path) -> None:
    """Write a PNG of the runs' scalars, given by name as the lines of their metrics.jsonl; steps at which a run was
    warned of are marked."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels = [(title, [curve for curve in curves if any(curve[0] in line for lines in runs.values() for line in lines)])
              for title, curves in PANELS]
    panels = [(title, curves) for title, curves in panels if curves and not idle(curves, runs)]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.9 * rows), layout="constrained")
    for number, (title, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        if "error" in title:
            axes.axhline(0, color="black", linewidth=0.8)
        for colour, (name, lines) in enumerate(runs.items()):
            for scalar, style, part in curves:
                points = [(line["step"], line[scalar]) for line in lines if isinstance(line.get(scalar), (int, float))]
                if not points:
                    continue
                label = ", ".join(filter(None, [name if len(runs) > 1 else "", part]))
                shade = f"C{colour}" if len(runs) > 1 or style == "-" else "C1"
                axes.plot(*zip(*points), color=shade, alpha=0.2, linewidth=0.6)
                axes.plot(*zip(*smoothed(points)), style, color=shade, linewidth=1.6, label=label or None)
            warned = [line["step"] for line in lines if line.get("warnings")]
            colour, label = (f"C{colour}", f"{name}, warned of") if len(runs) > 1 else ("red", None)
            for step in warned:
                axes.axvline(step, color=colour, linewidth=0.8, alpha=0.6, label=label if step == warned[0] and number == 0 else None)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    figure.supxlabel(f"optimizer step ({'upright' if len(runs) > 1 else 'red'} lines: warnings)", fontsize=9)
    with whole_file(output) as aside:
        figure.savefig(aside, format="png", dpi=110)


def idle(curves: list[tuple[str, str, str]], runs: dict[str, list[dict]]) -> bool:
    """Whether there is nothing to see: lambda of runs without the safeguard."""
    return curves[0][0] == "avg_lose_l_scale" and all(line.get("avg_lose_l_scale", 1.0) == 1.0
                                                      for lines in runs.values() for line in lines)


def smoothed(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """The means of SMOOTHED_OVER parts, at their middles."""
    width = max(1, len(points) // SMOOTHED_OVER)
    parts = [points[start:start + width] for start in range(0, len(points), width)]
    return [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in parts]


def main() -> None:
    parser = ArgumentParser(prog="python -m training.curves", description="Draw the scalars of training runs together.")
    parser.add_argument("runs", nargs="+", help="output folders of train.py")
    parser.add_argument("--output", help="the picture (default: the first run's curves_compared.png, or curves.png of one alone)")
    options = parser.parse_args(sys.argv[1:])
    from training.records import read_metrics

    found = {}
    for folder in options.runs:
        name = Path(folder).name or str(folder)
        found[name if name not in found else str(folder)] = lines = read_metrics(Path(folder) / "metrics.jsonl")
        if not lines:
            raise UserError(f"no metrics.jsonl with steps in {folder}: name the output folder of a training run")
    output = Path(options.output or Path(options.runs[0], "curves_compared.png" if len(found) > 1 else "curves.png"))
    draw_curves(found, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_program(main)
