"""Score the images of generation manifests with every metric.

    python -m eval.score --manifests RUN/papv2_seed0_512x512_50s_7.5cfg.json [MORE.json ...]

Leaves STEM_scores.json beside each manifest and prints the mean of each metric over each prompt group. An image is
read, decoded and resized once for all metrics, in threads, while the first model loads; the models then take turns on
the device, so the device holds one of them at a time. Scores are kept by image content and metric version: what was
scored before is not scored again.
"""

import hashlib
import io
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser

from common.files import make_room, read_json, write_bytes, write_json
from eval.manifest import image_path, read_manifest
from eval.metrics import (METRICS, PUBLISHED, canonical_name, load_metric, metric_class, metric_settings,
                          metric_version, read_config)
from eval.metrics.base import Metric, to_pixels
from common.train_options import parse_words
from common.errors import UserError, first_line, run_program
from data.images import FORMATS

LISTED_FAULTS = 10
READ_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on broken files


@dataclass
class ScoringOptions:
    """How images are scored; shared by eval.score and eval.compare."""

    metrics: list[str] = field(default_factory=lambda: list(PUBLISHED), metadata={
        "help": "Which metrics: pickscore, hpsv2, hpsv2.1, aesthetics, clip, imagereward, ..."})
    metrics_config: str | None = field(default=None, metadata={
        "help": "Where the models come from; default configs/metrics.yaml."})
    device: str | None = field(default=None, metadata={"help": "cuda or cpu; default: cuda where there is one."})
    batch_size: int = field(default=64, metadata={"help": "Images a model looks at together."})
    num_workers: int = field(default=8, metadata={"help": "Threads that read images."})
    skip_missing: bool = field(default=False, metadata={"help": "Leave missing or unreadable images out, with a count."})

    def __post_init__(self):
        if self.batch_size < 1 or self.num_workers < 1:
            raise UserError("--batch_size and --num_workers must be at least 1")
        self.metrics = list(dict.fromkeys(canonical_name(name) for name in self.metrics))
        if not self.metrics:
            raise UserError("--metrics names no metric")


@dataclass
class Arguments(ScoringOptions):
    manifests: list[str] = field(default_factory=list, metadata={"help": "Generation manifests (JSON)."})
    log_file: str | None = field(default=None, metadata={"help": "Write the results here too (joint_test_512.log)."})


@dataclass
class ScoredImage:
    """One manifest entry on its way through scoring."""

    prompt: str
    gen_image_path: str
    path: Path
    sha256: str | None = None  # of the file's bytes; None until read
    fault: str | None = None  # why it cannot be read
    pixels: dict[int, torch.Tensor] = field(default_factory=dict)  # by side: uint8 (3, side, side)
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
        return self.path.with_name(f"{self.path.stem}_scores.json")

    def mean(self, metric: str) -> float | None:
        """Mean over the images that could be read; None when the metric failed on any."""
        return mean_score([image.scores for image in self.images if not image.fault], metric)

    def write(self) -> None:
        """Put the scores into the file, beside those of other metrics and of other scorings that write there too; a
        file that holds them all is left alone, as its folder may be read-only."""
        versions, kept = read_scores(self.scores_path, self.versions)
        images = [{"prompt": image.prompt, "gen_image_path": image.gen_image_path, "sha256": image.sha256,
                   "scores": kept.get((image.sha256, image.prompt), {}) | image.scores}
                  for image in self.images if image.sha256]
        means = {name: mean_score([image["scores"] for image in images], name) for name in versions}
        metrics = {name: {"label": metric_class(name).label, "version": versions[name], "mean": mean}
                   for name, mean in means.items() if mean is not None}
        content = {"manifest": self.path.name, "metrics": metrics, "images": images}
        if read_json(self.scores_path) != content:
            write_json(self.scores_path, content)


def mean_score(scores: list[dict[str, float]], metric: str) -> float | None:
    """Mean of a metric over images; None when one lacks it, or there is none."""
    found = [of.get(metric) for of in scores]
    return None if None in found or not found else sum(found) / len(found)


