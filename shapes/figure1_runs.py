"""The runs of shapes/figure1.py, and its picture and table."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from common.files import whole_file, write_text
from shapes.experiment import (cache_pairs, do_all, draw_and_judge, keep_settings, mean_score, run_options, table,
                               train_here, worker_pool)
from shapes.mixture import sample_captions
from shapes.pairs import write_pairs
from shapes.pipeline import base_pipeline, open_base

SHOWN = 6  # captions of the picture
POINTS = 5  # steps at which a run is drawn and judged
SMOOTHED = 25  # steps
VARIANTS = {"plain": "#c0392b", "safeguarded": "#2471a3"}
SCALARS = {"winner": "avg_win_diff_loss", "loser": "avg_lose_diff_loss", "reference": "ref_mse_unaccumulated",
           "margin": "margin_mean", "lambda": "avg_lose_l_scale"}
TITLES = {"plain": "plain Diffusion-DPO", "safeguarded": "with the safeguard"}


def options_of(settings, **more):
    return run_options(base=settings.base, pretrained_model_name_or_path=base_pipeline(kind=settings.base), lora_rank=0,
                       cached_dataset=Path(settings.output, "cache"), **more)


def run(variant: str, settings) -> dict:
    """One run's curves, and what the oracle says of its drawings at POINTS steps; those go to runs/VARIANT_STEP.npy."""
    safeguard = {"use_winner_preserving": True, "winner_preserving_mu": settings.mu} if variant == "safeguarded" else {}
    beta = {} if settings.beta is None else {"beta_dpo": settings.beta}
    options = options_of(settings, train_batch_size=settings.batch_size, max_train_steps=settings.steps, seed=settings.seed,
                         learning_rate=settings.learning_rate, lr_warmup_steps=20, **safeguard, **beta)
    record: dict[str, Any] = {name: [] for name in SCALARS} | {"oracle": {}}
    prompts, pipeline = sample_captions(random.Random("figure 1"), settings.captions, unseen=True), open_base(settings.base)
    drawn_at = {round(settings.steps * point / (POINTS - 1)) for point in range(POINTS)}

    def watch(step: int, network: nn.Module, scalars: dict[str, float]) -> None:
        if scalars:
            for name, scalar in SCALARS.items():
                record[name].append(scalars[scalar])
        if step in drawn_at:
            images, judgements = draw_and_judge(network, pipeline, prompts, 10_000_000, 20)
            np.save(Path(settings.output, "runs", f"{variant}_{step}.npy"), images)
            record["oracle"][str(step)] = mean_score(judgements)

    train_here(options, watch)
    return record


def make_figure(settings) -> None:
    """Do what is missing, then figure1.png and figure1.md."""
    output = Path(settings.output)
    keep_settings(settings)
    if not (output / "cache" / "manifest.json").is_file():
        folder = write_pairs(output / "pairs", settings.pairs, seed=1, resolution=32)
        cache_pairs(options_of(settings, train_data_dir=folder))
    with worker_pool(settings.workers) as pool:
        do_all(pool, [(output / "runs" / f"{variant}.json", run, (variant, settings)) for variant in VARIANTS], "figure 1")
    records = {variant: json.loads((output / "runs" / f"{variant}.json").read_text()) for variant in VARIANTS}
    draw(records, settings, output / "figure1.png")
    text = table_of(records)
    write_text(output / "figure1.md", text + "\n")
    print(f"{text}\n\nwrote {output / 'figure1.png'}")


def table_of(records: dict[str, dict]) -> str:
    rows = []
    for variant, record in records.items():
        last = {name: np.mean(record[name][-SMOOTHED:]) for name in SCALARS}
        errors = [f"{last[name]:+.4f} ({last[name] / last['reference']:+.0%})" for name in ("winner", "loser")]
        rows.append([TITLES[variant], *errors, f"{last['margin']:+.2f}", *(f"{score:.3f}" for score in record["oracle"].values())])
    steps = [f"oracle, step {step}" for step in records["plain"]["oracle"]]
    return table(["", "winner's error", "loser's error", "margin", *steps], rows)


def draw(records: dict[str, dict], settings, path: Path) -> None:
    """Two panels of errors on one scale, and under them the drawings: a row per variant, a block of captions per step."""
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.45))
    panels = upper.subplots(1, 2, sharey=True)
    for axes, (variant, record) in zip(panels, records.items()):
        for name, style in (("loser", "--"), ("winner", "-")):
            change = 100 * np.array(record[name]) / np.mean(record["reference"])
            mean = np.convolve(change, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
            axes.plot(np.arange(len(mean)) + SMOOTHED, mean, style, color=VARIANTS[variant], linewidth=2.2,
                      label=f"{name}'s error")
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
            lines = [np.concatenate(images[k:k + 3], axis=1) for k in range(0, SHOWN, 3)]
            axes.imshow(np.concatenate(lines), interpolation="nearest")
            axes.set_xticks([]), axes.set_yticks([])
            score = records[variant]["oracle"][step]
            axes.set_title((f"step {step}\n" if row == 0 else "") + f"oracle {score:.2f}", fontsize=11)
            for side in axes.spines.values():
                side.set_color(VARIANTS[variant]), side.set_linewidth(2.5)
        places[row, 0].set_ylabel(TITLES[variant].replace("Diffusion-", ""), fontsize=12, color=VARIANTS[variant])
    with whole_file(path) as aside:
        figure.savefig(aside, format="png", dpi=100)
