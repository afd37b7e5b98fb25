"""One pass of five metrics against five passes of one: time and peak memory.

    python -m benchmarks.scoring                                     # 1,000 images of 512x512, small models
    python -m benchmarks.scoring --metrics_config configs/metrics.yaml --device cuda        # the published models

Each pass is a process of its own that scores the same manifest from nothing; its start and imports are not counted.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def write_images(folder: Path, count: int, size: int) -> Path:
    """A manifest of `count` smooth, slightly noisy images; PNGs of about the size of generated ones."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    entries = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
        noise = rng.integers(-6, 7, (size, size, 1), dtype=np.int16)
        pixels = np.clip(np.asarray(coarse, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png", compress_level=1)
        entries.append({"prompt": f"a picture of number {index}", "gen_image_path": f"{index}.png"})
    (folder / "images.json").write_text(json.dumps(entries))
    return folder / "images.json"


def one_pass(manifest: Path, metrics: list[str], args: argparse.Namespace) -> None:
    """Score in this process and print what it took."""
    import torch

    from eval.options import ScoringOptions
    from eval.scoring import score_manifests

    for metric in metrics:  # imports are not what is measured
        from eval.metrics import metric_class
        metric_class(metric)
    options = ScoringOptions(metrics=metrics, metrics_config=args.metrics_config, device=args.device)
    before, start, cpu = peak_memory(), time.perf_counter(), time.process_time()
    _, failures = score_manifests([manifest], options)
    assert not failures, failures
    print(json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu,
                      "memory_mib": peak_memory(), "before_mib": before,
                      "device_mib": torch.cuda.max_memory_allocated() / 2**20 if args.device != "cpu" else 0}))


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(manifest: Path, metrics: list[str], args: argparse.Namespace) -> dict:
    manifest.with_name("images_scores.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.scoring", "--manifest", manifest, "--metrics", *metrics, "--device", args.device,
               "--metrics_config", args.metrics_config]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--vision_width", type=int, default=32, help="of the small models")
    parser.add_argument("--metrics_config", help="default: small random models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--metrics", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.manifest:
        return one_pass(args.manifest, args.metrics, args)

    from eval.metrics import PUBLISHED
    from shapes.tiny_metrics import write_tiny_metrics

    with tempfile.TemporaryDirectory() as folder:
        manifest = write_images(Path(folder), args.num_images, args.size)
        args.metrics_config = args.metrics_config or write_tiny_metrics(Path(folder) / "metrics", args.vision_width)
        together = measure(manifest, list(PUBLISHED), args)
        separate = [measure(manifest, [metric], args) for metric in PUBLISHED]
    print(f"{args.num_images} images of {args.size}x{args.size}, {args.device}, {os.cpu_count()} cores")
    print(f"{'':16}{'one pass':>12}{'five passes':>14}{'ratio':>8}")
    for name, of, many in (("seconds", "seconds", sum), ("CPU seconds", "cpu_seconds", sum),
                           ("peak memory MiB", "memory_mib", max), ("on device MiB", "device_mib", max)):
        one, five = together[of], many(run[of] for run in separate)
        if five:
            print(f"{name:16}{one:12.1f}{five:14.1f}{one / five:8.2f}")
    print(f"(of the memory, {together['before_mib']:.0f} MiB are the imported libraries)")


if __name__ == "__main__":
    main()
