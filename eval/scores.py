"""The scores file beside a manifest: each image's scores, kept by image content, prompt and metric version.

Imports no torch.
"""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import read_json, write_json
from eval.manifest import image_path, read_manifest
from eval.metrics import METRICS

if TYPE_CHECKING:
    import torch


@dataclass
class ScoredImage:
    """One manifest entry on its way through scoring."""

    prompt: str
    gen_image_path: str
    path: Path
    sha256: str | None = None  # of the file's bytes; None until read
    fault: str | None = None  # why it cannot be read
    pixels: "dict[int, torch.Tensor]" = field(default_factory=dict)  # by side: uint8 (3, side, side)
    scores: dict[str, float] = field(default_factory=dict)  # by metric


@dataclass
class ScoredManifest:
    path: Path
    group: str
    images: list[ScoredImage]
    versions: dict[str, str]  # metric asked for -> version of its scores
    kept: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # (sha256, prompt) -> kept scores

    @property
    def scores_path(self) -> Path:
        return scores_beside(self.path)

    def mean(self, metric: str) -> float | None:
        """Mean over the images that could be read; None when the metric failed on any."""
        return mean_score([image.scores for image in self.images if not image.fault], metric)

    def write(self) -> None:
        """Put the scores into the file, beside those of other metrics and of other scorings that write there too; a
        file that holds them all is left alone, as its folder may be read-only. A metric that lacks images has no mean."""
        versions, kept = read_scores(self.scores_path, self.versions)
        images = [{"prompt": image.prompt, "gen_image_path": image.gen_image_path, "sha256": image.sha256,
                   "scores": kept.get((image.sha256, image.prompt), {}) | image.scores}
                  for image in self.images if image.sha256]
        scored, before = {name for image in images for name in image["scores"]}, read_json(self.scores_path)
        metrics = {name: {"label": label_of(name, before), "version": versions[name],
                          "mean": mean_score([image["scores"] for image in images], name)} for name in versions if name in scored}
        content = {"manifest": self.path.name, "metrics": metrics, "images": images}
        if before != content:
            write_json(self.scores_path, content)


def scores_beside(manifest: str | os.PathLike) -> Path:
    """Where a manifest's scores are kept."""
    return Path(manifest).with_name(f"{Path(manifest).stem}_scores.json")


def label_of(name: str, scores: dict | None) -> str:
    """A metric's label: the registry's, or what its scores file says of another metrics.yaml's."""
    try:
        return METRICS[name].label if name in METRICS else str(scores["metrics"][name]["label"])
    except (KeyError, TypeError):
        return name


def mean_score(scores: list[dict[str, float]], metric: str) -> float | None:
    """Mean of a metric over images; None when one lacks it, or there is none."""
    found = [of.get(metric) for of in scores]
    return None if None in found or not found else sum(found) / len(found)


def read_scores(path: Path, asked: dict[str, str]) -> tuple[dict[str, str], dict[tuple[str, str], dict[str, float]]]:
    """A scores file's metrics with their versions, those `asked` in the asked version, and by (sha256, prompt) its
    scores of these versions. What is no finite number is left out; a file of another form counts as empty."""
    content = read_json(path)
    try:
        found = {name: str(of["version"]) for name, of in content["metrics"].items()} if content else {}
        valid = {name for name, version in found.items() if asked.get(name, version) == version}
        return found | asked, {
            (image["sha256"], image["prompt"]): {
                name: score for name, score in image["scores"].items()
                if name in valid and isinstance(score, float) and math.isfinite(score)}
            for image in (content["images"] if content else [])}
    except (KeyError, TypeError, AttributeError):
        return dict(asked), {}


def group_name(manifest: Path) -> str:
    """papv2 for papv2_seed0_512x512_50s_7.5cfg.json."""
    return re.sub(r"_seed\d+_\d+x\d+_\d+s_[\d.]+cfg$", "", manifest.stem)


def open_manifest(path: Path, versions: dict[str, str]) -> ScoredManifest:
    """A manifest with its images, not yet read, and the kept scores of these versions of the metrics asked for."""
    images = [ScoredImage(entry["prompt"], entry["gen_image_path"], image_path(path, entry))
              for entry in read_manifest(path)]
    manifest = ScoredManifest(path, group_name(path), images, versions)
    _, kept = read_scores(manifest.scores_path, versions)
    if not kept and manifest.scores_path.exists():
        print(f"{manifest.scores_path} is no scores file of ours: scoring again")
    manifest.kept = {key: {name: score for name, score in scores.items() if name in versions}
                     for key, scores in kept.items()}
    return manifest
