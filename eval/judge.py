"""A page on which people judge images: two side by side, blind, by keys or by touch. One file, without server or network.

    python -m eval.judge --manifests A.json B.json [C.json ...] --output judge.html
    python -m eval.judge --candidates FOLDER_OF_IMAGES --output judge.html

Open the page in a browser and choose; answers stay in the browser, so it can be closed and opened again. "Save votes"
writes votes.json, which eval.compare --votes, eval.leaderboard --votes and data.votes read, of one judge or several.
"""

import hashlib
import random
import shlex
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from common.errors import UserError, run_program
from common.files import make_room
from common.options import option, parse
from eval.manifest import image_path, is_text, model_names, read_manifest

REPEATED = 0.05  # of the pairs, with --repeat


@dataclass
class JudgeOptions:
    title = "what is judged"

    manifests: list[str] | None = option(None, "generation manifests (JSON): images of one prompt by different models are "
                                               "compared, or all images of a prompt where there is one model")
    candidates: str | None = option(None, "instead: a folder of images, several per prompt, each with its prompt in STEM.txt "
                                          "or as eval.generate wrote it")
    labels: list[str] | None = option(None, "the models' names, one per manifest", default_text="the manifests' folders")
    output: str = option("judge.html", "the page")
    seed: int = option(0, "draws sides and order", at_least=0)
    max_pairs: int | None = option(None, "only so many pairs, spread evenly over the prompts", at_least=1)
    repeat: bool = option(False, f"show {REPEATED:.0%} of the pairs twice, to measure the judge's own consistency")
    image_size: int = option(768, "largest side of the copies inside the page, in pixels", at_least=64, at_most=4096)
    skip_missing: bool = option(False, "leave out pairs with a missing or unreadable image, with a count")


@dataclass(frozen=True)
class Candidate:
    model: str
    prompt: str
    path: Path


Pair = tuple[Candidate, Candidate]


def of_manifests(manifests: list[str], models: list[str]) -> list[Candidate]:
    return [Candidate(model, entry["prompt"], image_path(manifest, entry))
            for manifest, model in zip(manifests, models) for entry in read_manifest(manifest)]


def of_folder(folder: Path) -> list[Candidate]:
    """The images below a folder, their prompts from STEM.txt beside them or from the PNG. Raises UserError."""
    from eval.folders import read_prompt
    found = [path for path in sorted(folder.rglob("*"))
             if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and path.is_file()]
    candidates = []
    for path in found:
        beside = path.with_suffix(".txt")
        try:
            prompt = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else read_prompt(path)
        except (OSError, UnicodeError):
            prompt = None
        if not prompt:
            raise UserError(f"{path} has no prompt: write it into {beside.name} beside it, as UTF-8 text")
        candidates.append(Candidate(folder.name, prompt, path))
    if not candidates:
        raise UserError(f"--candidates {folder}: no such folder, or no PNG, JPEG or WebP image in it")
    return candidates


def choose_pairs(candidates: list[Candidate], rng: random.Random, max_pairs: int | None) -> list[Pair]:
    """The pairs to show. Of several models, each two's images of a prompt, repeated ones in order; of one model, each two of
    its images of a prompt. A limit takes a pair of every prompt before a second one of any. Raises UserError."""
    several = len({candidate.model for candidate in candidates}) > 1
    groups: dict[tuple, list[Candidate]] = defaultdict(list)  # what may be compared
    seen: dict[tuple, int] = defaultdict(int)
    for one in candidates:
        number = seen[one.model, one.prompt] if several else 0
        seen[one.model, one.prompt] += 1
        groups[one.prompt, number].append(one)
    by_prompt: dict[str, list[Pair]] = defaultdict(list)
    for (prompt, _), group in groups.items():
        by_prompt[prompt] += combinations(group, 2)
    rounds: dict[int, list[Pair]] = defaultdict(list)
    for pairs in by_prompt.values():
        for number, pair in enumerate(rng.sample(pairs, len(pairs))):
            rounds[number].append(pair)
    chosen = [pair for number in sorted(rounds) for pair in rng.sample(rounds[number], len(rounds[number]))][:max_pairs]
    if not chosen:
        raise UserError("no prompt has two images to compare: give manifests of the same prompts, or several images per prompt")
    return rng.sample(chosen, len(chosen))


