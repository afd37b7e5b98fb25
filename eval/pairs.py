"""Preference pairs from images that were generated and scored: a folder that train.py takes.

    python -m eval.pairs --manifests IMAGES/base/papv2_*.json [MORE.json ...] --metrics pickscore hpsv2 --output my_pairs

The images of a prompt, of one model or of several, are paired by their scores (eval.score leaves them beside the
manifests). Nothing is generated or scored here: other rules over the same images cost seconds. OUTPUT holds parquet files in
Pick-a-Pic's columns, with models, seeds and scores beside them, and pairs.json, which says how they were made.
"""

import hashlib
import shutil
from collections import defaultdict
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError, run_program, warn
from common.files import make_folder, read_json, write_json
from common.options import option, parse
from eval.manifest import image_path, model_names, read_manifest
from eval.metrics import METRICS, canonical_name, read_config
from eval.pair_rules import Found, find_pairs, histogram
from eval.scores import read_scores, scores_beside

RECORD = "pairs.json"
ROWS_PER_FILE = 512


@dataclass
class PairOptions:
    title = "pairs"

    manifests: list[str] = option(MISSING, "generation manifests (JSON) of one model or of several")
    output: str = option(MISSING, "folder for the pairs")
    models: list[str] = option([], "a name for each manifest's model", default_text="the manifests' folders")
    metrics: list[str] = option(["pickscore"], f"what decides, of {', '.join(METRICS)}", default_text="pickscore")
    metrics_config: str | None = option(None, "a metrics.yaml that names metrics of one's own")
    rule: Literal["best_worst", "all", "margin"] = option(
        "best_worst", "best_worst: the widest pair of a prompt; all: every two images that differ; margin: every two at least "
        "--min_gap apart")
    min_gap: float = option(0.0, "smallest gap of a pair: in the metric's score, with several metrics in mean rank (0 to 1)",
                            at_least=0)
    vote: Literal["rank", "agree"] = option("rank", "several metrics: their mean rank decides, or all must agree")

    def __post_init__(self):
        if self.metrics_config:
            read_config(self.metrics_config)  # which knows them from here on
        self.metrics = list(dict.fromkeys(canonical_name(name) for name in self.metrics))


@dataclass
class Candidate:
    """One image of a prompt. scores: by metric."""

    path: Path
    sha256: str
    model: str
    seed: int | None
    scores: dict[str, float] = field(default_factory=dict)


def check_pair_options(options: PairOptions) -> None:
    if options.rule == "margin" and not options.min_gap:
        raise UserError("--rule margin takes every two images at least --min_gap apart: say how far, or take --rule all")
    if options.rule == "all" and options.min_gap:
        raise UserError("--rule all takes every two images that differ: with --min_gap, take --rule margin")
    output = Path(options.output)
    if output.is_file() or output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file():
        raise UserError(f"--output {output} holds something that is no earlier result of this program: name another folder")


def read_candidates(options: PairOptions) -> dict[str, list[Candidate]]:
    """The scored images of each prompt. Raises UserError for a missing score, and for an image that is gone or changed."""
    models = model_names(options.manifests, options.models or None, "--models")
    candidates = defaultdict(list)
    for manifest, model in zip(options.manifests, models):
        entries = read_manifest(manifest)
        _, scores = read_scores(scores_beside(manifest), {})
        again = f"python -m eval.score --manifests {manifest} --metrics {' '.join(options.metrics)}"
        if not scores:
            raise UserError(f"{manifest} has no scores: {again}")
        for entry in entries:
            path, prompt, metadata = image_path(manifest, entry), entry["prompt"], entry.get("metadata")
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}): generate it again") from None
            known = scores.get((digest, prompt), {})
            missing = [name for name in options.metrics if name not in known]
            if missing:
                raise UserError(f"{path} as it is now has no score by {', '.join(missing)}: {again}")
            seed = metadata.get("image_seed") if isinstance(metadata, dict) else None
            same = any(other.sha256 == digest for other in candidates[prompt])
            if not same:  # a prompt that is listed twice is drawn twice alike
                candidates[prompt].append(Candidate(path, digest, model, seed if isinstance(seed, int) else None,
                                                    {name: known[name] for name in options.metrics}))
    return candidates


