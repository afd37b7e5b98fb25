"""The runs of shapes/figure1.py, and its picture and table."""

import json
import random
from pathlib import Path

import matplotlib
import numpy as np
from torch import nn

from common.files import whole_file, write_text
from data.cache import CacheOptions, cache
from shapes.drawing import caption
from shapes.experiment import do_all, draw_with, keep_settings, reset_accelerate, run_options, train_here, worker_pool
from shapes.mixture import sample_drawing
from shapes.oracle import judge
from shapes.pairs import write_pairs
from shapes.pipeline import base_pipeline, open_base

matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402

SHOWN = 6  # captions of the picture
POINTS = 5  # steps at which a run is drawn and judged
SMOOTHED = 25  # steps
VARIANTS = {"plain": "#c0392b", "safeguarded": "#2471a3"}
TITLES = {"plain": "plain Diffusion-DPO", "safeguarded": "with the safeguard"}


def options_of(settings, **more):
    return run_options(base=settings.base, pretrained_model_name_or_path=base_pipeline(kind=settings.base), lora_rank=0,
                       cached_dataset=Path(settings.output, "cache"), **more)


def prompts_of(settings) -> list[str]:
    rng = random.Random("figure 1")
    return [caption(sample_drawing(rng, unseen=True)) for _ in range(settings.captions)]


def run(variant: str, settings) -> dict:
    """One run's curves, and what the oracle says of its drawings at POINTS steps; those go to runs/VARIANT_STEP.npy."""
    safeguard = {"use_winner_preserving": True, "winner_preserving_mu": settings.mu} if variant == "safeguarded" else {}
    beta = {} if settings.beta is None else {"beta_dpo": settings.beta}
    options = options_of(settings, train_batch_size=settings.batch_size, max_train_steps=settings.steps, seed=settings.seed,
                         learning_rate=settings.learning_rate, lr_warmup_steps=20, **safeguard, **beta)
    prompts, record = prompts_of(settings), {"winner": [], "loser": [], "reference": [], "margin": [], "lambda": [], "oracle": {}}
    pipeline = open_base(settings.base)
    drawn_at = {round(settings.steps * point / (POINTS - 1)) for point in range(POINTS)}

    def watch(step: int, network: nn.Module, scalars: dict[str, float]) -> None:
        if scalars:
            for name, scalar in (("winner", "avg_win_diff_loss"), ("loser", "avg_lose_diff_loss"),
                                 ("reference", "ref_mse_unaccumulated"), ("margin", "margin_mean"), ("lambda", "avg_lose_l_scale")):
                record[name].append(scalars[scalar])
        if step in drawn_at:
            images = draw_with(network, pipeline, prompts, 10_000_000, 20)
            np.save(Path(settings.output, "runs", f"{variant}_{step}.npy"), np.stack([np.asarray(image) for image in images]))
            record["oracle"][str(step)] = float(np.mean([judge(image, prompt).score for image, prompt in zip(images, prompts)]))

    train_here(options, watch)
    return record


def make_figure(settings) -> None:
    """Do what is missing, then figure1.png and figure1.md."""
    output = Path(settings.output)
    keep_settings(settings, sorted(vars(settings).keys() - {"output", "workers"}))
    if not (output / "cache" / "manifest.json").is_file():
        folder = write_pairs(output / "pairs", settings.pairs, seed=1, resolution=32)
        reset_accelerate()
        cache(options_of(settings, train_data_dir=folder), CacheOptions())
    with worker_pool(settings.workers) as pool:
        do_all(pool, [(output / "runs" / f"{variant}.json", run, (variant, settings)) for variant in VARIANTS], "figure 1")
    records = {variant: json.loads((output / "runs" / f"{variant}.json").read_text()) for variant in VARIANTS}
    draw(records, settings, output / "figure1.png")
    table = table_of(records, settings)
    write_text(output / "figure1.md", table + "\n")
    print(f"{table}\n\nwrote {output / 'figure1.png'}")


def table_of(records: dict[str, dict], settings) -> str:
    rows = [f"| | winner's error | loser's error | margin | {' | '.join(f'oracle, step {step}' for step in records['plain']['oracle'])} |",
            "|---|---|---|---" + "|---" * POINTS + "|"]
    for variant, record in records.items():
        winner, loser, reference, margin = (np.mean(record[name][-SMOOTHED:]) for name in ("winner", "loser", "reference", "margin"))
        scores = " | ".join(f"{score:.3f}" for score in record["oracle"].values())
        rows.append(f"| {TITLES[variant]} | {winner:+.4f} ({winner / reference:+.0%}) | {loser:+.4f} ({loser / reference:+.0%}) "
                    f"| {margin:+.2f} | {scores} |")
    return "\n".join(rows)


def draw(records: dict[str, dict], settings, path: Path) -> None:
    """Two panels of errors on one scale, and under them the drawings: one row per variant, one block of captions per step."""
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.45))
    panels = upper.subplots(1, 2, sharey=True)
    for axes, (variant, record) in zip(panels, records.items()):
        for name, style in (("loser", "--"), ("winner", "-")):
            change = 100 * np.array(record[name]) / np.mean(record["reference"])
            mean = np.convolve(change, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
            axes.plot(np.arange(len(mean)) + SMOOTHED, mean, style, color=VARIANTS[variant], linewidth=2.2, label=f"{name}'s error")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(TITLES[variant], fontsize=14, color=VARIANTS[variant])
        axes.set_xlabel("optimizer step")
        axes.legend(frameon=False, loc="upper left")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("% above the reference's error")
    steps = list(records["plain"]["oracle"])
    places = lower.subplots(2, POINTS)
    for row, variant in enumerate(records):
        for column, step in enumerate(steps):
            axes = places[row, column]
            images = np.load(Path(settings.output, "runs", f"{variant}_{step}.npy"))[:SHOWN]
            axes.imshow(np.concatenate([np.concatenate(images[k:k + 3], axis=1) for k in range(0, SHOWN, 3)]), interpolation="nearest")
            axes.set_xticks([]), axes.set_yticks([])
            score = records[variant]["oracle"][step]
            axes.set_title((f"step {step}\n" if row == 0 else "") + f"oracle {score:.2f}", fontsize=11)
            for side in axes.spines.values():
                side.set_color(VARIANTS[variant]), side.set_linewidth(2.5)
        places[row, 0].set_ylabel(TITLES[variant].replace("Diffusion-", ""), fontsize=12, color=VARIANTS[variant])
    with whole_file(path) as aside:
        figure.savefig(aside, format="png", dpi=100)
