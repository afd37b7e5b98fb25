"""A cached run is the uncached run: same pairs, same draws, same losses; and a cache made otherwise is refused."""

import json
import shutil

import datasets
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

import data.encode
from common.errors import UserError
from common.images import decode_image, image_bytes
from common.locks import release
from common.train_checks import parse_options
from data.cache import CacheOptions, cache as make, main
from data.cached import CachedDataset, check_cache
from data.images import cut_square, scale_pixels
from models.family import open_family
from tests.conftest import reset_accelerate
from tests.vocabulary import build_tiny_pipeline
from training.preference import load_rows


def cache(argv: list, folder, **options) -> CachedDataset:
    """What data.cache does, in this process."""
    reset_accelerate()
    try:
        make(parse_options([*map(str, argv), "--cached_dataset", str(folder)]), CacheOptions(**options))
    finally:
        release(folder)
        reset_accelerate()
    return CachedDataset(folder)


def check(argv: list) -> None:
    """What train.py does with --cached_dataset before it loads a model. Raises UserError."""
    options = parse_options([str(word) for word in argv])
    made, family = CachedDataset(options.data.cached_dataset), open_family(options.model)
    load_rows(options, made)
    columns = [options.data.image_column] if options.objective.train_method == "sft" else ["jpg_0", "jpg_1"]
    check_cache(made, options.data, family, options.memory.mixed_precision, columns)


def common(base, pairs) -> list:
    return ["--pretrained_model_name_or_path", base, "--train_data_dir", pairs, "--resolution", 64, "--mixed_precision", "no",
            "--report_to", "none"]


def without_data(argv: list) -> list:
    place = argv.index("--train_data_dir")
    return argv[:place] + argv[place + 2:]


