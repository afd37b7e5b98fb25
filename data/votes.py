"""Votes of people to preference pairs that train.py reads.

    python -m data.votes votes.json [MORE.json ...] --output my_pairs
    accelerate launch train.py --train_data_dir my_pairs ...

Writes OUTPUT/train-00000.parquet: caption, jpg_0, jpg_1 (the files as they are), label_0 (1 where image 0 has more than half
of the votes, 0 where image 1 has, 0.5 for a tie, which training drops), and where they come from: model_0, model_1, path_0,
path_1, judges, votes_0, votes_1, votes_tie, votes_bad. "Both bad" counts as a tie.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path

from common.errors import UserError, run_program
from common.files import make_folder, whole_file
from common.images import BadImage, image_bytes
from common.options import option, parse
from common.votes import Ballot, Judged, Shown, counted, gather, read_votes

FILE = "train-00000.parquet"
ROWS_AT_ONCE = 64  # images in memory


@dataclass
class VotesOptions:
    title = "the votes"

    votes: list[str] = option(MISSING, "files that pages of eval.judge saved", positional=True)
    output: str = option(MISSING, "folder for the pairs")
    skip_missing: bool = option(False, "leave out pairs whose images are gone or changed, with a count")


def label(judged: Judged) -> float:
    """label_0 by the share of the votes, a tie one half."""
    net = sum(judged.values())
    return 1.0 if net > 0 else 0.0 if net < 0 else 0.5


def read_shown(image: Shown) -> bytes:
    """The image that was judged. Raises BadImage when it is gone or is another one now."""
    data = image_bytes({"path": image.path})
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise BadImage(f"{image.path} has changed since it was judged")
    return data


def check_images(judged: list[Judged], skip: bool) -> list[Judged]:
    """The pairs whose two images are there as they were. Raises UserError, or with `skip` leaves the others out."""
    whole, faults = [], []
    for pair in judged:
        try:
            read_shown(pair.first), read_shown(pair.second)
            whole.append(pair)
        except BadImage as fault:
            faults.append(str(fault))
    if faults and not skip:
        raise UserError(f"{len(faults)} of {len(judged)} pairs have an image that is gone or changed ({faults[0]}): bring "
                        "it back, or leave these pairs out with --skip_missing")
    if faults:
        print(f"{len(faults)} of {len(judged)} pairs have an image that is gone or changed: left out", file=sys.stderr)
    if not whole:
        raise UserError("no pair is left that has both its images")
    return whole


def rows(judged: list[Judged], ballots: list[Ballot]) -> Iterator[dict]:
    names = {ballot.judge: ballot.name or ballot.judge for ballot in ballots}
    for pair in judged:
        choices = list(pair.choices.values())
        yield {"caption": pair.prompt, "jpg_0": read_shown(pair.first), "jpg_1": read_shown(pair.second),
               "label_0": label(pair), "model_0": pair.first.model, "model_1": pair.second.model,
               "path_0": pair.first.path, "path_1": pair.second.path, "judges": [names[judge] for judge in pair.choices],
               "votes_0": choices.count("left"), "votes_1": choices.count("right"),
               "votes_tie": choices.count("tie"), "votes_bad": choices.count("bad")}


def write_pairs(folder: Path, judged: list[Judged], ballots: list[Ballot]) -> Path:
    """The parquet file, whole or absent. Raises UserError when the folder holds another, which training would read too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_folder(folder, "--output")
    if others := [path.name for path in folder.glob("*.parquet") if path.name != FILE]:
        raise UserError(f"--output: {folder} holds other pairs ({others[0]}): name another folder")
    schema = pa.schema([("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()),
                        *((name, pa.string()) for name in ("model_0", "model_1", "path_0", "path_1")),
                        ("judges", pa.list_(pa.string())),
                        *((name, pa.int64()) for name in ("votes_0", "votes_1", "votes_tie", "votes_bad"))])
    with whole_file(folder / FILE) as aside, pq.ParquetWriter(aside, schema) as writer:
        for start in range(0, len(judged), ROWS_AT_ONCE):
            some = list(rows(judged[start:start + ROWS_AT_ONCE], ballots))
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
    return folder / FILE


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([VotesOptions], argv, program="python -m data.votes", description=__doc__)
    ballots = read_votes(options.votes)
    judged = check_images(list(gather(ballots).values()), options.skip_missing)
    path = write_pairs(Path(options.output), judged, ballots)
    labels = [label(pair) for pair in judged]
    decided = len(labels) - labels.count(0.5)
    print(f"wrote {path}: {counted(len(judged), 'pair')} by {counted(len({ballot.judge for ballot in ballots}), 'judge')}, "
          f"{decided} decided, {counted(labels.count(0.5), 'tie')} that training drops")


if __name__ == "__main__":
    run_program(main)
