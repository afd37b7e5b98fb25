"""The preference model's training program: loss, labels, weights, and a run on tiny models."""

import io
import json
import math
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from shapes.pipeline import clip_tokenizer, text_config
from spo.preference_model.data import LabelledPairs, clip_square
from spo.preference_model.model import EVALUATION_TIMESTEPS, load_spm
from spo.preference_model.train import (Restorer, accuracies, agreement, labels_from_scores, parse_spm_arguments, preference_cross_entropy,
                       train, warmup_then_decay)
from training.checkpoints import read_progress
from common.errors import UserError
from common.signals import StopSignal


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
    restorer = Restorer(None, None, judge, None, SimpleNamespace(relabel_threshold=0.1), accelerator)
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
    found = accuracies(spm, restorer, pairs, 2, Accelerator(cpu=True))
    assert found == pytest.approx({f"accuracy_t{t}": restored if t else raw for t in EVALUATION_TIMESTEPS})


@pytest.fixture
def table(pairs_dir):
    return datasets.load_dataset("parquet", data_files=str(pairs_dir / "*.parquet"), split="train")


def test_pairs_keep_ties_order_and_their_prompts_weight(table):
    pairs = LabelledPairs(table, "caption", 64, (4, 8, 8), seed=0, source="here")
    assert len(pairs) == len(table) and set(pairs.labels) == {0.0, 0.5, 1.0}
    captions = table["caption"]
    assert pairs.weights.tolist() == [1 / captions.count(caption) for caption in captions]
    item = pairs[3, 5]
    assert item["pixel_values"].shape == (2, 3, 64, 64) and item["caption"] == captions[5]
    assert torch.equal(item["noise"], pairs[3, 6]["noise"]) and not torch.equal(item["noise"], pairs[4, 5]["noise"])
    counted = table.add_column("num_example_per_prompt", [None] + [4] * (len(table) - 1))
    assert set(LabelledPairs(counted, "caption", 64, (4, 8, 8), 0, "here").weights) == {1.0, 0.25}


def test_odd_pairs_are_refused(table):
    def make(changed):
        return LabelledPairs(changed, "caption", 64, (4, 8, 8), 0, "here")

    with pytest.raises(UserError, match="here lacks jpg_1"):
        make(table.remove_columns("jpg_1"))
    column = [0.3, *table["label_0"][1:]]
    with pytest.raises(UserError, match="row 0 has 0.3"):
        make(table.remove_columns("label_0").add_column("label_0", column))
    with pytest.raises(UserError, match="no labelled pair"):
        make(table.remove_columns("label_0").add_column("label_0", [None] * len(table)))


@pytest.mark.parametrize("size", [(107, 67), (67, 100), (64, 64)])
def test_images_are_cut_as_clip_cuts_them(size, table):
    """transformers' processor with the official sizes: the base's for what is noised, the tower's for what PickScore sees."""
    image = Image.effect_noise(size, 90).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    few = with_column(table.select([0]), "jpg_0", [file.getvalue()])
    pair = LabelledPairs(few, "caption", 64, (4, 8, 8), 0, "here", judge_size=32)[0, 0]
    for ours, side in ((pair["pixel_values"][0] / 2 + 0.5, 64), (pair["judged"][0] / 255, 32)):
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side},
                                          do_normalize=False)
        torch.testing.assert_close(ours, processor(image, return_tensors="pt")["pixel_values"][0], rtol=0, atol=1e-6)
    assert "judged" not in LabelledPairs(few, "caption", 64, (4, 8, 8), 0, "here")[0, 0]


def with_column(table, name, values):
    return table.remove_columns(name).add_column(name, values)


def test_text_labels_are_refused(table):
    with pytest.raises(UserError, match="here: label_0 must be 0, 0.5 or 1 .*left"):
        LabelledPairs(with_column(table, "label_0", ["left"] * len(table)), "caption", 64, (4, 8, 8), 0, "here")


def test_bad_pairs_are_passed_over_for_the_next_good_one(table):
    few = table.select(range(4))
    images = few["jpg_0"][:]
    good = LabelledPairs(with_column(few, "jpg_0", images), "caption", 64, (4, 8, 8), 0, "here")
    pairs = LabelledPairs(with_column(few, "jpg_0", [images[0], images[1], b"no image", images[3][:50]]), "caption", 64,
                          (4, 8, 8), 0, "here")
    item, expected = pairs[7, 2], good[7, 0]  # 2 and 3 are bad; the one after the last is the first
    assert [pairs[7, index]["passed_over"].item() for index in range(4)] == [0, 0, 2, 1]
    assert all(torch.equal(item[name], expected[name]) for name in ("pixel_values", "label_0", "weight", "noise"))
    assert item["caption"] == expected["caption"]
    nothing = LabelledPairs(with_column(few, "jpg_0", [b"no image"] * 4), "caption", 64, (4, 8, 8), 0, "here")
    with pytest.raises(UserError, match="4 pairs in a row cannot be used, from row 1 on"):
        nothing[0, 1]


