"""Compare two models or more: means, pairwise win rates and Bradley-Terry strengths for every metric, and a page to look at.

    python -m eval.leaderboard --manifests A.json B.json C.json --labels SDPO Diffusion-DPO SD1.5

A model may have several manifests, one per prompt group: give its label with each. Images are compared within a prompt,
repeated ones in order. Within a prompt group all must be made with the same settings, as for eval.compare. Kept scores are
reused. Writes OUTPUT/leaderboard.json and leaderboard.html.
"""

import os
import sys
import urllib.parse
from collections import Counter
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from common.errors import UserError, quiet_libraries, run_program
from common.files import make_folder, write_json
from common.options import option, parse
from common.votes import Ballot, read_votes
from eval.bradley_terry import fit_with_intervals
from eval.comparable import check_comparable, describe_model
from eval.manifest import model_names, read_manifest
from eval.metrics import METRICS, is_untrained, read_config
from eval.options import ALLOW_DIFFERENT, ScoringOptions
from eval.score import report_failures, table
from eval.scores import ScoredImage, ScoredManifest, group_name
from eval.statistics import mean_interval

INLINE_IMAGES = 300
ALL, HUMAN = "all metrics", "Human"  # the boards beside the metrics' own


@dataclass
class LeaderboardOptions:
    title = "what is compared"

    manifests: list[str] = option(MISSING, "generation manifests (JSON)")
    labels: list[str] | None = option(None, "the models' names, one per manifest", default_text="the manifests' folders")
    votes: list[str] | None = option(None, "votes.json of eval.judge's pages, of one judge or several: a board of its own")
    allow_different_settings: bool = option(False, ALLOW_DIFFERENT)
    output: str = option("output/leaderboard", "folder of the results")
    images: Literal["auto", "inline", "beside"] = option(
        "auto", f"inside the page, in report_images/ beside it, or by number: inside up to {INLINE_IMAGES} images")


@dataclass
class Row:
    """What the models made of one prompt (of its image number `number`, where it has several)."""

    group: str
    prompt: str
    number: int
    images: dict[str, ScoredImage]  # by model


def check_groups(manifests: list[str], models: list[str], allowed: bool) -> tuple[list[dict], list[str]]:
    """check_comparable() of every manifest with the first of its prompt group; a difference names its models, too."""
    first: dict[str, tuple[dict, str]] = {}
    differences, notes = [], []
    for manifest, model in zip(manifests, models):
        made = describe_model(manifest, read_manifest(manifest))
        other, other_model = first.setdefault(group_name(Path(manifest)), (made, model))
        if made is not other:
            found, remarks = check_comparable(other, made, (other_model, model), allowed)
            differences += [{"model_a": other_model, "model_b": model, **of} for of in found]
            notes += remarks
    return differences, list(dict.fromkeys(notes))


def rows_of(manifests: list[ScoredManifest], models: list[str]) -> list[Row]:
    rows: dict[tuple, Row] = {}
    seen: Counter = Counter()
    for manifest, model in zip(manifests, models):
        for image in manifest.images:
            key = manifest.group, image.prompt, seen[model, manifest.group, image.prompt]
            seen[model, manifest.group, image.prompt] += 1
            if not image.fault:
                rows.setdefault(key, Row(*key, {})).images[model] = image
    return list(rows.values())


def metric_wins(rows: list[Row], models: list[str], metric: str) -> np.ndarray:
    """(rows, M, M): 1 where the row's model beats the column's, 0.5 for a tie, 0 where it loses or one made no image."""
    scores = np.array([[row.images[model].scores[metric] if model in row.images else np.nan for model in models]
                       for row in rows])
    mine, theirs = scores[:, :, None], scores[:, None, :]
    return ((mine > theirs) + 0.5 * (mine == theirs)) * (1 - np.eye(len(models)))


def human_wins(rows: list[Row], models: list[str], ballots: list[Ballot]) -> np.ndarray:
    """The same of people's votes, each counted once. Raises UserError where no vote is of these images."""
    from eval.human import match_votes
    found = match_votes(ballots, [image for row in rows for image in row.images.values()])
    wins = np.zeros((len(rows), len(models), len(models)))
    for row, of_row in zip(rows, wins):
        made = [(models.index(model), image.sha256) for model, image in row.images.items()]
        for i, first in made:
            for j, second in made:
                for choice in found.get((row.prompt, first, second), {}).values():
                    of_row[i, j] += {"left": 1, "right": 0}.get(choice, 0.5)
                    of_row[j, i] += {"left": 0, "right": 1}.get(choice, 0.5)
    if not wins.any():
        raise UserError("the votes are of these images, but not of two models' for one prompt")
    return wins


