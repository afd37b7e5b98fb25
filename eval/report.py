"""The page of a comparison: win rates with intervals, score distributions, and every pair side by side.

    python -m eval.report --comparison output/vs_eval/A_vs_B_1121-204500

Reads summary.json and the pair files; writes report.html, which needs no network. Up to INLINE_PAIRS pairs its images
are inside it; beyond, they lie beside it in report_images/.
"""

import base64
import io
import json
import os
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import jinja2
from PIL import Image

from common.errors import UserError, run_program
from common.files import write_text
from common.images import FORMATS
from common.options import option, parse
from eval.metrics import METRICS

INLINE_PAIRS = 150
THUMBNAIL = 384  # pixels; a phone's card shows about 180, a laptop's 300
QUALITY = 82


@dataclass
class ReportOptions:
    title = "the page"

    comparison: str = option(MISSING, "folder that eval.compare wrote")
    images: Literal["auto", "inline", "beside"] = option(
        "auto", f"inside the page, in report_images/ beside it, or by number: inside up to {INLINE_PAIRS} pairs")


def thumbnail(path: str) -> bytes | None:
    """A JPEG of at most THUMBNAIL pixels; None when the image has gone since it was scored."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = image.convert("RGB")
    except OSError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()


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


def place_images(folder: Path, paths: list[str], inline: bool) -> list[str]:
    """The src of each image's thumbnail: a data URI, or a file that this writes into report_images/."""
    beside = folder / "report_images"
    if not inline:
        beside.mkdir(exist_ok=True)

    def place(numbered: tuple[int, str]) -> str:
        number, path = numbered
        data = thumbnail(path)
        if data is None:
            return ""
        if inline:
            return "data:image/jpeg;base64," + base64.b64encode(data).decode()
        (beside / f"{number}.jpg").write_bytes(data)
        return f"report_images/{number}.jpg"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(place, enumerate(paths)))


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
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    labels = {metric: METRICS[metric].label for metric in pair_files}
    page = environment.get_template("report.html.j2").render(
        summary=summary, labels=labels, pairs=pairs,
        data={"labelA": summary["pair"]["model_a"], "labelB": summary["pair"]["model_b"], "metrics": list(labels.items()),
              "pairs": page_data(folder, pair_files, inline)})
    write_text(folder / "report.html", page)
    return folder / "report.html"


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([ReportOptions], argv, program="python -m eval.report", description=__doc__)
    print(f"wrote {write_report(options.comparison, options.images)}")


if __name__ == "__main__":
    run_program(main)
