"""Which rows of a table of preference pairs are trained on, and who wins."""

import hashlib
from dataclasses import dataclass

import datasets
import numpy as np

from common.errors import UserError, first_line
from common.train_options import DataOptions
from data.layouts import Layout, decide, find_layout
from data.table import column_values


@dataclass
class PairTable:
    """rows: the table. index: (n,) the usable rows. first_wins: (n,) bool, image 0 is the winner; of single images, whether
    it is liked. image_columns: two, or the one of single images (sft, kto). notes: what was dropped, and layout how the
    table was read, for the start-up summary."""

    rows: datasets.Dataset
    index: np.ndarray
    first_wins: np.ndarray
    caption_column: str
    image_columns: list[str]
    notes: list[str]
    layout: str = ""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def paired(self) -> bool:
        return len(self.image_columns) == 2

    def digest(self) -> str:
        """Identity of the choice: which rows of how many, their captions, and who wins."""
        sha = hashlib.sha256(len(self.rows).to_bytes(8, "big") + self.index.tobytes() + self.first_wins.tobytes())
        for caption in column_values(self.rows, self.caption_column):
            sha.update(repr(caption).encode("utf-8", "surrogatepass"))
        return sha.hexdigest()[:16]


def choose_pairs(table: datasets.Dataset, data: DataOptions, seed: int, labels: np.ndarray | None = None,
                 method: str | None = "diffusion-dpo") -> PairTable:
    """Which rows are trained on, and who wins (rules: data/layouts.py; ties are dropped).

    labels: (rows,) of 1, 0 and 0.5, for AI feedback, replace the table's. method: sft and kto (or None, for any) will do
    with single images. Raises UserError for an unknown layout, missing columns, labels that decide nothing, or when
    nothing is left.
    """
    notes, source = [], data.source or f"the cache {data.cached_dataset}"
    layout = layout_of(table, data, method, labelled=labels is None)
    keep = np.ones(len(table), dtype=bool)
    first_wins = np.ones(len(table), dtype=bool)
    if labels is not None or layout.labels:
        if labels is None:
            labels = labels_of(table, layout, source)
        first_wins, keep, dropped = winners(labels, layout.rule, source)
        if data.choice_model:
            notes.append(f"{len(table)} pairs have their labels by {data.choice_model}")
        notes += dropped
    if data.dataset_shards and table.info.description:
        notes.insert(0, table.info.description)
    if data.dreamlike_pairs_only:
        dream = np.array(["dream" in str(a).lower() and "dream" in str(b).lower()
                          for a, b in zip(column_values(table, "model_0"), column_values(table, "model_1"))], dtype=bool)
        notes.append(f"{int((keep & ~dream).sum())} pairs dropped that are not of two Dreamlike models")
        keep &= dream
    index = np.flatnonzero(keep)
    if data.max_train_samples is not None and data.max_train_samples < len(index):
        index = np.random.default_rng([seed, 2]).permutation(index)[:data.max_train_samples]
        notes.append(f"{len(index)} kept by --max_train_samples")
    if len(index) == 0:
        raise UserError(f"no usable pair is left of {len(table)} in {source}: {'; '.join(notes) or 'it is empty'}")
    return PairTable(table, index, first_wins[index], layout.caption, layout.images, notes, str(layout))


def layout_of(table: datasets.Dataset, data: DataOptions, method: str | None, labelled: bool = True) -> Layout:
    """How the table is read. Raises UserError for an unknown layout and for columns that it lacks."""
    names, source = table.column_names, data.source or f"the cache {data.cached_dataset}"
    layout = find_layout(names, data, method, labelled)
    needed = [layout.caption, *layout.images] + layout.labels * labelled
    needed += ["model_0", "model_1"] if data.dreamlike_pairs_only else []
    missing = [name for name in needed if name not in names]
    if missing:
        raise UserError(f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
                        f"{', '.join(names)}. It is read as {layout}; other columns can be named with --caption_column, "
                        "--winner_column, --loser_column and --label_column")
    return layout


def labels_of(table: datasets.Dataset, layout: Layout, source: str) -> np.ndarray:
    """What the table says of every row: 1 (image 0 wins; liked), 0, 0.5 or None; (rows,) object. Raises UserError."""
    if not layout.labels:
        return np.ones(len(table), dtype=object)
    return decide(layout, [column_values(table, name) for name in layout.labels], source)


def label_values(labels: np.ndarray, source: str) -> np.ndarray:
    """Labels of 1, 0, 0.5 and None as numbers, NaN where there is none; (rows,). Raises UserError for any other label."""
    if any(isinstance(label, (list, dict, np.ndarray)) for label in labels):
        raise UserError(f"{source}: label_0 must be 0, 0.5 or 1, not a list")
    try:
        values = np.array([np.nan if label is None else label for label in labels], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: label_0 must be 0, 0.5 or 1 ({first_line(error)})") from None
    odd = np.flatnonzero(~np.isin(values, (0.0, 0.5, 1.0)) & ~np.isnan(values))
    if len(odd):
        raise UserError(f"{source}: label_0 must be 0, 0.5 or 1, but row {odd[0]} has {labels[odd[0]]} "
                        f"({len(odd)} such rows); --label_column label_0 takes it for a share of votes")
    return values


def winners(labels: np.ndarray, rule: str, source: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels of 1, 0, 0.5 and None -> whether image 0 wins, which rows decide, (rows,) each, and what is dropped, in words.
    Raises UserError for any other label."""
    values = label_values(labels, source)
    unlabelled = np.isnan(values)
    keep, undecided, notes = np.isin(values, (0.0, 1.0)), int((values == 0.5).sum()), []
    if rule == "like":
        notes.append(f"{int((values == 1.0).sum())} of {len(labels)} images are liked")
    else:
        notes.append(f"{undecided} of {len(labels)} pairs dropped without a decision (label_0 = 0.5)" if rule == "label_0"
                     else f"{undecided} of {len(labels)} pairs dropped as ties")
    if unlabelled.any():
        notes.append(f"{int(unlabelled.sum())} {'images' if rule == 'like' else 'pairs'} dropped without a label")
    return values == 1.0, keep, notes