@pytest.fixture(scope="module")
def sd15_cache(tiny_sd15, pairs_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "sd15"
    cache(common(tiny_sd15, pairs_dir), folder, pairs_per_shard=24)
    return folder


def largest_difference(a: list[dict], b: list[dict]) -> float:
    names = ("train_loss", "model_mse_unaccumulated", "ref_mse_unaccumulated", "margin_mean", "avg_lose_l_scale")
    return max(abs(x[name] - y[name]) for x, y in zip(a, b, strict=True) for name in names if name in x)


@pytest.mark.slow
def test_twenty_steps_agree_with_uncached_training(train_run, tiny_sd15, pairs_dir, sd15_cache):
    argv = common(tiny_sd15, pairs_dir) + ["--use_winner_preserving", "--max_train_steps", 20]
    uncached = train_run(argv)
    cached = train_run(argv + ["--cached_dataset", sd15_cache])
    assert len(uncached) == 20 and largest_difference(uncached, cached) == 0.0
    assert uncached[-1]["train_loss"] != uncached[0]["train_loss"]


def test_sdxl_and_several_passes_agree(train_run, tiny_sdxl, pairs_dir, tmp_path):
    argv = common(tiny_sdxl, pairs_dir) + ["--train_batch_size", 4]  # which the cache is encoded in: else last bits differ
    cache(argv, tmp_path / "cache")
    argv += ["--max_train_samples", 7]  # the second step's batch is of two epochs
    assert largest_difference(train_run(argv), train_run(argv + ["--cached_dataset", tmp_path / "cache"])) == 0.0


def test_the_cache_alone_is_enough_and_pairs_are_chosen_from_it_by_the_same_rules(train_run, tiny_sd15, pairs_dir,
                                                                                   sd15_cache):
    argv = common(tiny_sd15, pairs_dir) + ["--dreamlike_pairs_only", "--no_hflip", "--train_method", "sft"]
    uncached = train_run(argv)
    cached = train_run(without_data(argv) + ["--cached_dataset", sd15_cache])
    assert largest_difference(uncached, cached) == 0.0


def test_rows_with_bad_images_have_the_same_outcome(train_run, tiny_sd15, pairs_dir, tmp_path):
    table = datasets.load_dataset("parquet", data_dir=str(pairs_dir), split="train").select(range(12)).to_list()
    good = table[0]["jpg_0"]
    table[3]["jpg_1"] = b"no image"
    table[5]["jpg_0"] = None
    table[7]["jpg_0"] = table[7]["jpg_1"] = good
    for row in table:
        row["label_0"] = 1.0
    datasets.Dataset.from_list(table).to_parquet(str(tmp_path / "pairs.parquet"))
    argv = common(tiny_sd15, tmp_path / "pairs.parquet") + ["--max_bad_fraction", 1, "--train_batch_size", 4]
    made = cache(argv, tmp_path / "cache")
    assert {row: list(columns) for row, columns in made.faults.items()} == {3: ["jpg_1"], 5: ["jpg_0"],
                                                                            7: ["jpg_0, jpg_1"]}
    for method in ("diffusion-dpo", "sft"):  # sft can use row 3: its winner is whole
        words = argv + ["--train_method", method]
        uncached, cached = train_run(words), train_run(words + ["--cached_dataset", tmp_path / "cache"])
        assert largest_difference(uncached, cached) == 0.0


def test_what_is_kept_is_what_the_encoders_answered(sd15_cache, tiny_sd15, pairs_dir):
    vae = AutoencoderKL.from_pretrained(tiny_sd15, subfolder="vae")
    table = datasets.load_dataset("parquet", data_dir=str(pairs_dir), split="train")
    made = CachedDataset(sd15_cache)
    image = decode_image(image_bytes(table[30]["jpg_1"]))
    for flip in (False, True):
        with torch.no_grad():
            moments = vae.encode(scale_pixels(cut_square(image, 64, flip=flip))[None]).latent_dist.parameters
        torch.testing.assert_close(made.moments(30, [1], [flip]), moments, atol=1e-5, rtol=0)
    prompts = json.loads((sd15_cache / "prompts.json").read_text())
    assert prompts[0] == "" and sorted(prompts[1:]) == sorted(set(table["caption"]) - {""})


def test_a_cache_is_finished_after_an_interruption_and_keeps_what_was_done(tiny_sd15, pairs_dir, sd15_cache, tmp_path):
    argv = common(tiny_sd15, pairs_dir)
    first = cache(argv, tmp_path / "cache", pairs_per_shard=24)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("*.safetensors")}
    kept = tmp_path / "cache" / "pairs-00000.safetensors"
    age = kept.stat().st_mtime_ns
    for name in ("manifest.json", "pairs-00002.safetensors"):
        (tmp_path / "cache" / name).unlink()
    with pytest.raises(UserError, match="is not finished"):
        CachedDataset(first.folder)
    cache(argv, tmp_path / "cache", pairs_per_shard=24)
    assert kept.stat().st_mtime_ns == age
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("*.safetensors")} == whole


@pytest.mark.parametrize("change, said", [
    (["--resolution", 32], "resolution was 64, is 32"),
    (["--mixed_precision", "bf16"], "mixed_precision was no, is bf16"),
    (["--split", "test"], "split was train, is test"),
    (["--random_crop"], "drop --random_crop"),
])
def test_another_run_s_settings_are_refused_by_name(tiny_sd15, pairs_dir, sd15_cache, change, said):
    check(common(tiny_sd15, pairs_dir) + ["--cached_dataset", sd15_cache])
    with pytest.raises(UserError, match=said):
        check(common(tiny_sd15, pairs_dir) + ["--cached_dataset", sd15_cache, *change])


def test_train_refuses_what_the_check_refuses(train_run, tiny_sd15, pairs_dir, sd15_cache):
    with pytest.raises(UserError, match="resolution was 64, is 32"):
        train_run(common(tiny_sd15, pairs_dir) + ["--cached_dataset", sd15_cache, "--resolution", 32])


def test_another_model_s_cache_is_refused_by_name(pairs_dir, sd15_cache, tmp_path):
    other = build_tiny_pipeline(tmp_path / "other", "sd15", seed=1)
    with pytest.raises(UserError, match="encoders was vae sha256:[0-9a-f]+ text_encoder .* is vae sha256:.*made with .*sd15"):
        check(common(other, pairs_dir) + ["--cached_dataset", sd15_cache])


def test_another_cache_s_folder_is_not_continued(tiny_sd15, pairs_dir, sd15_cache):
    with pytest.raises(UserError, match=r"holds another cache \(resolution 64 instead of 32\)"):
        cache(common(tiny_sd15, pairs_dir) + ["--resolution", 32], sd15_cache, pairs_per_shard=24)