def read_scores(path: Path, asked: dict[str, str]) -> tuple[dict[str, str], dict[tuple[str, str], dict[str, float]]]:
    """A scores file's metrics with their versions, those `asked` in the asked version, and by (sha256, prompt) its
    scores of these versions. Unknown metrics and what is no finite number are left out; a file of another form counts
    as empty."""
    content = read_json(path)
    try:
        found = {name: of["version"] for name, of in content["metrics"].items() if name in METRICS} if content else {}
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


def pick_device(device: str | None) -> str:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            print("no GPU here: scoring on the CPU")
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no GPU can be used here; leave --device out or give cpu")
    return device


def open_manifest(path: Path, versions: dict[str, str]) -> ScoredManifest:
    """A manifest with its images, not yet read, and the kept scores of these versions of the metrics asked for."""
    images = [ScoredImage(entry["prompt"], entry["gen_image_path"], image_path(path, entry))
              for entry in read_manifest(path)]
    manifest = ScoredManifest(path, group_name(path), images, versions)
    _, kept = read_scores(manifest.scores_path, versions)
    if not kept and manifest.scores_path.exists():
        print(f"{manifest.scores_path} is no scores file of ours: scoring anew")
    manifest.kept = {key: {name: score for name, score in scores.items() if name in versions}
                     for key, scores in kept.items()}
    return manifest


def read_image(image: ScoredImage, kept: dict, sides: dict[str, int], at_once: dict[str, Metric],
               failures: dict[str, str]) -> None:
    """Read one image and fill in what is known of it: kept scores, the pixels that the metrics of `sides` still need,
    and the scores of the metrics `at_once`, which look at the image itself."""
    try:
        data = image.path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        image.scores = dict(kept.get((digest, image.prompt), {}))
        wanted = [name for name in (*sides, *at_once) if name not in image.scores]
        if wanted:
            picture = Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
            image.pixels = {side: to_pixels(picture, side) for side in {sides[name] for name in wanted if name in sides}}
            for name in at_once.keys() & wanted:
                try:
                    image.scores[name] = finite(at_once[name].score([picture], [image.prompt]).tolist(), [image])[0]
                except UserError as error:
                    failures[name] = str(error)
        image.sha256 = digest
    except READ_ERRORS as error:
        image.fault = first_line(error)


def finite(scores: list[float], images: list[ScoredImage]) -> list[float]:
    """The scores. Raises UserError naming the first image whose score is NaN or infinite: nothing can be compared with
    it."""
    for image, score in zip(images, scores):
        if not math.isfinite(score):
            raise UserError(f"its score of {image.path} is {score}, no finite number: are its weights damaged?")
    return scores


def score_images(metric: Metric, images: list[ScoredImage], batch_size: int) -> None:
    """Score images that read_image has prepared, in batches. Raises UserError for a score that is no finite number."""
    with tqdm(total=len(images), desc=metric.label, unit=" images") as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start:start + batch_size]
            pixels = torch.stack([image.pixels[metric.image_size] for image in batch])
            scores = metric.score_pixels(pixels, [image.prompt for image in batch])
            for image, score in zip(batch, finite(scores.tolist(), batch)):
                image.scores[metric.name] = score
            bar.update(len(batch))


