"""The quickstart's two small programs: what goes into training, and what came out of it.

    python -m shapes.quickstart prepare --output output/quickstart
    python -m shapes.quickstart table --output output/quickstart --runs plain safeguarded
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from common.errors import UserError, quiet_libraries, run_program
from common.options import option, parse
from prompts import read_group

PROMPTS = read_group("shapes")[:8]
LAST_STEPS = 10  # the table's figures are means over these
SCALE = 4


@dataclass
class QuickstartOptions:
    step: Literal["prepare", "table"] = option(MISSING, "what to do", positional=True)
    runs: list[str] = option([], "run folders inside --output, for the table")
    output: str = option("output/quickstart", "the quickstart's folder")
    num_pairs: int = option(160, "preference pairs", at_least=2)


def prepare(output: Path, num_pairs: int) -> None:
    """The base pipeline and the preference pairs, as folders that train.py takes, and small untrained metric models."""
    from shapes.pipeline import base_pipeline
    from shapes.preferences import write_preferences
    from shapes.tiny_metrics import write_tiny_metrics

    base = base_pipeline(output / "base")
    if not (output / "metrics" / "metrics.yaml").is_file():
        write_tiny_metrics(output / "metrics")
    if not (output / "pairs" / "done").is_file():
        write_preferences(output / "pairs", num_pairs)
        (output / "pairs" / "done").touch()
    print(f"base model in {base}, {num_pairs} preference pairs in {output / 'pairs'}")


def table_row(run: Path) -> list[str]:
    import numpy as np

    from training.records import read_metrics

    settings = json.loads((run / "run.json").read_text())
    last = read_metrics(run / "metrics.jsonl")[-LAST_STEPS:]
    mean = {name: float(np.mean([line[name] for line in last])) for name in last[-1]}
    safeguard = f"mu {settings['winner_preserving_mu']:g}" if settings["use_winner_preserving"] else "off"
    return [settings["train_method"], safeguard, f"{mean['train_loss']:.4f}", f"{mean['implicit_acc_accumulated']:.2f}",
            f"{mean['avg_win_diff_loss']:+.5f}", f"{mean['avg_lose_diff_loss']:+.5f}"]


def summarise(output: Path, runs: list[str]) -> None:
    """Print the table of the runs and draw every prompt with the base and each run from the same noise."""
    import diffusers
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline

    from shapes.oracle import judge
    from shapes.pipeline import draw_images

    diffusers.utils.logging.disable_progress_bar()
    images = {}
    for name in ["base", *runs]:
        pipeline = StableDiffusionPipeline.from_pretrained(output / name)  # unet.pth's pipeline opens with diffusers
        images[name] = draw_images(pipeline, PROMPTS, first_seed=0)
        if name in runs:
            state = torch.load(output / name / "unet.pth", weights_only=True)
            if not all(torch.equal(state[key], value) for key, value in pipeline.unet.state_dict().items()):
                raise UserError(f"{output / name}: unet.pth and the pipeline beside it differ")
    header = ["method", "safeguard", "loss", "implicit accuracy", "winner error - ref", "loser error - ref", "oracle"]
    rows = [["base", *["-"] * 5], *(table_row(output / name) for name in runs)]
    for name, row in zip(images, rows):
        row.append(f"{np.mean([judge(image, prompt).score for image, prompt in zip(images[name], PROMPTS)]):.3f}")
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    for line in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")
    grid(images).save(output / "samples.png")
    print(f"(means over the last {LAST_STEPS} steps; errors against the reference, the oracle's score of "
          f"{len(PROMPTS)} drawings)\nsamples: {output / 'samples.png'}")


def grid(images: dict[str, list[Image.Image]]) -> Image.Image:
    """One row a model, one column a prompt, names at the left."""
    side = next(iter(images.values()))[0].width * SCALE
    sheet = Image.new("RGB", (110 + (side + 4) * len(PROMPTS), (side + 4) * len(images)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (name, row) in enumerate(images.items()):
        pen.text((6, line * (side + 4) + side // 2 - 6), name, fill="black")
        for column, image in enumerate(row):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (110 + column * (side + 4), line * (side + 4)))
    return sheet


def main() -> None:
    [options], _ = parse([QuickstartOptions], program="python -m shapes.quickstart", description=__doc__)
    quiet_libraries()
    output = Path(options.output)
    prepare(output, options.num_pairs) if options.step == "prepare" else summarise(output, options.runs)


if __name__ == "__main__":
    run_program(main)