def choose(candidates: dict[str, list[Candidate]], options: PairOptions) -> dict[str, list[Found]]:
    """The pairs of each prompt."""
    return {prompt: find_pairs({name: [image.scores[name] for image in images] for name in options.metrics},
                               options.rule, options.vote, options.min_gap) for prompt, images in candidates.items()}


def row_of(prompt: str, images: list[Candidate], pair: Found, metrics: list[str]) -> dict:
    """A row of Pick-a-Pic's columns, and where it comes from. Which side the winner is on follows from the images, so that
    image 0 wins about half of the pairs, and the same ones every time."""
    winner, loser = images[pair.winner], images[pair.loser]
    coin = hashlib.sha256(f"{winner.sha256}{loser.sha256}".encode()).digest()[0] % 2
    sides = [winner, loser] if coin else [loser, winner]
    row = {"caption": prompt, **{f"jpg_{side}": image.path.read_bytes() for side, image in enumerate(sides)},
           "label_0": float(sides[0] is winner)}
    for side, image in enumerate(sides):
        row |= {f"model_{side}": image.model, f"seed_{side}": image.seed}
        row |= {f"{name}_{side}": image.scores[name] for name in metrics}
    return row | {"gap": pair.gap}


def write_pairs(candidates: dict[str, list[Candidate]], chosen: dict[str, list[Found]], options: PairOptions) -> None:
    """The folder, whole or not at all. Raises UserError where it cannot be made."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    output = Path(options.output).absolute()
    make_folder(output.parent, "--output")
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    kinds = [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64())]
    for side in (0, 1):
        kinds += [(f"model_{side}", pa.string()), (f"seed_{side}", pa.int64()),
                  *((f"{name}_{side}", pa.float64()) for name in options.metrics)]
    schema = pa.schema([*kinds, ("gap", pa.float64())])
    places = [(prompt, pair) for prompt, pairs in chosen.items() for pair in pairs]
    try:
        for number, start in enumerate(range(0, len(places), ROWS_PER_FILE)):
            rows = [row_of(prompt, candidates[prompt], pair, options.metrics)
                    for prompt, pair in places[start:start + ROWS_PER_FILE]]
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), aside / f"train-{number:05}.parquet")
        versions = {manifest: (read_json(scores_beside(manifest)) or {}).get("metrics") for manifest in options.manifests}
        write_json(aside / RECORD, {**vars(options), "pairs": len(places), "prompts": len(candidates),
                                    "prompts_with_a_pair": sum(map(bool, chosen.values())), "scores": versions})
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    aside.rename(output)


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([PairOptions], argv, program="python -m eval.pairs", description=__doc__)
    check_pair_options(options)
    candidates = read_candidates(options)
    chosen = choose(candidates, options)
    gaps = [pair.gap for pairs in chosen.values() for pair in pairs]
    with_pair = sum(map(bool, chosen.values()))
    unit = METRICS[options.metrics[0]].label if len(options.metrics) == 1 else f"mean rank by {', '.join(options.metrics)}"
    print(f"{with_pair} of {len(candidates)} prompts gave a pair, {len(gaps)} pairs in all; their gaps in {unit}:")
    print(*histogram(gaps), sep="\n")
    if not gaps:
        raise UserError("no prompt gave a pair: generate more images of each (--num_images_per_prompt), or ask for less "
                        "(--min_gap, --vote rank)")
    if with_pair < len(candidates) / 2:
        warn("more than half of the prompts gave no pair")
    write_pairs(candidates, chosen, options)
    print(f"wrote {options.output}: look at it with python -m data.check {options.output}")


if __name__ == "__main__":
    run_program(main)
