"""Small random models of the metrics' own classes and file formats, for tests and for trying the commands offline.

    python -m shapes.tiny_metrics --output output/tiny_metrics
    python -m eval.score ... --metrics_config output/tiny_metrics/metrics.yaml

Their scores mean nothing; everything else (files, keys, tokenizers, preprocessing) is as with the published models.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from common.errors import run_program
from common.options import option, parse


@dataclass
class TinyOptions:
    title = "the models"

    output: str = option(MISSING, "folder to write the models and their metrics.yaml into")
    vision_width: int = option(32, "width of every image encoder", at_least=16)
    image_size: int = option(224, "side of the images that the models look at", at_least=1)
    patch_size: int = option(32, "side of a patch; divides image_size", at_least=1)
    seed: int = option(0, "seed of the weights", at_least=0)


def write_tiny_metrics(output: str | Path, vision_width: int = 32, image_size: int = 224, patch_size: int = 32,
                       seed: int = 0) -> Path:
    """Write all models and their metrics.yaml into `output`; returns the yaml's path."""
    from shapes.tiny_models import write_models
    return write_models(Path(output), vision_width, image_size, patch_size, seed)


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([TinyOptions], argv, program="python -m shapes.tiny_metrics", description=__doc__)
    print(f"wrote {write_tiny_metrics(**vars(options))}")


if __name__ == "__main__":
    run_program(main)
