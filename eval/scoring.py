"""Scoring images: each is read, decoded and resized once for all metrics; the models then take turns on the device."""

import hashlib
import io
import math
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from PIL import Image

from common.errors import UserError, first_line
from common.images import FORMATS
from common.progress import progress_bar
from eval.metrics import METRICS, load_metric, looks_at, metric_settings, metric_version, read_config
from eval.metrics.base import Metric, to_pixels
from eval.options import ScoringOptions
from eval.scores import ScoredImage, ScoredManifest, open_manifest

LISTED_FAULTS = 10
READ_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on broken files


def score_manifests(paths: list[str | Path], options: ScoringOptions) -> tuple[list[ScoredManifest], dict[str, str]]:
    """Score the images of every manifest and leave STEM_scores.json beside each.

    Returns the manifests, scored, and the failures: metric -> why its model could not be loaded or run.

    Raises:
        UserError: no manifest, or missing or unreadable images (listed and counted) without options.skip_missing.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, config = pick_device(options.device), read_config(options.metrics_config)
    versions = {name: metric_version(name, config) for name in options.metrics}
    sides = {name: looks_at(name, metric_settings(name, config)) for name in versions}
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
        for read in progress_bar(reads, desc="reading", unit=" images"):
            read.result()
    report_faults(images, refuse=not options.skip_missing)
    for manifest in manifests:
        if all(image.fault for image in manifest.images):
            raise UserError(f"none of the {len(manifest.images)} images of {manifest.path} can be read: generate "
                            "them again")

    for name in sides:
        todo = [image for image in images if not image.fault and name not in image.scores]
        if not todo:
            continue
        try:
            score_images(load_metric(name, device, config), todo, options.batch_size)
        except faults(name) as error:
            failures[name] = reason(error)
        finally:  # what was scored is kept, whatever ends it
            for manifest in manifests:
                manifest.write()
    for image in images:
        image.pixels.clear()
    for manifest in manifests:
        manifest.write()
    return manifests, failures


def pick_device(device: str | None) -> str:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            print("no GPU here: scoring on the CPU")
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no GPU can be used here; leave --device out or give cpu")
    return device


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
        image.sha256 = digest
    except READ_ERRORS as error:
        image.fault = first_line(error)
        return
    for name in (at_once.keys() & wanted) - failures.keys():
        try:
            image.scores[name] = finite(at_once[name].score([picture], [image.prompt]), [image])[0]
        except faults(name) as error:
            failures[name] = reason(error)


def faults(name: str) -> tuple[type[Exception], ...]:
    """Errors that fail a metric alone: of a class of one's own, all."""
    return (Exception,) if METRICS[name].own else (UserError, torch.OutOfMemoryError)


def reason(error: Exception) -> str:
    if isinstance(error, (UserError, torch.OutOfMemoryError)):
        return first_line(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.filename}, line {place.lineno}: {first_line(error)}"


def finite(scores: torch.Tensor, images: list[ScoredImage]) -> list[float]:
    """The scores. Raises UserError where they are not one an image, and naming the first image whose score is NaN or
    infinite: nothing can be compared with it."""
    if scores.shape != (len(images),):
        raise UserError(f"it gave scores of shape {tuple(scores.shape)} for {len(images)} images")
    scores = scores.tolist()
    for image, score in zip(images, scores):
        if not math.isfinite(score):
            raise UserError(f"its score of {image.path} is {score}, no finite number: are its weights damaged?")
    return scores


def score_images(metric: Metric, images: list[ScoredImage], batch_size: int) -> None:
    """Score images that read_image has prepared, in batches. Raises UserError for what finite() refuses."""
    with progress_bar(total=len(images), desc=metric.label, unit=" images") as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start:start + batch_size]
            pixels = torch.stack([image.pixels[metric.image_size] for image in batch])
            scores = metric.score_pixels(pixels, [image.prompt for image in batch])
            for image, score in zip(batch, finite(scores, batch)):
                image.scores[metric.name] = score
            bar.update(len(batch))


def report_faults(images: list[ScoredImage], refuse: bool) -> None:
    """List and count the images that cannot be read; with `refuse` that is an error."""
    faulty = [image for image in images if image.fault]
    if not faulty:
        return
    for image in faulty[:LISTED_FAULTS]:
        print(f"  {image.path}: {image.fault}", file=sys.stderr)
    if len(faulty) > LISTED_FAULTS:
        print(f"  and {len(faulty) - LISTED_FAULTS} more", file=sys.stderr)
    found = f"{len(faulty)} of {len(images)} images are missing or unreadable"
    if refuse:
        raise UserError(f"{found} (listed above): delete the unreadable ones and generate again, or leave them all out "
                        "with --skip_missing")
    print(f"{found}: left out", file=sys.stderr)
