"""The preference model's training program: loss, labels, weights, and a run on tiny models."""

import io
import json
import math
import os
import signal
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import CLIPImageProcessorPil

from common.errors import UserError
from common.locks import release
from common.train_options import DataOptions
from spo.preference_model.data import LabelledPairs, hold_out, load_pairs
from spo.preference_model.model import EVALUATION_TIMESTEPS, load_spm
from spo.preference_model.options import parse_spm_options
from spo.preference_model.restore import Restorer, accuracies, agreement, labels_from_scores
from spo.preference_model.task import preference_cross_entropy
from spo.preference_model.train import train
from tests.conftest import reset_accelerate
from tests.data.test_layouts import LAYOUTS, WINS
from training.checkpoints import read_progress
from training.optimizers import warmup_then_decay
from training.records import read_metrics


def test_cross_entropy_of_soft_labels():
    scores = torch.tensor([[1.0, 0.0, 2.0, 3.0], [0.0, 1.0, 2.0, 1.0]])
    losses = preference_cross_entropy(scores, torch.tensor([1.0, 0.0, 0.5, 0.5]))
    sigmoid = 1 / (1 + math.exp(-1))
    assert losses[:2].tolist() == pytest.approx([-math.log(sigmoid)] * 2)
    assert losses[2].item() == pytest.approx(0, abs=1e-6)  # an undecided pair with equal scores costs nothing
    p = 1 / (1 + math.exp(-2))
    assert losses[3].item() == pytest.approx(-0.5 * math.log(p) - 0.5 * math.log(1 - p) - math.log(2), rel=1e-5)


def test_relabelling_calls_close_scores_a_tie():
    difference = 2 * math.atanh(0.1)  # of scores whose probabilities differ by 0.1
    scores = torch.tensor([[difference * 0.99, difference * 1.01, 0.0], [0.0, 0.0, 5.0]])
    assert labels_from_scores(scores, 0.1).tolist() == [0.5, 1.0, 0.0]


def test_relabelling_scores_in_float32():
    """48 ones against 48 times 254/255, summed: 0.188 apart, a difference of 0.0939 in probability and so a tie. In bf16
    the second sum is 47.75: 0.25 apart, 0.1244, and decided."""
    def judge(pixels, timestep, input_ids):
        return torch.nn.functional.linear(pixels.flatten(1), torch.ones(1, 48))[:, 0]

    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    options = SimpleNamespace(more=[SimpleNamespace(relabel_threshold=0.1)], data=SimpleNamespace(resolution=4))
    restorer = Restorer(SimpleNamespace(options=options, accelerator=accelerator), None, None, judge, None)
    restorer.input_ids = lambda batch: None
    batch = {"judged": torch.tensor([255, 254], dtype=torch.uint8).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)}
    assert restorer.labels(batch).tolist() == [0.5]
    with accelerator.autocast():
        assert restorer.labels(batch).tolist() == [1.0]


