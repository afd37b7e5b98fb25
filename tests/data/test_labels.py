"""--choice_model: the real program relabels the pairs by a small scorer of the real classes."""

from dataclasses import fields

import numpy as np
import pytest

from eval.metrics import load_metric
from shapes.tiny_metrics import write_tiny_metrics
from common.images import decode_image
from common.options import option_type
from common.train_checks import parse_options
from common.train_options import DataOptions
from data.table import load_table
from data.labels import labels_from_scores, score_rows


def test_the_better_score_wins_ties_are_undecided_and_unusable_rows_have_no_label():
    scores = np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [np.nan, 1.0]])
    assert labels_from_scores(scores).tolist() == [1.0, 0.0, 0.5, None]


@pytest.mark.slow
def test_train_relabels_once_and_reuses_it(tiny_sd15, pairs_dir, tmp_path, train):
    config = write_tiny_metrics(tmp_path / "metrics")
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir,
               "--resolution", 64, "--mixed_precision", "no", "--max_train_steps", 1, "--lr_warmup_steps", 0, "--seed", 0,
               "--choice_model", "pickscore", "--metrics_config", config, "--output_dir", tmp_path / "out"]
    told = train(flags)
    assert "64 pairs" in told and "labels by pickscore" in told
    [scores] = (tmp_path / "out" / "ai_feedback").glob("*/rows-*.npy")
    written = scores.stat().st_mtime_ns

    table, scorer = load_table(parse_options([str(word) for word in flags]).data), load_metric("pickscore", config=config)
    expected = score_rows(table, range(4), ["caption", "jpg_0", "jpg_1"], scorer)
    np.testing.assert_allclose(np.load(scores)[:4], expected, rtol=1e-5)
    row = table[0]
    one = scorer.score([decode_image(row["jpg_0"])], [row["caption"]])
    np.testing.assert_allclose(one.numpy(), expected[0, :1], rtol=1e-5)

    [choice] = [f for f in fields(DataOptions) if f.name == "choice_model"]
    for name in option_type(choice)[1]:  # every choice scores, in batches
        scorer = load_metric(name, config=config)
        expected = [[scorer.score([decode_image(row[column])], [row["caption"]]).item() for column in ("jpg_0", "jpg_1")]
                    for row in table.select(range(2))]
        np.testing.assert_allclose(score_rows(table, range(2), ["caption", "jpg_0", "jpg_1"], scorer), expected, rtol=1e-4, atol=1e-6)

    train([*flags, "--max_train_steps", 2])
    assert scores.stat().st_mtime_ns == written