def test_a_damaged_shard_is_told_by_name(tiny_sd15, pairs_dir, tmp_path):
    made = cache(common(tiny_sd15, pairs_dir), tmp_path / "cache")
    shard = made.folder / "pairs-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="pairs-00000.safetensors is missing or damaged: delete it"):
        CachedDataset(made.folder)


@pytest.mark.slow
def test_two_processes_share_the_work(program, tiny_sd15, pairs_dir, sd15_cache, tmp_path):
    argv = [*common(tiny_sd15, pairs_dir), "--cached_dataset", tmp_path / "cache", "--pairs_per_shard", 24]
    program("data.cache", argv, processes=2)
    for path in sorted(sd15_cache.glob("*.safetensors")):
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()


def test_bf16_too_sees_the_same_bits(train_run, tiny_sd15, pairs_dir, tmp_path):
    """The encoders' answers and their layout: what a UNet computes from channels-last latents differs in the last bits."""
    argv = [*common(tiny_sd15, pairs_dir), "--mixed_precision", "bf16", "--max_train_steps", 3, "--use_winner_preserving",
            "--beta_dpo", 5000, "--learning_rate", 1e-4]
    cache(argv, tmp_path / "cache")
    assert largest_difference(train_run(argv), train_run([*argv, "--cached_dataset", tmp_path / "cache"])) == 0.0


def test_changed_data_is_refused_and_a_copy_of_it_is_not(tiny_sd15, pairs_dir, sd15_cache, tmp_path):
    table = datasets.load_dataset("parquet", data_dir=str(pairs_dir), split="train")
    table.to_parquet(str(tmp_path / "copy" / "pairs.parquet"))
    argv = ["--cached_dataset", sd15_cache, "--max_train_steps", 1]
    check(common(tiny_sd15, tmp_path / "copy") + argv)
    changes = {"rows": lambda: table.select(range(len(table))[::-1]),
               "labels": lambda: table.map(lambda row: {"label_0": 1 - row["label_0"]}),
               "images": lambda: table.rename_columns({"jpg_0": "jpg_1", "jpg_1": "jpg_0"})}
    for name, change in changes.items():
        change().to_parquet(str(tmp_path / name / "pairs.parquet"))
        for more in ([], ["--choice_model", "oracle"]):
            with pytest.raises(UserError, match=r"is not the data that --cached_dataset .* was made of"):
                check(common(tiny_sd15, tmp_path / name) + argv + more)


def test_another_column_of_images_is_refused_by_name(train_run, tiny_sd15, pairs_dir, tmp_path):
    table = datasets.load_dataset("parquet", data_dir=str(pairs_dir), split="train").select(range(8))
    table.select_columns(["caption", "jpg_0", "jpg_1"]).rename_columns({"jpg_0": "a", "jpg_1": "b"}).to_parquet(
        str(tmp_path / "data" / "images.parquet"))
    argv = [*common(tiny_sd15, tmp_path / "data"), "--train_method", "sft", "--max_train_steps", 1]
    cache([*argv, "--image_column", "a"], tmp_path / "cache")
    assert train_run([*argv, "--image_column", "a", "--cached_dataset", tmp_path / "cache"])
    with pytest.raises(UserError, match="image_columns was a, is b"):
        check(without_data(argv) + ["--image_column", "b", "--cached_dataset", tmp_path / "cache"])


@pytest.mark.parametrize("file, change, said", [
    ("text_encoder/config.json", lambda config: config | {"hidden_act": "relu"}, "text_encoder sha256"),
    ("vae/config.json", lambda config: config | {"act_fn": "relu"}, "vae sha256"),
    ("tokenizer/tokenizer.json", lambda config: config | {"model": config["model"] | {"merges": []}},
     "tokenizer sha256")])
def test_a_model_of_the_same_weights_and_another_config_is_refused(tiny_sd15, pairs_dir, sd15_cache, tmp_path, file, change, said):
    other = tmp_path / "other"
    shutil.copytree(tiny_sd15, other)
    (other / file).write_text(json.dumps(change(json.loads((other / file).read_text()))))
    with pytest.raises(UserError, match=f"encoders was .*{said}"):
        check([*common(other, pairs_dir), "--cached_dataset", sd15_cache])


