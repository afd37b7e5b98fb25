"""The page of a comparison: win rates with intervals, score distributions, and every pair side by side.

    python -m eval.report --comparison output/vs_eval/A_vs_B_1121-204500

Reads summary.json and the pair files; writes report.html, which needs no network. Up to INLINE_PAIRS pairs its images
are inside it; beyond, they lie beside it in report_images/.
"""

import json
import os
import urllib.parse
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError, run_program
from common.options import option, parse
from eval.metrics import METRICS
from eval.pages import place_images, write_page
from eval.comparable import settings_table

INLINE_PAIRS = 150


@dataclass
class ReportOptions:
    title = "the page"

    comparison: str = option(MISSING, "folder that eval.compare wrote")
    images: Literal["auto", "inline", "beside"] = option(
        "auto", f"inside the page, in report_images/ beside it, or by number: inside up to {INLINE_PAIRS} pairs")


def no_number(name: str):
    raise ValueError(f"{name} is no number")


def read_comparison(folder: Path) -> tuple[dict, dict[str, dict]]:
    """summary.json and the pair files by metric. Raises UserError when they are not there."""
    def read(name: str) -> dict:
        return json.loads((folder / name).read_text(encoding="utf-8"), parse_constant=no_number)

    try:
        summary = read("summary.json")
        pair_files = {row["metric"]: read(f"pair_{row['metric']}.json") for row in summary["metrics"]}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no whole comparison ({error}): eval.compare writes one") from None
    return summary, pair_files


def page_data(folder: Path, pair_files: dict[str, dict], inline: bool) -> list[dict]:
    """One record a pair: prompt, thumbnails, paths of the full images as seen from the page, scores by metric."""
    first = next(iter(pair_files.values()))["results"]
    paths = [result[side] for result in first for side in ("image_a", "image_b")]
    thumbnails = place_images(folder, paths, inline)
    full = [urllib.parse.quote(Path(os.path.relpath(path, folder)).as_posix()) for path in paths]
    return [
        {"prompt": result["prompt"], "thumbs": thumbnails[2 * index:2 * index + 2],
         "full": full[2 * index:2 * index + 2],
         "scores": {metric: [pair_file["results"][index]["score_a"], pair_file["results"][index]["score_b"]]
                    for metric, pair_file in pair_files.items()}}
        for index, result in enumerate(first)
    ]


def write_report(folder: str | Path, images: str = "auto") -> Path:
    """Write report.html into a comparison's folder and return its path. Raises UserError when there is no comparison."""
    folder = Path(folder)
    summary, pair_files = read_comparison(folder)
    pairs = len(next(iter(pair_files.values()))["results"])
    inline = images == "inline" or (images == "auto" and pairs <= INLINE_PAIRS)
    labels = {row["metric"]: row.get("label") or METRICS[row["metric"]].label for row in summary["metrics"]}
    settings = settings_table(summary["models"]) if "models" in summary else []
    return write_page(
        folder / "report.html", "report.html.j2", summary=summary, labels=labels, pairs=pairs, settings=settings,
        data={"labelA": summary["pair"]["model_a"], "labelB": summary["pair"]["model_b"], "metrics": list(labels.items()),
              "pairs": page_data(folder, pair_files, inline), "votes": summary.get("human", {}).get("by_pair")})


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([ReportOptions], argv, program="python -m eval.report", description=__doc__)
    print(f"wrote {write_report(options.comparison, options.images)}")


if __name__ == "__main__":
    run_program(main)