def board(rows: list[Row], models: list[str], wins: np.ndarray) -> dict:
    """Win rates and strengths of (rows, M, M) wins; prompts are the units that are resampled. None is the strength of a model
    without a comparison, and the interval where fit_with_intervals has none."""
    places = {key: place for place, key in enumerate(dict.fromkeys((row.group, row.prompt) for row in rows))}
    by_prompt = np.zeros((len(places), len(models), len(models)))
    np.add.at(by_prompt, [places[row.group, row.prompt] for row in rows], wins)
    total = by_prompt.sum(0)
    games = total + total.T
    strengths, intervals = fit_with_intervals(by_prompt[by_prompt.any((1, 2))])
    return {"win_rates": [[total[i, j] / games[i, j] if games[i, j] else None for j in range(len(models))]
                          for i in range(len(models))],
            "compared": games.tolist(),
            "strengths": [None if np.isnan(strength) else strength for strength in strengths.tolist()],
            "intervals": intervals if intervals is None else [None if np.isnan(low) else [low, high]
                                                              for low, high in intervals.tolist()]}


def group_means(rows: list[Row], models: list[str], metrics: list[str]) -> dict:
    """group -> metric -> for each model its mean, its interval and its number of images; None where it has none."""
    def mean(group: str, metric: str, model: str) -> dict | None:
        mine = [row for row in rows if row.group == group and model in row.images]
        if not mine:
            return None
        scores = np.array([row.images[model].scores[metric] for row in mine])
        interval = mean_interval(scores, [row.prompt for row in mine])
        return {"mean": float(scores.mean()), "ci95": interval, "images": len(mine)}

    return {group: {metric: [mean(group, metric, model) for model in models] for metric in metrics}
            for group in dict.fromkeys(row.group for row in rows)}


def make_leaderboard(rows: list[Row], models: list[str], metrics: list[str], ballots: list[Ballot],
                     untrained: list[str] | None = None) -> dict:
    """leaderboard.json, the strongest model first: by all metrics, each counted the same. untrained: those whose models
    learned nothing; their boards come last, without intervals, and count for nothing. Raises UserError where no two models
    made an image of one prompt."""
    untrained = untrained or []
    metrics = sorted(metrics, key=untrained.__contains__)
    trained = [metric for metric in metrics if metric not in untrained]
    wins = {metric: metric_wins(rows, models, metric) for metric in metrics}
    if not any(of_metric.any() for of_metric in wins.values()):
        raise UserError("no two models have a prompt in common: give manifests of the same prompt groups")
    shown = {ALL: sum(wins[metric] for metric in trained)} if len(trained) > 1 else {}
    shown |= {metric: wins[metric] for metric in trained}
    if ballots:
        shown[HUMAN] = human_wins(rows, models, ballots)
    boards = {name: board(rows, models, of_board) for name, of_board in shown.items()}
    boards |= {metric: board(rows, models, wins[metric]) | {"intervals": None} for metric in untrained}
    order = list(range(len(models)))
    if shown:
        order = np.argsort(-np.array(next(iter(boards.values()))["strengths"], dtype=float), kind="stable").tolist()
    models = [models[place] for place in order]
    for of_board in boards.values():
        for name in ("win_rates", "compared"):
            of_board[name] = [[of_board[name][i][j] for j in order] for i in order]
        for name in ("strengths", "intervals"):
            of_board[name] = of_board[name] and [of_board[name][i] for i in order]
    return {"models": models, "means": group_means(rows, models, metrics), "boards": boards, "untrained": untrained,
            "intervals": {"method": "percentile bootstrap over prompts", "level": 0.95},
            "strengths": "Bradley-Terry log strengths, mean 0: a difference of 0.69 is odds of two to one"}


def labels_of(result: dict) -> dict[str, str]:
    """What the boards and metrics are called."""
    names = dict.fromkeys([*result["boards"], *(name for means in result["means"].values() for name in means)])
    return {name: (METRICS[name].label if name in METRICS else name) + " (untrained)" * (name in result["untrained"])
            for name in names}