@pytest.mark.parametrize("words, message", [
    ([], "name the preference pairs"),
    (["--dataset_name", "x", "--resolution", "30"], "multiple of 8"),
    (["--dataset_name", "x", "--relabel_threshold", "1"], "--relabel_threshold must lie in"),
    (["--dataset_name", "x", "--max_train_steps", "0"], "--max_train_steps must be at least 1"),
    (["--dataset_name", "x", "--seed", "-5"], "--seed must lie in"),
])
def test_bad_options_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_spm_arguments(["--pretrained_model_name_or_path", "base", *words])


@pytest.mark.slow
def test_program_trains_reports_accuracies_resumes_and_its_file_loads(tiny_sd15, pairs_dir, tmp_path):
    clip, data = tmp_path / "clip", tmp_path / "data"
    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=8)
    CLIPModel(CLIPConfig(text_config=text_config(32, 1).to_dict(), vision_config=vision,
                         projection_dim=16)).save_pretrained(clip)
    clip_tokenizer().save_pretrained(clip)
    data.mkdir()
    rows = pq.read_table(next(pairs_dir.glob("*.parquet")))
    pq.write_table(rows.slice(0, 16), data / "train-00000.parquet")
    pq.write_table(rows.slice(16, 8), data / "validation-00000.parquet")

    def run(output, steps, stop=None, **options):
        options = dict(
            pretrained_model_name_or_path=tiny_sd15, train_data_dir=data, validation_split="validation", resolution=64,
            spm_clip=clip, spm_tokenizer=clip, train_batch_size=2, max_train_steps=steps, learning_rate=1e-3,
            dataloader_num_workers=0, lr_warmup_steps=0, mixed_precision="no", report_to="none", seed=0,
            output_dir=output, checkpointing_steps=2) | options
        train(parse_spm_arguments(["--config", "configs/train/spm_sd15.yaml",
                                   *(str(word) for name, value in options.items() for word in (f"--{name}", value))]),
              stop or StopSignal())
        return torch.load(output / "step-aware_preference_model.bin", weights_only=True)

    spoilt, images = tmp_path / "spoilt", rows.column("jpg_0").to_pylist()
    spoilt.mkdir()
    images[:-1] = [b"no image"] * (len(images) - 1)
    column = rows.schema.get_field_index("jpg_0")
    pq.write_table(rows.set_column(column, "jpg_0", [images]), spoilt / "train-00000.parquet")
    with pytest.raises(UserError, match="2 of 2 pairs could not be used, .*checkpoint-1 is saved"):
        run(tmp_path / "bad", 30, train_data_dir=spoilt, validation_split="none")
    assert read_progress(tmp_path / "bad" / "checkpoint-1")["record"] == {"bad_pairs": 2}
    state = run(tmp_path / "spm", 3, relabel_threshold=0.1)
    entries = json.loads((tmp_path / "spm" / "accuracy.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 3]
    assert all(0 <= entry[f"accuracy_t{t}"] <= 1 for entry in entries for t in EVALUATION_TIMESTEPS)

    assert (tmp_path / "spm" / "checkpoint-2" / "step-aware_preference_model.bin").is_file()
    (tmp_path / "spm" / "step-aware_preference_model.bin").unlink()
    for folder in (tmp_path / "spm").glob("checkpoint-3"):
        folder.rename(tmp_path / "gone")
    again = run(tmp_path / "spm", 3, relabel_threshold=0.1)  # from checkpoint-2
    assert all(torch.equal(state[key], again[key]) for key in state)

    signalled = StopSignal()
    signalled.name = "SIGTERM"
    with pytest.raises(FileNotFoundError):  # it ended after its first step, with a checkpoint and no result
        run(tmp_path / "stopped", 3, signalled, relabel_threshold=0.1)
    assert [folder.name for folder in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-1"]
    again = run(tmp_path / "stopped", 3, relabel_threshold=0.1)
    assert all(torch.equal(state[key], again[key]) for key in state)

    with pytest.raises(UserError, match="loss or gradient was not finite in 10 steps.*checkpoint-1 is saved"):
        run(tmp_path / "wild", 30, learning_rate=1e30, validation_split="none", checkpointing_steps=1)

    loaded = load_spm(clip, tmp_path / "spm" / "step-aware_preference_model.bin").state_dict()
    untrained = load_spm(clip).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    moved = [key for key in loaded if not torch.equal(loaded[key], untrained[key])]
    assert any("adaLN" in key for key in moved) and any("text_model" in key for key in moved)
