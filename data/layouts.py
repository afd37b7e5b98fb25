"""How a table of preference data is laid out: which columns hold the two images, and what says which of them is preferred.

Known are Pick-a-Pic (jpg_0, jpg_1, label_0), a winner's and a loser's column, two numbered images with a label or two
scores, and single images, liked or disliked. --winner_column, --loser_column and --label_column name any other.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import UserError
from common.train_options import DataOptions

CAPTIONS = ("caption", "prompt", "text")  # where the first is not there, the next
WINNER_AND_LOSER = (("chosen", "rejected"), ("winner", "loser"), ("w", "l"), ("image_w", "image_l"),
                    ("chosen_image", "rejected_image"), ("image_chosen", "image_rejected"))
NUMBERED = (("image_0", "image_1"), ("image0", "image1"), ("image_1", "image_2"), ("image1", "image2"),
            ("image_a", "image_b"))
NAMES_THE_WINNER = ("preference", "preferred", "winner", "choice", "best", "label")
SCORES = ("votes_{}", "votes_image{}", "votes_image_{}", "votes{}", "score_{}", "score_image{}", "score{}", "label_{}",
          "label{}", "preference_{}", "weighted_results_image{}_preference")
SHARES = ("label_{}", "label{}", "preference_{}")
TIES = ("tie", "both", "neither", "none", "draw", "equal", "0.5", "")
LIKED, DISLIKED = ("true", "yes", "like", "liked", "1", "1.0"), ("false", "no", "dislike", "disliked", "0", "0.0")


@dataclass(frozen=True)
class Layout:
    """images: two columns, or the one of single images. labels: the columns that decide. rule, how they do:

    "label_0": 1, 0 or 0.5, as Pick-a-Pic. "first": image 0 always wins. "share": of the votes for image 0. "scores": the
    higher wins. "name": text that names the winner. "like": a single image is liked or not.
    """

    caption: str
    images: list[str]
    labels: list[str]
    rule: Literal["label_0", "first", "share", "scores", "name", "like"]

    def __str__(self) -> str:
        images, labels = " / ".join(self.images), " and ".join(self.labels)
        if len(self.images) == 1:
            return f"single images in {images}" + (f", liked by {labels}" if labels else "")
        how = {"label_0": f"Pick-a-Pic: {images}, decided by {labels}", "first": f"winner / loser in {images}",
               "share": f"{images}, decided by {labels}, {self.images[0]}'s share of the votes",
               "scores": f"{images}, the higher of {labels} wins", "name": f"{images}, {labels} names the winner"}
        return how[self.rule]


def caption_column(names: list[str], data: DataOptions) -> str:
    """--caption_column; where that is left at its default and the table lacks it, the next usual name that is there."""
    known = [name for name in CAPTIONS if name in names]
    return data.caption_column if data.caption_column != CAPTIONS[0] or not known else known[0]


def find_layout(names: list[str], data: DataOptions, method: str | None = None, labelled: bool = True) -> Layout:
    """The layout of a table with these columns. method: what it is for (None: anything); single images are for sft and kto.
    labelled: something in the table has to say who wins. Raises UserError where none fits, or more than one."""
    caption, source = caption_column(names, data), data.source or f"the cache {data.cached_dataset}"
    if data.winner_column:
        images, labels = [data.winner_column, data.loser_column], list(data.label_column)
        return Layout(caption, images, labels, _rule(labels) if labels else "first")
    found = _pair_layouts(names, caption, data, labelled)
    if not found and method in (None, "sft", "kto") and data.image_column in names:
        label = [*data.label_column, "label"][0]
        likes = method == "kto" or method is None and label in names
        return Layout(caption, [data.image_column], [label] if likes else [], "like" if likes else "first")
    if len(found) == 1:
        return found[0]
    has = f"it has {', '.join(names)}"
    if found:
        raise UserError(f"{source} can be read in {len(found)} ways ({'; '.join(map(str, found))}), {has}: choose with "
                        "--winner_column and --loser_column, and --label_column where not the first always wins")
    alone = f"; {method} also takes single images ({data.image_column}{' and label' * (method == 'kto')})" * (
        method in ("sft", "kto"))
    raise UserError(f"{source} is in no known layout of preference pairs, {has}. Known: caption or prompt, with jpg_0, "
                    "jpg_1 and label_0, or chosen and rejected, or image_0 and image_1 with a label or two scores"
                    f"{alone}; or name its columns with --winner_column and --loser_column, and --label_column")


def _pair_layouts(names: list[str], caption: str, data: DataOptions, labelled: bool) -> list[Layout]:
    """Every layout of pairs that these columns fit."""
    given, found = list(data.label_column), []
    if "jpg_0" in names or "jpg_1" in names:
        images = ["jpg_0", "jpg_1"]
        labels, rule = (given, _rule(given)) if given else (["label_0"], "label_0")
        found.append(Layout(caption, images, labels, rule))
    for pair in WINNER_AND_LOSER:
        if set(pair) <= set(names):
            found.append(Layout(caption, list(pair), given, _rule(given) if given else "first"))
    for first, second in NUMBERED:
        if not {first, second} <= set(names):
            continue
        a, b = (name.removeprefix("image").removeprefix("_") for name in (first, second))
        two = [[form.format(a), form.format(b)] for form in SCORES if {form.format(a), form.format(b)} <= set(names)]
        shares = [[form.format(a)] for form in SHARES if form.format(a) in names and form.format(b) not in names]
        named = [[name] for name in NAMES_THE_WINNER if name in names]
        ways = ([(given, _rule(given))] if given else [(labels, "scores") for labels in two]
                + [(labels, "share") for labels in shares] + [(labels, "name") for labels in named])
        if not labelled:
            ways = ways[:1] or [([], "first")]
        found += [Layout(caption, [first, second], labels, rule) for labels, rule in ways]
    return found


def _rule(labels: list[str]) -> Literal["share", "scores"]:
    """What columns that --label_column names mean: one is the first image's share, two are scores."""
    return "share" if len(labels) == 1 else "scores"


