"""The SPO experiment's own parts; its runs are scripts/compare_spo.sh."""

import json
import random

import numpy as np
import pytest
import torch

from shapes.drawing import caption, random_drawing, render, wrong_colour
from shapes.pipeline import clip_tokenizer
from shapes.spo_comparison import Settings
from shapes.spo_runs import OFFLINE, ONLINE, OracleModel, Run, late_score, report
from models.tokens import tokenize


def test_the_oracle_as_a_judge_reads_the_prompts_back_from_their_tokens():
    rng, tokenizer = random.Random(0), clip_tokenizer()
    drawings = [random_drawing(rng) for _ in range(3)]
    model = OracleModel(tokenizer)
    rows = model.text_features(tokenize(tokenizer, [caption(drawing) for drawing in drawings]))
    right = torch.stack([torch.from_numpy(np.asarray(render(d, 32)) / 255).permute(2, 0, 1) for d in drawings])
    wrong = torch.stack([torch.from_numpy(np.asarray(render(wrong_colour(d, rng), 32)) / 255).permute(2, 0, 1)
                         for d in drawings])
    scores = model.score(torch.cat([right, wrong]), torch.zeros(6), rows.repeat(2))
    assert (scores[:3] > scores[3:]).all()


def test_late_score_is_the_mean_of_the_second_half():
    assert late_score([0.9, 0.1, 0.2, 0.4]) == pytest.approx(0.3)


def test_report_holds_every_method_and_when_it_reached_diffusion_dpo(tmp_path):
    settings = Settings(output=str(tmp_path), seconds=20.0, points=2, seeds=1)
    methods = [*OFFLINE, *ONLINE]
    records = []
    for method in methods:
        end = 0.8 if method == "spo" else 0.6
        pairs = {"cosine": 0.001, "lambda": 1.0, "lambda_below_one": 0.0, "kept_share": 0.5} if method in ONLINE else {}
        records.append({"method": method, "learning_rate": 1e-5, "seed": 1, "split": "test", "pairs": pairs,
                        "curve": [[0, 0, 0.5], [10, 5, end], [20, 10, end]]})
    (tmp_path / "prepared.json").write_text(json.dumps({"spm": 100.0, "pairs": 50.0}))
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm" / "accuracy.json").write_text(json.dumps([{"step": 0, "accuracy_t0": 0.5},
                                                                {"step": 9, "accuracy_t0": 0.9}]))
    text = report(settings, {method: 1e-5 for method in methods}, records, minutes=1)
    assert "| spo | 1e-05 | 10 | 0.800 | 0.800 | 10 |" in text and "t=0 0.50 -> 0.90" in text
    assert all(f"| {method} |" in text for method in methods) and "mean lambda 1.0000" in text
    assert (tmp_path / "spo.png").stat().st_size > 5000 and (tmp_path / "spo.md").read_text() == text


def test_names_of_runs_are_file_names():
    assert Run("spo, winners only", 8e-5, 1, "test").name == "spo-winners-only_lr8e-05_seed1"
