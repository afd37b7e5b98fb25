"""What python -m data.check finds in a dataset of preference pairs, and how it reports it."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from common.errors import UserError, warn
from common.files import write_text
from common.progress import progress_bar
from common.train_options import DataOptions, TrainOptions
from data.bad_pairs import BadPair, allowed_bad_pairs, read_caption, read_row
from data.contradictions import contradictions
from common.images import BadImage, how_stored, image_bytes
from data.pairs import MAX_PASSED_OVER, PairDataset
from data.sheet import write_sheet
from data.choosing import PairTable, choose_pairs
from data.table import load_table
from models.family import Family

DECODED_AT = 64  # pixels: enough to see whether an image can be read
NAMED = 20  # rows that a list names
FLAT, DUPLICATE = "an image is one flat colour", "duplicate of an earlier pair"
TWICE = "the same picture twice, in two files: there is nothing to prefer"
CONVERTED = "image, converted"


@dataclass
class PairReport:
    """fault: column and reason why the pair cannot be used, or None. remarks: what is odd about it though it is used.
    content: digest of caption and images, for finding duplicates. sizes: (width, height) of its images."""

    row: int
    caption: str = ""
    fault: tuple[str, str] | None = None
    remarks: list[str] = field(default_factory=list)
    content: bytes = b""
    sizes: list[tuple[int, int]] = field(default_factory=list)


class CheckedPairs(torch.utils.data.Dataset):
    """Index of a pair -> its PairReport."""

    def __init__(self, pairs: PairTable, data: DataOptions, winners_only: bool):
        self.dataset = PairDataset(pairs, data, seed=0, latent_shape=(1, 1, 1), tokenize=lambda captions: {},
                                   winners_only=winners_only)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> PairReport:
        report = PairReport(self.dataset.row(index))
        try:
            pixels = self.dataset.read(index, self.dataset.draw(index))["pixel_values"]
        except BadPair as error:
            report.fault = error.column, error.reason
            return report
        pairs = self.dataset.pairs
        row = read_row(pairs.rows, report.row)
        report.caption = read_caption(row, pairs.caption_column)
        sha = hashlib.sha256(report.caption.encode())
        if not report.caption.strip():
            report.remarks.append("empty caption, trained on as the empty prompt")
        for column in pairs.image_columns:
            try:
                encoded = image_bytes(row[column])
            except BadImage:  # sft does not read the loser
                continue
            sha.update(hashlib.sha256(encoded).digest())
            mode, transparent, size = how_stored(encoded)
            report.sizes.append(size)
            if mode != "RGB" or transparent:
                report.remarks.append(f"{mode} {CONVERTED} to RGB{', over white where transparent' * transparent}")
        if any(image.amin((1, 2)).equal(image.amax((1, 2))) for image in pixels):
            report.remarks.append(FLAT)
        if len(pixels) == 2 and torch.equal(*pixels):
            report.remarks.append(TWICE)
        report.content = sha.digest()
        return report


def look(options: TrainOptions, family: Family | None, workers: int, report_file: str | None,
         sheet: str | None = None, sheet_pairs: int = 12) -> None:
    """Look through the pairs that the options name and print what is found. Raises UserError for too many bad pairs."""
    data = options.data
    resolution = data.resolution or (family.training_resolution if family else 512)
    table = load_table(data, options.model.cache_dir)
    winners_only, method = options.objective.winners_only, options.objective.train_method
    pairs = choose_pairs(table, data, seed=0, method=method if "train_method" in options.given or winners_only else None)
    print(f"{data.source}, split {data.split}: {len(table)} rows, {len(pairs)} to train on\n  read as {pairs.layout}")
    for note in pairs.notes:
        print(f"  {note}")
    reports = look_through(pairs, data, workers, winners_only)
    bad = [report for report in reports if report.fault]
    used = [report for report in reports if not report.fault]
    assumed = "" if data.resolution or family else " (assumed: name the base with --pretrained_model_name_or_path)"
    print(*balance(pairs), *sizes(used, resolution, assumed), sep="\n")
    share = len(bad) / len(reports)
    print(f"Cannot be used, their neighbours take their place: {len(bad)} of {len(reports)} ({share:.2%})",
          *grouped([(f"{report.fault[0]}: {report.fault[1]}", report.row) for report in bad]), sep="\n")
    contradicting = contradictions(pairs)
    print(*opposed(contradicting), *truncated(used, family), sep="\n")
    remarks = [(remark, report.row) for report in used for remark in report.remarks]
    if remarks:  # the harmless ones last
        odd, harmless = ([found for found in remarks if (CONVERTED in found[0]) == last] for last in (False, True))
        print("Used, with a remark:", *grouped(odd), *grouped(harmless), sep="\n")
    if sheet:
        marks = marked(reports, contradicting)
        print(f"{write_sheet(pairs, sheet, sheet_pairs, marks)} of the pairs are drawn in {sheet}")
    if report_file:
        lines = [json.dumps({"row": r.row, "column": r.fault[0], "reason": r.fault[1]}) + "\n" for r in bad]
        write_text(report_file, "".join(lines))
    stop_where_training_would(reports, data.max_bad_fraction)


def stop_where_training_would(reports: list[PairReport], bound: float) -> None:
    """Raises UserError where a pass over these pairs would be stopped; warns where more than the bound, but not clearly
    more, cannot be used."""
    bad = np.array([report.fault is not None for report in reports])
    share, count = bad.mean(), int(bad.sum())
    if count > allowed_bad_pairs(len(bad), bound):
        raise UserError(f"{share:.2%} of the pairs cannot be used, clearly more than --max_bad_fraction {bound:g}: training "
                        "on them would stop; raise the bound there, too, to train on the others")
    good = np.flatnonzero(~np.tile(bad, 2))  # twice: the last pair's neighbour is the first
    in_a_row, before = max(zip(np.diff(good) - 1, good), default=(len(bad), -1))
    if in_a_row >= min(len(bad), MAX_PASSED_OVER):
        raise UserError(f"{in_a_row} pairs in a row cannot be used, from row {reports[(before + 1) % len(bad)].row} on: "
                        "training would stop there; take them out")
    if share > bound:
        warn(f"{share:.2%} of the pairs cannot be used, more than --max_bad_fraction {bound:g}, but not clearly more: "
             "training on them would go on")


def look_through(pairs: PairTable, data: DataOptions, workers: int, winners_only: bool = False) -> list[PairReport]:
    quick = DataOptions(**vars(data) | {"resolution": DECODED_AT, "proportion_empty_prompts": 0.0, "random_crop": False,
                                         "no_hflip": True})
    loader = torch.utils.data.DataLoader(CheckedPairs(pairs, quick, winners_only), batch_size=32, collate_fn=list,
                                         num_workers=workers)
    bar = progress_bar(total=len(pairs), unit="pair", desc="checking")
    reports = []
    for batch in loader:
        reports += batch
        bar.update(len(batch))
    bar.close()
    first_with = {}
    for report in reports:
        if report.fault is None and first_with.setdefault(report.content, report.row) != report.row:
            report.remarks.append(DUPLICATE)
    return reports


# --- what is reported ----------------------------------------------------------------------------------------------------

def balance(pairs: PairTable) -> list[str]:
    """How often image 0 wins: a share far from one half hints at labels that tell the column and not the preference."""
    if not pairs.paired:
        return []
    return [f"Labels: image 0 wins {int(pairs.first_wins.sum())} of {len(pairs)} pairs ({pairs.first_wins.mean():.1%})"]


def sizes(reports: list[PairReport], resolution: int, assumed: str = "") -> list[str]:
    """The images' short sides against the resolution that they are resized to."""
    short = np.array([min(size) for report in reports for size in report.sizes])
    if not len(short):
        return []
    smaller = int((short < resolution).sum())
    common = ", ".join(f"{w}x{h} ({n})" for (w, h), n in Counter(s for r in reports for s in r.sizes).most_common(3))
    enlarged = f"none is enlarged for --resolution {resolution}{assumed}"
    if smaller:
        enlarged = f"{smaller} of {len(short)} are enlarged for --resolution {resolution}{assumed}: details are made up"
    return [f"Images: short sides {short.min()} to {short.max()} pixels, median {int(np.median(short))}; most are {common}; "
            f"{enlarged}"]