def board_notes(boards: dict[str, dict]) -> list[str]:
    """What a strength or an interval that is missing means, where one is."""
    notes = {"-: compared with no model": any(None in board["strengths"] for board in boards.values()),
             "no interval: it won or lost everything, or all prompts agree":
                 any(interval is None and strength is not None for board in boards.values() if board["intervals"]
                     for interval, strength in zip(board["intervals"], board["strengths"]))}
    return [note for note, needed in notes.items() if needed]


def board_lines(result: dict) -> list[str]:
    """The tables that the program prints."""
    models, boards, labels, lines = result["models"], result["boards"], labels_of(result), []

    def spread(value: float | None, interval: list[float] | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")

    for group, means in result["means"].items():
        lines += ["", f"{group}: mean score (95% interval)"]
        lines += table([("Model", *map(labels.get, means)),
                        *((model, *(spread(of_metric[i]["mean"], of_metric[i]["ci95"], ".4f") if of_metric[i] else "-"
                                    for of_metric in means.values())) for i, model in enumerate(models))])
    lines += ["", "Bradley-Terry strength (95% interval)"]
    lines += table([("Model", *map(labels.get, boards)), *(
        (model, *(spread(one["strengths"][i], one["intervals"] and one["intervals"][i], "+.2f") for one in boards.values()))
        for i, model in enumerate(models))])
    lines += board_notes(boards)
    name, first = next(iter(boards.items()))
    if name in result["untrained"]:
        return [*lines, "", "no metric is trained: these numbers say nothing of the models"]
    lines += ["", f"Win rate of the row over the column, {labels[name]}"]
    lines += table([("", *models), *((model, *("-" if rate is None else f"{rate:.1%}" for rate in rates))
                                     for model, rates in zip(models, first["win_rates"]))])
    return lines


def write_leaderboard(folder: Path, result: dict, rows: list[Row], images: str) -> Path:
    """leaderboard.html with a gallery of all models' images."""
    from eval.pages import place_images, write_page
    models, metrics = result["models"], list(next(iter(result["means"].values())))
    shown = [(row, model) for row in rows for model in models if model in row.images]
    paths = [str(row.images[model].path.absolute()) for row, model in shown]
    inline = images == "inline" or (images == "auto" and len(paths) <= INLINE_IMAGES)
    gallery = [{"prompt": row.prompt, "group": row.group, "images": [None] * len(models)} for row in rows]
    places = {id(row): place for place, row in enumerate(rows)}
    for (row, model), path, thumb in zip(shown, paths, place_images(folder, paths, inline)):
        gallery[places[id(row)]]["images"][models.index(model)] = {
            "thumb": thumb, "full": urllib.parse.quote(Path(os.path.relpath(path, folder)).as_posix()),
            "scores": row.images[model].scores}
    labels = labels_of(result)
    prompts = len({(row.group, row.prompt) for row in rows})
    return write_page(folder / "leaderboard.html", "leaderboard.html.j2", result=result, labels=labels, prompts=prompts,
                      notes=board_notes(result["boards"]),
                      data={"models": models, "boards": list(result["boards"].items()), "labels": labels,
                            "metrics": metrics, "untrained": result["untrained"], "rows": gallery})


def main(argv: list[str] | None = None) -> int:
    [options, scoring], _ = parse([LeaderboardOptions, ScoringOptions], argv, program="python -m eval.leaderboard",
                                  description=__doc__)
    names = model_names(options.manifests, options.labels)
    models = list(dict.fromkeys(names))
    if len(models) < 2:
        raise UserError("a leaderboard needs two models or more: name more --manifests, with a label each")
    differences, notes = check_groups(options.manifests, names, options.allow_different_settings)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    config = read_config(scoring.metrics_config)
    ballots = read_votes(options.votes) if options.votes else []
    folder = Path(options.output)
    make_folder(folder, "--output")
    quiet_libraries()
    from eval.scoring import score_manifests
    manifests, failures = score_manifests(options.manifests, scoring)
    metrics = [metric for metric in scoring.metrics if metric not in failures]
    if not metrics:
        return report_failures(failures)
    rows = rows_of(manifests, names)
    result = make_leaderboard(rows, models, metrics, ballots, [metric for metric in metrics if is_untrained(metric, config)])
    result |= {"not_scored": failures, "different_settings": differences, "notes": notes}
    write_json(folder / "leaderboard.json", result)
    print("\n".join(board_lines(result)) + "\n")
    print(f"wrote {folder}/leaderboard.json\nwrote {write_leaderboard(folder, result, rows, options.images)}")
    return report_failures(failures)


if __name__ == "__main__":
    run_program(main)