def test_warm_up_is_logarithmic_and_the_decay_linear():
    """DeepSpeed's WarmupDecayLR, 500 of 8000 steps: ln(51) / ln(500) = 3.931826 / 6.214608 = 0.632675."""
    rates = [warmup_then_decay(step, 500, 8000) for step in range(8001)]
    assert rates[50] == pytest.approx(0.632675, abs=1e-6)
    assert [rates[step] for step in (0, 499, 500, 4250, 8000)] == [0, 1, 1, 0.5, 0]
    assert sum(rates[:500]) == pytest.approx(420.2, abs=0.1)  # linear: 249.5
    assert [warmup_then_decay(step, 0, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [warmup_then_decay(step, 1, 3) for step in range(4)] == [0, 1, 0.5, 0]


def test_agreement_counts_a_tie_one_half():
    scores = torch.tensor([[2.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert agreement(scores, torch.tensor([1.0, 0.0, 0.5, 1.0])).tolist() == [1, 0, 0.5, 0]


@pytest.mark.parametrize("relabels, raw, restored", [(False, 1.5 / 4, 2.5 / 4), (True, 1 / 3, 2 / 3)])
def test_accuracy_at_zero_looks_at_the_images_themselves(relabels, raw, restored):
    """Pairs of plain images, the brighter one scores higher; what is restored is the negative. The first pair is judged
    right as it is, the second and fourth wrong, the third is a tie; the fifth cannot be used."""
    class Pairs(list):
        def __getitem__(self, place):
            return super().__getitem__(place[1])

    pairs = Pairs({"pixel_values": torch.tensor(values).view(2, 1, 1, 1).expand(2, 3, 4, 4), "label_0": torch.tensor(label),
                   "passed_over": torch.tensor(int(number == 4))}
                  for number, (values, label) in enumerate([([0.5, -0.5], 1.0), ([0.5, -0.5], 0.0), ([0.5, -0.5], 0.5),
                                                            ([-0.5, 0.5], 1.0), ([0.5, -0.5], 1.0)]))
    restorer = SimpleNamespace(judge=object() if relabels else None, labels=lambda batch: batch["label_0"],
                               input_ids=lambda batch: None,
                               images=lambda batch, t: -batch["pixel_values"].transpose(0, 1).flatten(0, 1))

    def spm(pixels, timestep, input_ids):
        return pixels.mean(dim=(1, 2, 3))

    spm.image_size = 2
    accelerator = Accelerator(cpu=True)
    run = SimpleNamespace(accelerator=accelerator, device=accelerator.device,
                          options=SimpleNamespace(optimizer=SimpleNamespace(train_batch_size=2)))
    found = accuracies(run, spm, restorer, pairs)
    assert found == pytest.approx({f"accuracy_t{t}": restored if t else raw for t in EVALUATION_TIMESTEPS})


@pytest.fixture
def table(pairs_dir):
    return datasets.load_dataset("parquet", data_files=str(pairs_dir / "*.parquet"), split="train")


def labelled(table, **options):
    return LabelledPairs(table, DataOptions(train_data_dir="here", resolution=64), (4, 8, 8), 0, "here", **options)


def test_pairs_keep_ties_order_and_their_prompts_weight(table):
    pairs = labelled(table)
    assert len(pairs) == len(table) and set(pairs.labels) == {0.0, 0.5, 1.0}
    captions = table["caption"]
    assert pairs.weights.tolist() == [1 / captions.count(caption) for caption in captions]
    item = pairs[3, 5]
    assert item["pixel_values"].shape == (2, 3, 64, 64) and item["caption"] == captions[5]
    assert torch.equal(item["noise"], pairs[3, 6]["noise"]) and not torch.equal(item["noise"], pairs[4, 5]["noise"])
    counted = table.add_column("num_example_per_prompt", [None] + [4] * (len(table) - 1))
    assert set(labelled(counted).weights) == {1.0, 0.25}


def test_odd_pairs_are_refused(table):
    with pytest.raises(UserError, match="here lacks the column jpg_1; it has .*jpg_0"):
        labelled(table.remove_columns("jpg_1"))
    column = [0.3, *table["label_0"][1:]]
    with pytest.raises(UserError, match="row 0 has 0.3"):
        labelled(table.remove_columns("label_0").add_column("label_0", column))
    with pytest.raises(UserError, match="no labelled pair"):
        labelled(table.remove_columns("label_0").add_column("label_0", [None] * len(table)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_that_training_reads_gives_the_same_pairs(name, tmp_path):
    def winners_and_losers(name, folder):
        source, flags = LAYOUTS[name](folder)
        words = ["--pretrained_model_name_or_path=base", f"--train_data_dir={source}", "--resolution=64", *flags]
        pairs, validation = load_pairs(parse_spm_options(words).data, "none", (4, 8, 8), 0, None)
        assert validation is None and len(pairs) == len(WINS)
        items = [pairs[0, index] for index in range(len(pairs))]
        return {item["caption"]: item["pixel_values"] if item["label_0"] else item["pixel_values"].flip(0) for item in items}

    found, expected = winners_and_losers(name, tmp_path / "a"), winners_and_losers("Pick-a-Pic", tmp_path / "b")
    assert found.keys() == expected.keys() and all(torch.equal(found[caption], expected[caption]) for caption in found)


@pytest.mark.parametrize("size", [(107, 67), (67, 100), (64, 64)])
def test_images_are_cut_as_clip_cuts_them(size, table):
    """transformers' processor with the official sizes: the base's for what is noised, the tower's for what PickScore sees."""
    image = Image.effect_noise(size, 90).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    few = with_column(table.select([0]), "jpg_0", [file.getvalue()])
    pair = labelled(few, judge_size=32)[0, 0]
    for ours, side in ((pair["pixel_values"][0] / 2 + 0.5, 64), (pair["judged"][0] / 255, 32)):
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side},
                                          do_normalize=False)
        torch.testing.assert_close(ours, processor(image, return_tensors="pt")["pixel_values"][0], rtol=0, atol=1e-6)
    assert "judged" not in labelled(few)[0, 0]


def with_column(table, name, values):
    return table.remove_columns(name).add_column(name, values)


def test_text_labels_are_refused(table):
    with pytest.raises(UserError, match="here: label_0 must be 0, 0.5 or 1 .*left"):
        labelled(with_column(table, "label_0", ["left"] * len(table)))


def test_bad_pairs_are_passed_over_for_the_next_good_one(table):
    few = table.select(range(4))
    images = few["jpg_0"][:]
    good = labelled(with_column(few, "jpg_0", images))
    pairs = labelled(with_column(few, "jpg_0", [images[0], images[1], b"no image", images[3][:50]]))
    item, expected = pairs[7, 2], good[7, 0]  # 2 and 3 are bad; the one after the last is the first
    assert [pairs[7, index]["passed_over"].item() for index in range(4)] == [0, 0, 2, 1]
    assert all(torch.equal(item[name], expected[name]) for name in ("pixel_values", "label_0", "weight", "noise"))
    assert item["caption"] == expected["caption"]
    nothing = labelled(with_column(few, "jpg_0", [b"no image"] * 4))
    with pytest.raises(UserError, match="4 pairs in a row cannot be used, from row 1 on"):
        nothing[0, 1]


def test_held_out_pairs_share_no_prompt_with_those_trained_on(table):
    kept, held_out = hold_out(table, "caption", seed=0)
    assert sorted([*kept, *held_out]) == list(range(len(table))) and len(held_out)
    captions = table["caption"][:]
    assert not {captions[row] for row in kept} & {captions[row] for row in held_out}
    assert hold_out(table, "caption", seed=0)[1].tolist() == held_out.tolist() != hold_out(table, "caption", seed=1)[1].tolist()
    some = labelled(table, rows=held_out)
    assert [some.row(index) for index in range(len(some))] == held_out.tolist()
    alike = with_column(table, "caption", ["one"] * len(table))
    assert [len(rows) for rows in hold_out(alike, "caption", seed=0)] == [len(table), 0]


@pytest.mark.parametrize("words, message", [
    ([], "name the preference pairs"),
    (["--dataset_name", "x", "--resolution", "30"], "multiple of 8"),
    (["--dataset_name", "x", "--relabel_threshold", "1"], "--relabel_threshold must lie in"),
    (["--dataset_name", "x", "--max_train_steps", "0"], "--max_train_steps must be a finite number of at least 1"),
    (["--dataset_name", "x", "--seed", "-5"], "--seed must be"),
    (["--dataset_name", "x", "--beta_dpo", "5"], "no option is called --beta_dpo"),
    (["--dataset_name", "x", "--output_dir", "."], "--output_dir is --pretrained_model_name_or_path itself"),
])
def test_bad_options_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_spm_options(["--pretrained_model_name_or_path", ".", *words])


def test_defaults_are_the_published_ones():
    options = parse_spm_options(["--pretrained_model_name_or_path", "base", "--dataset_name", "x"])
    values = options.flat()
    assert {name: values[name] for name in ("learning_rate", "lr_warmup_steps", "adam_weight_decay", "train_batch_size",
                                            "max_train_steps", "mixed_precision", "guidance", "validation_steps")} == {
        "learning_rate": 3e-6, "lr_warmup_steps": 500, "adam_weight_decay": 0.3, "train_batch_size": 16,
        "max_train_steps": 8000, "mixed_precision": "bf16", "guidance": 5.0, "validation_steps": 1000}


# --- the program on tiny models --------------------------------------------------------------------------------------------

WEIGHTS = "step-aware_preference_model.bin"


@pytest.fixture
def data(pairs_dir, tmp_path):
    """16 pairs to train on and 8 in the split `validation`."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = pq.read_table(next(pairs_dir.glob("*.parquet")))
    pq.write_table(rows.slice(0, 16), folder / "train-00000.parquet")
    pq.write_table(rows.slice(16, 8), folder / "validation-00000.parquet")
    return folder


@pytest.fixture
def train_spm(judge, tiny_sd15, data):
    """train_spm(output, steps, watch=None, **options) -> the outcome and the weights that the run left, if any."""
    def run(output, steps, watch=None, **options):
        options = dict(
            pretrained_model_name_or_path=tiny_sd15, train_data_dir=data, validation_split="validation", resolution=64,
            spm_clip=judge, spm_tokenizer=judge, train_batch_size=2, max_train_steps=steps, learning_rate=1e-3,
            dataloader_num_workers=0, lr_warmup_steps=0, mixed_precision="no", report_to="none", seed=0,
            output_dir=output, checkpointing_steps=2) | options
        reset_accelerate()
        try:
            outcome = train(parse_spm_options(["--config=configs/train/spm_sd15.yaml",
                                               *(f"--{name}={value}" for name, value in options.items())]), watch)
        finally:
            reset_accelerate()
            release(output)
        path = output / WEIGHTS
        return outcome, torch.load(path, weights_only=True) if path.is_file() else None
    return run


def test_program_trains_reports_accuracies_and_its_file_loads(train_spm, judge, tmp_path):
    output = tmp_path / "spm"
    _, state = train_spm(output, 3, relabel_threshold=0.1)
    entries = json.loads((output / "accuracy.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 3]
    assert all(0 <= entry[f"accuracy_t{t}"] <= 1 for entry in entries for t in EVALUATION_TIMESTEPS)
    metrics = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert {"train_loss", "accuracy", "grad_norm", "lr", "bad_pairs", "pairs_seen"} <= metrics[0].keys()
    assert metrics[-1]["pairs_seen"] == 6 and 0 < metrics[-1]["lr"] < metrics[-2]["lr"], "decayed to 0 after the last step"

    loaded = load_spm(judge, output / WEIGHTS).state_dict()
    untrained = load_spm(judge).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    moved = [key for key in loaded if not torch.equal(loaded[key], untrained[key])]
    assert any("adaLN" in key for key in moved) and any("text_model" in key for key in moved)


@pytest.mark.slow
def test_resumed_and_stopped_runs_end_where_an_uninterrupted_one_does(train_spm, tmp_path):
    output, stopped = tmp_path / "spm", tmp_path / "stopped"
    _, state = train_spm(output, 3)
    assert (output / "checkpoint-2" / WEIGHTS).is_file()
    (output / WEIGHTS).unlink()
    (output / "checkpoint-3").rename(tmp_path / "gone")
    _, again = train_spm(output, 3)  # from checkpoint-2
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert [entry["step"] for entry in json.loads((output / "accuracy.json").read_text())] == [0, 3]

    def stop(step, network, scalars):
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome, weights = train_spm(stopped, 3, stop)
    assert (outcome.step, outcome.finished, weights) == (1, False, None)
    assert [folder.name for folder in stopped.glob("checkpoint-*")] == ["checkpoint-1"]
    _, again = train_spm(stopped, 3)
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_a_run_without_finite_losses_ends_and_names_its_pairs(train_spm, tmp_path):
    with pytest.raises(UserError, match="finite in 10 steps in a row: .*checkpoint-1 is saved"):
        train_spm(tmp_path / "wild", 30, learning_rate=1e30, validation_split="none", checkpointing_steps=1)
    line = json.loads((tmp_path / "wild" / "nonfinite.jsonl").read_text().splitlines()[0])
    assert line["step"] == 2 and {"row", "timestep"} <= line["pairs"][0].keys()


def test_too_many_bad_pairs_end_the_run_and_are_named(train_spm, data, tmp_path):
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    rows = pq.read_table(data / "train-00000.parquet")
    column, images = rows.schema.get_field_index("jpg_0"), rows.column("jpg_0").to_pylist()
    images[:-1] = [b"no image"] * (len(images) - 1)
    pq.write_table(rows.set_column(column, "jpg_0", [images]), spoilt / "train-00000.parquet")
    with pytest.raises(UserError, match="2 of 2 pairs could not be used, .*checkpoint-1 is saved"):
        train_spm(tmp_path / "bad", 30, train_data_dir=spoilt, validation_split="none")
    assert read_progress(tmp_path / "bad" / "checkpoint-1")["record"]["bad_pairs"] == 2
    faults = [json.loads(line) for line in (tmp_path / "bad" / "bad_data.jsonl").read_text().splitlines()]
    assert {fault["column"] for fault in faults} == {"jpg_0"} and {fault["replaced_by"] for fault in faults} == {15}


def test_local_data_without_pickapics_validation_split_holds_pairs_out(train_spm, data, tmp_path, capsys):
    (data / "validation-00000.parquet").unlink()
    train_spm(tmp_path / "out", 1, validation_split="validation_unique")
    said = capsys.readouterr()
    assert "has no split 'validation_unique': 1 of its 16 pairs are held out" in said.err
    assert "15 of" in said.out and "accuracy on 1 pairs" in said.out
    with pytest.raises(UserError, match="cannot load the dataset"):  # no other name is forgiven
        train_spm(tmp_path / "other", 1, validation_split="validaton")
