"""AI feedback: who wins a pair decided by a scorer instead of by people (--choice_model)."""

import hashlib
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator

from common.files import whole_file
from common.progress import progress_bar
from common.train_options import DataOptions
from data.bad_pairs import BadPair, decode_images, read_caption, read_row
from data.choosing import layout_of
from data.table import content_digest

ROWS_A_FILE = 1024
BATCH = 32


def ai_feedback_labels(table: datasets.Dataset, data: DataOptions, output_dir: Path, accelerator: Accelerator) -> np.ndarray:
    """label_0 of every row by the scorer's comparison of its two images: 1, 0, 0.5 for a tie, None where a row cannot
    be used. (rows,) object.

    The processes share the rows and meet in files under OUTPUT_DIR/ai_feedback, so a restart scores only what is
    missing. Raises UserError when the columns are missing or the scorer cannot be loaded.
    """
    from eval.metrics import load_metric, metric_version

    layout = layout_of(table, data, "pairs", labelled=False)
    columns = [layout.caption, *layout.images]
    version = metric_version(data.choice_model, data.metrics_config)
    key = hashlib.sha256(f"{version}|{layout.caption}|{content_digest(table, data)}".encode()).hexdigest()[:16]
    folder = output_dir / "ai_feedback" / f"{data.choice_model}-{key}"
    folder.mkdir(parents=True, exist_ok=True)

    starts = range(0, len(table), ROWS_A_FILE)
    own = [start for start in starts[accelerator.process_index::accelerator.num_processes]
           if not score_file(folder, start).is_file()]
    if own:
        scorer = load_metric(data.choice_model, device=str(accelerator.device), config=data.metrics_config)
        for start in progress_bar(own, desc=f"{data.choice_model} labels", unit_scale=ROWS_A_FILE, unit="pair",
                                  disable=not accelerator.is_local_main_process):
            scores = score_rows(table, range(start, min(start + ROWS_A_FILE, len(table))), columns, scorer)
            with whole_file(score_file(folder, start)) as aside, open(aside, "wb") as file:
                np.save(file, scores)
        del scorer
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
    return labels_from_scores(np.concatenate([np.load(score_file(folder, start), allow_pickle=False) for start in starts]))


def score_file(folder: Path, start: int) -> Path:
    return folder / f"rows-{start:09d}.npy"


def score_rows(table: datasets.Dataset, rows: range, columns: list[str], scorer) -> np.ndarray:
    """Scores (rows, 2) of both images under their caption; NaN where the row cannot be used as a pair. columns: of the
    caption and of the two images."""
    scores = np.full((len(rows), 2), np.nan)
    for first in range(0, len(rows), BATCH):
        batch = rows[first:first + BATCH]
        places, images, captions = [], [], []
        for place, number in enumerate(batch, start=first):
            try:
                row = read_row(table, number)
                pair, caption = decode_images(row, columns[1:]), read_caption(row, columns[0])
            except BadPair:
                continue
            places.append(place)
            images += pair
            captions += [caption, caption]
        if places:
            scores[places] = scorer.score(images, captions).reshape(-1, 2).double().numpy()
    return scores


def labels_from_scores(scores: np.ndarray) -> np.ndarray:
    """(rows, 2) scores -> (rows,) labels 1, 0, 0.5 or None, as label_0 has them."""
    first, second = scores[:, 0], scores[:, 1]
    labels = np.where(first > second, 1.0, np.where(first < second, 0.0, 0.5)).astype(object)
    labels[np.isnan(scores).any(axis=1)] = None
    return labels