def opposed(groups: list[list[int]]) -> list[str]:
    """The pairs that contradict each other."""
    if not groups:
        return []
    rows = sum(map(len, groups))
    named = "; ".join(" and ".join(map(str, group)) for group in groups[:NAMED]) + ", ..." * (len(groups) > NAMED)
    return [f"Contradictions: {rows} pairs show the same two images under one caption with opposite winners (rows {named}): "
            "they cancel out, decide which is right or drop them"]


def marked(reports: list[PairReport], contradicting: list[list[int]]) -> dict[int, str]:
    """Index of a pair -> the word for what is wrong with it, where it is to be looked at."""
    opposed_rows = {row for group in contradicting for row in group}
    words = {TWICE: "same picture", FLAT: "flat colour", DUPLICATE: "duplicate"}
    found = {}
    for index, report in enumerate(reports):
        word = next((words[remark] for remark in words if remark in report.remarks), None)
        word = "contradiction" if report.row in opposed_rows else word
        if word:
            found[index] = word
    return found


def truncated(reports: list[PairReport], family: Family | None) -> list[str]:
    """The captions that the text encoder does not read to their end."""
    if family is None:
        return ["Captions' length was not checked: name the base with --pretrained_model_name_or_path"]
    captions = [report.caption for report in reports]
    tokens, read = family.tokens_read(captions) if captions else (np.zeros(0), np.zeros(0))
    cut = tokens > read
    if not cut.any():
        return [f"Captions: all of them fit {family.label}'s text encoder"]
    rows = ", ".join(str(reports[i].row) for i in np.flatnonzero(cut)[:3])
    lost = 1 - read[cut].sum() / tokens[cut].sum()
    return [f"Captions: {int(cut.sum())} of {len(captions)} are longer than {family.label}'s text encoder reads (rows {rows}"
            f"{', ...' * (int(cut.sum()) > 3)}): {lost:.1%} of their tokens are lost; {family.longer_text}"]


def grouped(lines: list[tuple[str, int]], most: int = NAMED) -> list[str]:
    """(text, row) with numbers in the text ignored -> '   12 x text (rows 3, 17, 20, ...)', the most frequent first."""
    rows, example = defaultdict(list), {}
    for text, row in lines:
        kind = re.sub(r"\d+", "#", text)
        rows[kind].append(row)
        example.setdefault(kind, text)
    ranked = sorted(rows, key=lambda kind: -len(rows[kind]))
    shown = [f"{len(rows[kind]):>8} x {example[kind]} (row{'s' * (len(rows[kind]) > 1)} "
             f"{', '.join(map(str, rows[kind][:3]))}{', ...' * (len(rows[kind]) > 3)})" for kind in ranked[:most]]
    return shown + [f"         and {len(ranked) - most} more kinds"] * (len(ranked) > most)
