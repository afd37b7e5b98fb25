"""Look through a dataset of preference pairs before training on it, with the code that training reads it with.

    python -m data.check DATASET [--split train] [--report bad_data.jsonl]

DATASET is a hub id, a local folder or a parquet file. Tells which pairs would be dropped, used with a remark, or
replaced by their neighbour, and why; exits 1 where more than --max_bad_fraction of them cannot be used.
"""

import hashlib
import json
import os
import re
from argparse import ArgumentParser
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from tqdm import tqdm

from common.train_options import TrainArguments
from data.bad_pairs import BadPair, read_caption, read_row
from training.checkpoints import write_whole
from data.pairs import PairDataset, PairTable, choose_pairs, load_table
from common.errors import UserError, run_program
from common.images import BadImage, image_bytes, image_mode

LONG_CAPTION = 1000  # characters; a prompt is cut at 77 tokens


@dataclass
class PairReport:
    """fault: column and reason why the pair cannot be used, or None. remarks: what is odd about it though it is used.
    content: digest of caption and images, for finding duplicates."""

    row: int
    fault: tuple[str, str] | None = None
    remarks: list[str] = field(default_factory=list)
    content: bytes = b""


class CheckedPairs(torch.utils.data.Dataset):
    """Index of a pair -> its PairReport."""

    def __init__(self, pairs: PairTable, args: TrainArguments):
        self.dataset = PairDataset(pairs, [], args, seed=0, latent_shape=(1, 1, 1))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> PairReport:
        report = PairReport(self.dataset.row(index))
        try:
            self.dataset.read(index, self.dataset.draw(index))
        except BadPair as error:
            report.fault = error.column, error.reason
            return report
        pairs = self.dataset.pairs
        row = read_row(pairs.rows, report.row)
        caption = read_caption(row, pairs.caption_column)
        sha = hashlib.sha256(caption.encode())
        if not caption.strip():
            report.remarks.append("empty caption, trained on as the empty prompt")
        if len(caption) > LONG_CAPTION:
            report.remarks.append(f"caption of more than {LONG_CAPTION} characters, cut at 77 tokens")
        for column in pairs.image_columns:
            try:
                data = image_bytes(row[column])
            except BadImage:  # sft does not read the loser
                continue
            sha.update(hashlib.sha256(data).digest())
            mode = image_mode(data)
            if mode != "RGB":
                report.remarks.append(f"{mode} image, converted to RGB")
        report.content = sha.digest()
        return report


def look_through(pairs: PairTable, args: TrainArguments, workers: int) -> list[PairReport]:
    loader = torch.utils.data.DataLoader(CheckedPairs(pairs, args), batch_size=32, collate_fn=list, num_workers=workers)
    bar = tqdm(total=len(pairs), unit="pair", desc="checking", dynamic_ncols=True)
    reports = []
    for batch in loader:
        reports += batch
        bar.update(len(batch))
    bar.close()
    first_with = {}
    for report in reports:
        if report.fault is None and first_with.setdefault(report.content, report.row) != report.row:
            report.remarks.append("duplicate of an earlier pair")
    return reports


def grouped(lines: list[tuple[str, int]], most: int = 20) -> list[str]:
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


def main() -> int:
    parser = ArgumentParser(prog="python -m data.check", description="Look through preference pairs before training.")
    parser.add_argument("dataset", help="hub id, local folder or parquet file")
    parser.add_argument("--dataset_config_name", help="configuration of the hub dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--caption_column", default="caption")
    parser.add_argument("--image_column", default="image", help="of a dataset without pairs, for sft")
    parser.add_argument("--cache_dir", help="where hub downloads are kept")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01)
    parser.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--report", help="write each pair that cannot be used to this file, as a line of JSON")
    options = parser.parse_args()
    if options.num_workers < 0:
        raise UserError(f"--num_workers must not be negative, is {options.num_workers}")
    if options.report and not Path(options.report).absolute().parent.is_dir():
        raise UserError(f"--report {options.report}: there is no folder {Path(options.report).parent}")
    datasets.disable_progress_bars()
    local = Path(options.dataset).exists()
    args = TrainArguments("none", dataset_name=None if local else options.dataset,
                          train_data_dir=options.dataset if local else None, split=options.split, cache_dir=options.cache_dir,
                          dataset_config_name=options.dataset_config_name, caption_column=options.caption_column,
                          image_column=options.image_column, resolution=64, proportion_empty_prompts=0.0)
    table = load_table(args)
    if "jpg_0" not in table.column_names and options.image_column in table.column_names:
        args.train_method = "sft"
    pairs = choose_pairs(table, args, seed=0)

    print(f"{options.dataset}, split {options.split}: {len(table)} rows, {len(pairs)} to train on")
    for note in pairs.notes:
        print(f"  {note}")
    reports = look_through(pairs, args, options.num_workers)
    bad = [report for report in reports if report.fault]
    remarks = [(remark, report.row) for report in reports for remark in report.remarks]
    if remarks:
        print("Used, with a remark:", *grouped(remarks), sep="\n")
    share = len(bad) / len(reports)
    print(f"Cannot be used, their neighbours take their place: {len(bad)} of {len(reports)} ({share:.2%})",
          *grouped([(f"{report.fault[0]}: {report.fault[1]}", report.row) for report in bad]), sep="\n")
    if options.report:
        lines = [json.dumps({"row": r.row, "column": r.fault[0], "reason": r.fault[1]}) + "\n" for r in bad]
        write_whole(Path(options.report), "".join(lines))
    if share > options.max_bad_fraction:
        raise UserError(f"{share:.2%} of the pairs cannot be used, more than --max_bad_fraction "
                        f"{options.max_bad_fraction:g}: training on them would stop; raise the bound there, too, to train on the others")
    return 0


if __name__ == "__main__":
    run_program(main)
