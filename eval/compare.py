"""Compare two models prompt by prompt: win rates with confidence intervals for every metric, and a page to look at.

    python -m eval.compare --json_a A.json --json_b B.json --label_a "SDPO" --label_b "SD1.5"

Writes OUTDIR/{A}_vs_{B}_{MMDD-HHMMSS}/ with pair_METRIC.json, summary.json and report.html. Kept scores are reused.
"""

import re
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np

from common.errors import UserError, quiet_libraries, run_program
from common.files import make_folder, write_json
from common.options import parse
from common.votes import read_votes
from eval.comparable import check_comparable, describe_model
from eval.human import human_lines, human_row
from eval.manifest import read_manifest
from eval.metrics import METRICS, is_untrained, read_config
from eval.options import CompareOptions, ScoringOptions, check_compare_options
from eval.report import write_report
from eval.score import report_failures, table
from eval.scores import ScoredImage
from eval.statistics import RESAMPLES, count_wins, holm, outcome

EXTREMES = 10  # biggest wins and losses named for each metric


def pair_up(prompts_a: list[str], prompts_b: list[str], by: str) -> list[tuple[str, int, int]]:
    """(prompt, index in A, index in B) of each pair, sorted by prompt (or by index); repeated prompts pair up in order.

    Raises UserError when the two have no prompt in common.
    """
    if by == "index":
        return [(prompt, index, index) for index, (prompt, _) in enumerate(zip(prompts_a, prompts_b))]
    places_a, places_b = defaultdict(list), defaultdict(list)
    for places, prompts in ((places_a, prompts_a), (places_b, prompts_b)):
        for index, prompt in enumerate(prompts):
            places[prompt].append(index)
    pairs = [(prompt, *places) for prompt in sorted(places_a.keys() & places_b.keys())
             for places in zip(places_a[prompt], places_b[prompt])]
    if not pairs:
        raise UserError("the two manifests have no prompt in common: compare runs of the same prompt group, or pair "
                        "them by position with --pair_by index")
    return pairs


def compare_metric(metric: str, pairs: list[tuple[str, ScoredImage, ScoredImage]], label_a: str, label_b: str,
                   ties_policy: str) -> tuple[dict, dict]:
    """The pair file's content and the summary's row of one metric."""
    prompts = [prompt for prompt, _, _ in pairs]
    scores_a, scores_b = (np.array([pair[side].scores[metric] for pair in pairs]) for side in (1, 2))
    winners = np.sign(scores_a - scores_b)
    results = [
        {"pair_index": index, "prompt": prompt,
         "image_a": str(image_a.path.absolute()), "image_b": str(image_b.path.absolute()),
         "score_a": image_a.scores[metric], "score_b": image_b.scores[metric],
         "winner": label_a if sign > 0 else label_b if sign < 0 else "tie"}
        for index, ((prompt, image_a, image_b), sign) in enumerate(zip(pairs, winners))
    ]
    pair_file = {"model_a": label_a, "model_b": label_b, "total_pairs": len(pairs),
                 **count_wins(winners, ties_policy == "half"), "mean_score_a": float(scores_a.mean()),
                 "mean_score_b": float(scores_b.mean()), "ties_policy": ties_policy, "results": results}
    by_margin = sorted(results, key=lambda result: result["score_b"] - result["score_a"])
    named = [{"pair_index": result["pair_index"], "prompt": result["prompt"],
              "margin": result["score_a"] - result["score_b"]} for result in by_margin]
    row = {"metric": metric, "mean_a": float(scores_a.mean()), "mean_b": float(scores_b.mean()),
           "total_pairs": len(pairs), **outcome(winners, prompts, ties_policy == "half"),
           "biggest_wins_a": [result for result in named[:EXTREMES] if result["margin"] > 0],
           "biggest_wins_b": [result for result in named[:-EXTREMES - 1:-1] if result["margin"] < 0]}
    return pair_file, row


def summarise(rows: list[dict], options: CompareOptions, pairing: dict) -> dict:
    """summary.json; averages and Holm's correction are over the metrics of `rows` that are trained."""
    trained = [row for row in rows if not row.get("untrained")]
    for row, adjusted in zip(trained, holm([row["sign_test_p"] for row in trained])):
        row["sign_test_p_holm"] = adjusted
    half = options.ties_policy == "half"
    won = sum(row["wins_a"] + (row["ties"] / 2 if half else 0) for row in trained)
    counted = sum(row["total_pairs"] if half else row["wins_a"] + row["wins_b"] for row in trained)
    return {
        "pair": {"model_a": options.label_a, "model_b": options.label_b, "ties_policy": options.ties_policy},
        "metrics": rows,
        "averages": {"macro_win_rate_a_over_b": float(np.mean([row["win_rate_a_over_b"] for row in trained])),
                     "micro_win_rate_a_over_b": won / counted if counted else 0.5} if trained else None,
        "pairing": pairing,
        "intervals": {"method": "percentile bootstrap over prompts; where all are won or all lost, exact binomial "
                                "(Clopper-Pearson) over prompts", "level": 0.95, "resamples": RESAMPLES},
        "test": "two-sided paired sign test over prompts, Holm-corrected over the metrics",
    }