def read_images(pairs: list[Pair], side: int) -> dict[Path, tuple[str, str] | str]:
    """Each image's SHA-256 and the copy for the page, or why it cannot be read."""
    from common.images import BadImage, image_bytes
    from eval.pages import data_uri, thumbnail

    def read(path: Path) -> tuple[str, str] | str:
        try:
            data = image_bytes({"path": str(path)})
            return hashlib.sha256(data).hexdigest(), data_uri(thumbnail(data, side))
        except BadImage as error:
            return str(error)

    paths = sorted({candidate.path for pair in pairs for candidate in pair})
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(read, paths)))


def make_plan(pairs: list[Pair], digests: dict[Path, str], rng: random.Random, repeat: bool) -> tuple[dict, list[Path]]:
    """The plan, in the form of common/votes.py, and the images' files in its order. A repeat is shown among the last half, of
    a pair among the first, its sides swapped."""
    images: dict[Candidate, int] = {}
    shown = []
    for pair in pairs:
        left, right = (images.setdefault(candidate, len(images)) for candidate in rng.sample(pair, 2))
        shown.append({"prompt": pair[0].prompt, "left": left, "right": right})
    if repeat:
        half = (len(shown) + 1) // 2
        again = rng.sample(range(half), max(1, round(REPEATED * len(shown))))
        for number in again:
            first = shown[number]
            shown.insert(rng.randint(half, len(shown)), {"prompt": first["prompt"], "left": first["right"],
                                                        "right": first["left"], "repeat_of": number})
    listed = [{"path": str(one.path.absolute()), "sha256": digests[one.path], "model": one.model} for one in images]
    return {"images": listed, "pairs": shown}, [one.path for one in images]


def what_is_next(page: Path, options: JudgeOptions) -> list[str]:
    """What to do with the page and with its votes."""
    lines = [f"next: open {page} in a browser, choose, press \"Save votes\"; then",
             "  python -m data.votes votes.json --output my_pairs"]
    names = model_names(options.manifests, options.labels) if options.manifests else []
    if len(set(names)) == len(names) == 2:
        (a, b), (label_a, label_b) = options.manifests, names
        lines.append("  " + shlex.join(["python", "-m", "eval.compare", "--json_a", a, "--json_b", b, "--label_a", label_a,
                                        "--label_b", label_b, "--votes", "votes.json"]))
    elif len(set(names)) > 1:
        lines.append("  " + shlex.join(["python", "-m", "eval.leaderboard", "--manifests", *options.manifests, "--labels", *names,
                                        "--votes", "votes.json"]))
    return lines


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([JudgeOptions], argv, program="python -m eval.judge", description=__doc__)
    if bool(options.manifests) == bool(options.candidates):
        raise UserError("name what is judged: either --manifests or --candidates")
    candidates = (of_folder(Path(options.candidates)) if options.candidates else
                  of_manifests(options.manifests, model_names(options.manifests, options.labels)))
    for one in candidates:
        if not is_text(str(one.path.absolute())) or not is_text(one.prompt):
            raise UserError(f"{one.path}: its name or prompt is no UTF-8 text, which no page can hold: rename it")
    rng = random.Random(options.seed)
    pairs = choose_pairs(candidates, rng, options.max_pairs)
    make_room(options.output, "--output")
    read = read_images(pairs, options.image_size)
    faults = [f"{path}: {fault}" for path, fault in read.items() if isinstance(fault, str)]
    if faults and not options.skip_missing:
        raise UserError(f"{len(faults)} of {len(read)} images cannot be read ({faults[0]}): repair them, or leave their pairs "
                        "out with --skip_missing")
    whole = [pair for pair in pairs if not any(isinstance(read[one.path], str) for one in pair)]
    kept = [(a, b) for a, b in whole if read[a.path][0] != read[b.path][0]]
    for count, why in ((len(pairs) - len(whole), "have an image that cannot be read"),
                       (len(whole) - len(kept), "show the same image twice")):
        if count:
            print(f"{count} of {len(pairs)} pairs {why}: left out", file=sys.stderr)
    if not kept:
        raise UserError("no pair is left to judge: give manifests or a folder with other images")

    from common.votes import counted, plan_digest
    from eval.pages import write_page
    plan, paths = make_plan(kept, {one.path: read[one.path][0] for pair in kept for one in pair}, rng, options.repeat)
    page = write_page(Path(options.output), "judge.html.j2", pairs=len(plan["pairs"]),
                      data={"page": plan_digest(plan), "plan": plan, "images": [read[path][1] for path in paths]})
    print(f"wrote {page}: {counted(len(plan['pairs']), 'pair')} of {counted(len(paths), 'image')}, "
          f"{page.stat().st_size / 2**20:.1f} MB\n" + "\n".join(what_is_next(page, options)))


if __name__ == "__main__":
    run_program(main)
