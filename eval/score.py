"""Score the images of generation manifests with every metric.

    python -m eval.score --manifests RUN/papv2_seed0_512x512_50s_7.5cfg.json [MORE.json ...]

Leaves STEM_scores.json beside each manifest and prints the mean of each metric over each prompt group. An image is
read, decoded and resized once for all metrics, in threads, while the first model loads; the models then take turns on
the device, so the device holds one of them at a time. Scores are kept by image content and metric version: what was
scored before is not scored again.
"""

import sys

from common.errors import quiet_libraries, run_program
from common.files import make_room, write_text
from common.options import parse
from eval.manifest import read_manifest
from eval.metrics import METRICS
from eval.options import ScoreOptions, ScoringOptions
from eval.scores import ScoredManifest


def told_apart(manifests: list[ScoredManifest]) -> list[str]:
    """The prompt groups' names; where several manifests are of one group, with the manifests' folders."""
    groups = [manifest.group for manifest in manifests]
    return [f"{manifest.group} ({manifest.path.parent})" if groups.count(manifest.group) > 1 else manifest.group
            for manifest in manifests]


def results_text(manifests: list[ScoredManifest], metrics: list[str]) -> str:
    """The published log: a FinalResults line for each metric and group, then the table of the same."""
    rows = [(group, METRICS[name].label, f"{manifest.mean(name):.4f}")
            for manifest, group in zip(manifests, told_apart(manifests)) for name in metrics if manifest.mean(name) is not None]
    lines = [f"FinalResults {label} for {group} : {score}" for group, label, score in rows]
    return "\n".join([*lines, "", *table([("Prompt", "Predictor", "Score"), *rows])]) + "\n"


def summary_table(manifests: list[ScoredManifest], metrics: list[str]) -> str:
    """One row a prompt group, one column a metric."""
    rows = [("Prompt group", "Images", *(METRICS[name].label for name in metrics))]
    for manifest, group in zip(manifests, told_apart(manifests)):
        means = [manifest.mean(name) for name in metrics]
        read = sum(image.sha256 is not None for image in manifest.images)
        rows.append((group, str(read), *("failed" if mean is None else f"{mean:.4f}" for mean in means)))
    return "\n".join(table(rows)) + "\n"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Markdown lines of a table whose first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def report_failures(failures: dict[str, str]) -> int:
    """Name the metrics that failed; the exit code: 1 when there is one."""
    for name, why in failures.items():
        print(f"error: {name} was not scored: {why}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    [options, scoring], _ = parse([ScoreOptions, ScoringOptions], argv, program="python -m eval.score", description=__doc__)
    for manifest in options.manifests:
        read_manifest(manifest)
    if options.log_file:
        make_room(options.log_file, "--log_file")
    quiet_libraries()
    from eval.scoring import score_manifests
    manifests, failures = score_manifests(options.manifests, scoring)
    results = results_text(manifests, scoring.metrics)
    print(f"\n{results}\n{summary_table(manifests, scoring.metrics)}", flush=True)
    if options.log_file:
        write_text(options.log_file, results)
        print(f"wrote {options.log_file}", flush=True)
    return report_failures(failures)


if __name__ == "__main__":
    run_program(main)