def mark_untrained(rows: list[dict], config: dict[str, dict]) -> None:
    """Name each row, and take the p of those whose model metrics.yaml calls untrained: their numbers are no results."""
    for row in rows:
        row["label"], row["untrained"] = METRICS[row["metric"]].label, is_untrained(row["metric"], config)
        if row["untrained"]:
            row["label"] += " (untrained)"
            row["sign_test_p"] = row["sign_test_p_holm"] = None


def new_folder(outdir: str, label_a: str, label_b: str) -> Path:
    """A new folder in `outdir`, named after the labels (80 bytes of each at most: a name has 255) and the time."""
    names = [re.sub(r"[^\w.+-]+", "_", label).encode()[:80].decode(errors="ignore") for label in (label_a, label_b)]
    stamp = f"{names[0]}_vs_{names[1]}_{datetime.now():%m%d-%H%M%S}"
    for number in range(1, 1000):
        folder = Path(outdir) / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UserError(f"{outdir} holds too many comparisons of this second: start again")


def summary_lines(summary: dict) -> list[str]:
    """The table that the program prints."""
    def cells(row: dict, p: float | None) -> tuple[str, ...]:
        interval = "{:.2%} to {:.2%}".format(*row["win_rate_ci95"]) if row["win_rate_ci95"] else "-"
        return (f"{row['win_rate_a_over_b']:.2%}", interval, str(row["wins_a"]), str(row["wins_b"]), str(row["ties"]),
                "-" if p is None else f"{p:.2g}")

    label_a, label_b = summary["pair"]["model_a"], summary["pair"]["model_b"]
    rows = [("Metric", f"mean {label_a}", f"mean {label_b}", f"{label_a} wins", "95% interval", "wins", "losses", "ties",
             "p (Holm)")]
    rows += [(row["label"], f"{row['mean_a']:.4f}", f"{row['mean_b']:.4f}", *cells(row, row["sign_test_p_holm"]))
             for row in summary["metrics"]]
    if human := summary.get("human"):
        rows.append(("Human", "-", "-", *cells(human, human["sign_test_p"])))
    averages, over = summary["averages"], "no metric is trained: these numbers say nothing of the models"
    if averages:
        over = (f"win rate of {label_a} over {label_b}: macro {averages['macro_win_rate_a_over_b']:.2%}, "
                f"micro {averages['micro_win_rate_a_over_b']:.2%}")
    return [*table(rows), "", over,
            *(human_lines(human, {name: METRICS[name].label for name in human["metrics_agree"]}) if human else [])]


def main(argv: list[str] | None = None) -> int:
    [options, scoring], _ = parse([CompareOptions, ScoringOptions], argv, program="python -m eval.compare",
                                  description=__doc__)
    check_compare_options(options)
    entries_a, entries_b = read_manifest(options.json_a), read_manifest(options.json_b)
    models = {side: describe_model(str(manifest), entries)
              for side, manifest, entries in (("a", options.json_a, entries_a), ("b", options.json_b, entries_b))}
    differences, notes = check_comparable(models["a"], models["b"], (options.label_a, options.label_b),
                                          options.allow_different_settings)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    ballots = read_votes(options.votes) if options.votes else []
    indices = pair_up([entry["prompt"] for entry in entries_a], [entry["prompt"] for entry in entries_b], options.pair_by)

    make_folder(Path(options.outdir), "--outdir")
    quiet_libraries()
    from eval.scoring import score_manifests
    (scored_a, scored_b), failures = score_manifests([options.json_a, options.json_b], scoring)
    paired = [(prompt, scored_a.images[a], scored_b.images[b]) for prompt, a, b in indices]
    pairs = [pair for pair in paired if not pair[1].fault and not pair[2].fault]
    if not pairs:
        raise UserError("no pair has both its images: generate the missing ones again")
    pairing = {"by": options.pair_by, "pairs": len(pairs), "left_out_for_missing_images": len(paired) - len(pairs),
               "images_without_partner_a": len(entries_a) - len(indices),
               "images_without_partner_b": len(entries_b) - len(indices)}
    if pairing["images_without_partner_a"] or pairing["images_without_partner_b"]:
        print(f"{len(entries_a) - len(indices)} images of {options.label_a} and {len(entries_b) - len(indices)} of "
              f"{options.label_b} have no partner: left out", file=sys.stderr)

    compared = {metric: compare_metric(metric, pairs, options.label_a, options.label_b, options.ties_policy)
                for metric in scoring.metrics if metric not in failures}
    if not compared:
        return report_failures(failures)
    human = human_row(ballots, pairs, list(compared), options.ties_policy == "half") if ballots else None
    folder = new_folder(options.outdir, options.label_a, options.label_b)
    for metric, (pair_file, _) in compared.items():
        write_json(folder / f"pair_{metric}.json", pair_file)
    rows = [row for _, row in compared.values()]
    mark_untrained(rows, read_config(scoring.metrics_config))
    summary = summarise(rows, options, pairing)
    summary |= {"not_scored": failures, "models": models, "different_settings": differences, "notes": notes}
    if human:
        summary["human"] = human
    write_json(folder / "summary.json", summary)
    print("\n" + "\n".join(summary_lines(summary)) + "\n")
    print(f"wrote {folder}/summary.json")
    if not options.no_report:
        print(f"wrote {write_report(folder)}")
    return report_failures(failures)


if __name__ == "__main__":
    run_program(main)