# --- who wins ------------------------------------------------------------------------------------------------------------

def decide(layout: Layout, columns: list[np.ndarray], source: str) -> np.ndarray:
    """1.0 (image 0 wins; liked), 0.0, 0.5 (a tie) or None (no label) for each row, from the layout's label columns; of
    Pick-a-Pic its column as it is. (rows,) object. Raises UserError for a cell that says nothing of the kind."""
    if layout.rule == "label_0":
        return columns[0]
    rows = zip(*columns)
    answers = np.empty(len(columns[0]), dtype=object)
    for number, cells in enumerate(rows):
        if any(cell is None or cell != cell for cell in cells):
            continue
        try:
            answers[number] = _ANSWERS[layout.rule](cells, layout)
        except (ValueError, TypeError):
            shown = ", ".join(str(cell)[:60] for cell in cells)
            raise UserError(f"{source}: row {number} has {shown} in {', '.join(layout.labels)}, which must be "
                            f"{_EXPECTED[layout.rule].format(*layout.images)}") from None
    return answers


def _share(cells: tuple, layout: Layout) -> float:
    share = float(cells[0])
    if not 0 <= share <= 1:
        raise ValueError
    return _higher(share, 0.5)


def _scores(cells: tuple, layout: Layout) -> float:
    first, second = map(float, cells)
    if math.isinf(first) or math.isinf(second):
        raise ValueError
    return _higher(first, second)


def _higher(a: float, b: float) -> float:
    return 1.0 if a > b else 0.0 if a < b else 0.5


def _name(cells: tuple, layout: Layout) -> float:
    words = {name.lower(): answer for name, answer in zip(layout.images, (1.0, 0.0))} | dict.fromkeys(TIES, 0.5)
    word = cells[0].strip().lower() if isinstance(cells[0], str) else None
    if word not in words:
        raise ValueError
    return words[word]


def _like(cells: tuple, layout: Layout) -> float:
    word = str(cells[0]).strip().lower()
    if word not in LIKED + DISLIKED:
        raise ValueError
    return 1.0 if word in LIKED else 0.0


_ANSWERS = {"share": _share, "scores": _scores, "name": _name, "like": _like}
_EXPECTED = {
    "share": "{0}'s share of the votes, in [0, 1]", "scores": "a score of {0} and one of {1}",
    "name": "\"{0}\", \"{1}\" or \"tie\"; a number is taken for {0}'s share of the votes where --label_column names the "
            "column (and for {1}'s with --winner_column {1} --loser_column {0})",
    "like": "true or false, 1 or 0",
}
