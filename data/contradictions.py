"""Preference pairs that contradict each other: the same two images under one caption, with opposite winners."""

import hashlib
from collections import defaultdict

import numpy as np

from data.bad_pairs import BadPair, read_row
from common.images import BadImage, image_bytes
from data.choosing import PairTable
from data.table import column_values, encoded_lengths


def contradictions(pairs: PairTable) -> list[list[int]]:
    """Groups of rows of the table that show the same two images, by content and in any order, under one caption and do
    not agree on the winner, in the order of their first rows.

    Exact, and cheap on data without any: only rows that share caption and image sizes in bytes are read.
    """
    if len(pairs.image_columns) < 2:
        return []
    captions = column_values(pairs.rows, pairs.caption_column)
    lengths = np.stack([encoded_lengths(pairs.rows, column) for column in pairs.image_columns], axis=1)
    alike = defaultdict(list)
    for row, first_wins in zip(pairs.index.tolist(), pairs.first_wins.tolist()):
        alike[captions[row], tuple(sorted(lengths[row].tolist()))].append((row, first_wins))
    groups = []
    for members in alike.values():
        if len(members) > 1:
            groups += _opposed(pairs, members)
    return sorted(groups)


def _opposed(pairs: PairTable, members: list[tuple[int, bool]]) -> list[list[int]]:
    """Of rows that may show the same images, the groups that do, and disagree."""
    by_images = defaultdict(dict)  # the two images -> row -> the winning one
    for row, first_wins in members:
        try:
            cells = read_row(pairs.rows, row)
            digests = [hashlib.sha256(image_bytes(cells[column])).digest() for column in pairs.image_columns]
        except (BadPair, BadImage):
            continue
        if digests[0] != digests[1]:
            by_images[frozenset(digests)][row] = digests[0 if first_wins else 1]
    return [list(winners) for winners in by_images.values() if len(set(winners.values())) > 1]