def test_a_folder_with_other_files_is_left_alone(tiny_sd15, pairs_dir, tmp_path):
    mine = tmp_path / "mine"
    (mine / "rows").mkdir(parents=True)
    (mine / "rows" / "important.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds files that are no cache \(rows\): choose an empty folder"):
        cache(common(tiny_sd15, pairs_dir), mine)
    assert (mine / "rows" / "important.txt").read_text() == "precious" and list(mine.iterdir()) == [mine / "rows"]


def flip_bits(path):
    """One in every entry."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 4, len(content), 512):
        content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name, damage, said", [
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
    ("manifest.json", lambda path: path.write_text(path.read_text().replace('"faults"', '"f"')), "manifest.json is damaged"),
    ("manifest.json", lambda path: path.write_text(path.read_text().replace('"pairs_per_shard": 24', '"pairs_per_shard": 0')),
     "manifest.json is damaged"),
    ("settings.json", lambda path: path.write_text("[]"), "settings.json is damaged"),
    ("settings.json", lambda path: path.write_text("[" * 100_000), "settings.json is damaged"),
    ("prompts.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text())[::-1])), "prompts.json is missing or dam"),
    ("rows/state.json", lambda path: path.write_text("{}"), "state.json is missing or damaged"),
    ("pairs-00000.safetensors", flip_bits, "pairs-00000.safetensors is missing or damaged: delete it"),
    ("prompts-00000.safetensors", flip_bits, "prompts-00000.safetensors is missing or damaged: delete it")])
def test_damage_is_told_in_one_line(tiny_sd15, pairs_dir, sd15_cache, tmp_path, name, damage, said):
    shutil.copytree(sd15_cache, tmp_path / "cache")
    damage(tmp_path / "cache" / name)
    with pytest.raises(UserError) as error:
        check([*common(tiny_sd15, pairs_dir), "--cached_dataset", tmp_path / "cache"])
        made = CachedDataset(tmp_path / "cache")
        for row, caption in enumerate(made.rows()["caption"]):  # as training reads them
            made.moments(row, [0, 1], [False, True]), made.prompt(caption)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_damage_that_a_worker_meets_ends_a_run_in_one_line(train_run, tiny_sd15, pairs_dir, sd15_cache, tmp_path):
    shutil.copytree(sd15_cache, tmp_path / "cache")
    flip_bits(tmp_path / "cache" / "pairs-00000.safetensors")
    with pytest.raises(UserError, match="pairs-00000.safetensors is missing or damaged: delete it"):
        train_run([*common(tiny_sd15, pairs_dir), "--cached_dataset", tmp_path / "cache", "--train_batch_size", 24])


def test_a_full_disk_ends_it_in_one_line_and_what_was_made_is_kept(tiny_sd15, pairs_dir, tmp_path, monkeypatch):
    whole, made = data.encode.write_shard, []

    def write_shard(path, *rest):
        if len(made) == 2:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        made.append(path)
        whole(path, *rest)

    monkeypatch.setattr(data.encode, "write_shard", write_shard)
    with pytest.raises(UserError, match="cannot write the cache in .*: No space left on device.*another --cached_dataset"):
        cache(common(tiny_sd15, pairs_dir), tmp_path / "cache", pairs_per_shard=24)
    monkeypatch.undo()
    cache(common(tiny_sd15, pairs_dir), tmp_path / "cache", pairs_per_shard=24)
    assert len(made) == 2


@pytest.mark.parametrize("words, said", [(["--pairs_per_shard", "0"], "--pairs_per_shard must be a finite number of at least 1, not 0"),
                                         (["--encode_batch_size", "-1"], "--encode_batch_size must be a finite number of at least 1, not -1"),
                                         (["--cached_dataset", ""], "name the folder")])
def test_options_are_checked(tmp_path, monkeypatch, words, said):
    argv = [*map(str, common("base", "pairs")), "--cached_dataset", str(tmp_path), *words]
    monkeypatch.setattr("sys.argv", ["cache", *argv])
    with pytest.raises(UserError, match=said):
        main()
