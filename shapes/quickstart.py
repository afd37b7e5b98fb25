"""The quickstart's two small programs: what goes into training, and what came out of it.

    python -m shapes.quickstart prepare --output output/quickstart
    python -m shapes.quickstart table --output output/quickstart
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError, quiet_libraries, run_program
from common.options import option, parse

MODELS = ("base", "plain", "safeguarded")
PARTS = ("oracle", "shape", "colour", "background", "position", "cleanliness")
LAST_STEPS = 20  # the table's figures of a run are means over these
SHOWN = 10  # prompts of samples.png
SCALE = 3


@dataclass
class QuickstartOptions:
    step: Literal["prepare", "table"] = option(MISSING, "what to do", positional=True)
    output: str = option("output/quickstart", "the quickstart's folder")
    num_pairs: int = option(400, "preference pairs", at_least=2)


def prepare(output: Path, num_pairs: int) -> None:
    """The base pipeline and the preference pairs, as folders that train.py takes."""
    from shapes.pairs import write_pairs
    from shapes.pipeline import base_pipeline

    base = base_pipeline(output / "base")
    done = output / "pairs" / "done"
    if not done.is_file() or done.read_text() != str(num_pairs):
        write_pairs(output / "pairs", num_pairs, seed=1, resolution=32)
        done.write_text(str(num_pairs))
    print(f"base model in {base}, {num_pairs} preference pairs in {output / 'pairs'}")


def drawings(output: Path, model: str) -> tuple[list[str], list[Path], dict[str, float]]:
    """A model's prompts, images and mean scores. Raises UserError where they are not there."""
    from eval.manifest import image_path, read_manifest
    from eval.scores import scores_beside

    manifests = [path for path in (output / "eval" / model).glob("*.json") if not path.stem.endswith("_scores")]
    try:
        [manifest] = manifests
        scores = json.loads(scores_beside(manifest).read_text())["metrics"]
        means = {part: scores[part]["mean"] for part in PARTS}
    except (ValueError, OSError, KeyError):
        raise UserError(f"{output / 'eval' / model} holds no scored images: bash scripts/quickstart.sh makes them") from None
    entries = read_manifest(manifest)
    return [entry["prompt"] for entry in entries], [image_path(manifest, entry) for entry in entries], means


def run_row(run: Path) -> list[str]:
    """What a run says of its last steps."""
    from training.records import read_metrics

    last = read_metrics(run / "metrics.jsonl")[-LAST_STEPS:]
    mean = {name: sum(line[name] for line in last) / len(last)
            for name in ("implicit_acc_accumulated", "avg_win_diff_loss", "avg_lose_diff_loss", "ref_mse_unaccumulated")}
    change = [f"{mean[name] / mean['ref_mse_unaccumulated']:+.0%}" for name in ("avg_win_diff_loss", "avg_lose_diff_loss")]
    return [f"{mean['implicit_acc_accumulated']:.2f}", *change]


def summarise(output: Path) -> None:
    """Print the table of the models, and draw them side by side on the same prompts from the same noise."""
    from eval.score import table

    rows, images = [["model", "pairs ranked right", "winner's error", "loser's error", *PARTS]], {}
    for model in MODELS:
        prompts, images[model], means = drawings(output, model)
        trained = ["-"] * 3 if model == "base" else run_row(output / model)
        rows.append([model, *trained, *(f"{means[part]:.3f}" for part in PARTS)])
    print(*table(rows), sep="\n")
    print(f"(of the training pairs: means over the last {LAST_STEPS} steps, errors against the reference's; of the "
          f"{len(prompts)} drawings: means of the oracle's score and of its parts)")
    sheet(images, output / "samples.png")


def sheet(images: dict[str, list[Path]], path: Path) -> None:
    """One row a model, one column a prompt, names at the left."""
    from PIL import Image, ImageDraw

    pictures = {model: [Image.open(file).convert("RGB") for file in files[:SHOWN]] for model, files in images.items()}
    side = pictures[MODELS[0]][0].width * SCALE
    page = Image.new("RGB", (90 + (side + 4) * SHOWN, (side + 4) * len(pictures)), "white")
    pen = ImageDraw.Draw(page)
    for line, (model, row) in enumerate(pictures.items()):
        pen.text((6, line * (side + 4) + side // 2 - 6), model, fill="black")
        for column, picture in enumerate(row):
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (90 + column * (side + 4), line * (side + 4)))
    page.save(path)


def main() -> None:
    [options], _ = parse([QuickstartOptions], program="python -m shapes.quickstart", description=__doc__)
    quiet_libraries()
    output = Path(options.output)
    prepare(output, options.num_pairs) if options.step == "prepare" else summarise(output)


if __name__ == "__main__":
    run_program(main)