def score_manifests(paths: list[str | Path], options: ScoringOptions) -> tuple[list[ScoredManifest], dict[str, str]]:
    """Score the images of every manifest and leave STEM_scores.json beside each.

    Returns the manifests, scored, and the failures: metric -> why its model could not be had or run.

    Raises:
        UserError: no manifest, or missing or unreadable images (listed and counted) without options.skip_missing.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, config = pick_device(options.device), read_config(options.metrics_config)
    versions = {name: metric_version(name, config) for name in options.metrics}
    sides = {name: metric_settings(name, config).get("image_size", metric_class(name).image_size) for name in versions}
    sides = {name: side for name, side in sides.items() if side}
    at_once = {name: load_metric(name, device, config) for name in versions if name not in sides}

    manifests = [open_manifest(Path(path), versions) for path in paths]
    images = [image for manifest in manifests for image in manifest.images]
    for image in images:
        image.fault = None if image.path.is_file() else "no such file"
    if not options.skip_missing:
        report_faults(images, refuse=True)
    failures = {}
    with ThreadPoolExecutor(options.num_workers) as pool:
        reads = [pool.submit(read_image, image, manifest.kept, sides, at_once, failures)
                 for manifest in manifests for image in manifest.images if not image.fault]
        for read in tqdm(reads, desc="reading", unit=" images"):
            read.result()
    report_faults(images, refuse=not options.skip_missing)
    for manifest in manifests:
        if all(image.fault for image in manifest.images):
            raise UserError(f"none of the {len(manifest.images)} images of {manifest.path} can be read")

    for name in sides:
        todo = [image for image in images if not image.fault and name not in image.scores]
        if not todo:
            continue
        try:
            score_images(load_metric(name, device, config), todo, options.batch_size)
        except (UserError, torch.OutOfMemoryError) as error:
            failures[name] = first_line(error)
        for manifest in manifests:
            manifest.write()
    for image in images:
        image.pixels.clear()
    for manifest in manifests:
        manifest.write()
    return manifests, failures


def report_faults(images: list[ScoredImage], refuse: bool) -> None:
    """List and count the images that cannot be read; with `refuse` that is an error."""
    faulty = [image for image in images if image.fault]
    if not faulty:
        return
    for image in faulty[:LISTED_FAULTS]:
        print(f"  {image.path}: {image.fault}", file=sys.stderr)
    if len(faulty) > LISTED_FAULTS:
        print(f"  and {len(faulty) - LISTED_FAULTS} more", file=sys.stderr)
    told = f"{len(faulty)} of {len(images)} images are missing or unreadable"
    if refuse:
        raise UserError(f"{told} (listed above): delete what is there of them and generate again, or leave them out with --skip_missing")
    print(f"{told}: left out", file=sys.stderr)


def told_apart(manifests: list[ScoredManifest]) -> list[str]:
    """The prompt groups' names; where several manifests are of one group, with the manifests' folders."""
    groups = [manifest.group for manifest in manifests]
    return [f"{manifest.group} ({manifest.path.parent})" if groups.count(manifest.group) > 1 else manifest.group
            for manifest in manifests]


def results_text(manifests: list[ScoredManifest], metrics: list[str]) -> str:
    """The published log: a FinalResults line for each metric and group, then the table of the same."""
    rows = [(group, metric_class(name).label, f"{manifest.mean(name):.4f}")
            for manifest, group in zip(manifests, told_apart(manifests)) for name in metrics if manifest.mean(name) is not None]
    lines = [f"FinalResults {label} for {group} : {score}" for group, label, score in rows]
    return "\n".join([*lines, "", *table([("Prompt", "Predictor", "Score"), *rows])]) + "\n"


def summary_table(manifests: list[ScoredManifest], metrics: list[str]) -> str:
    """One row a prompt group, one column a metric."""
    rows = [("Prompt group", "Images", *(metric_class(name).label for name in metrics))]
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
    [args] = parse_words(HfArgumentParser(Arguments, description=__doc__), argv)
    if not args.manifests:
        raise UserError("--manifests names no generation manifest")
    if args.log_file:
        make_room(args.log_file, "--log_file")
    manifests, failures = score_manifests(args.manifests, args)
    results = results_text(manifests, args.metrics)
    print(f"\n{results}\n{summary_table(manifests, args.metrics)}", flush=True)
    if args.log_file:
        write_bytes(Path(args.log_file), results.encode())
        print(f"wrote {args.log_file}", flush=True)
    return report_failures(failures)


if __name__ == "__main__":
    run_program(main)
