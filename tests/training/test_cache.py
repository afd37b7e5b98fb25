"""A cached run is the uncached run: same pairs, same draws, same losses; and a cache made otherwise is refused."""

import json

import datasets
import pytest

from training.cache import CacheArguments, make_cache
from training.arguments import parse_arguments
from training.cached_dataset import CachedDataset
from training.errors import UserError
from training.launch import start_accelerator

TOLERANCE = 1e-4  # of losses and margins near 0.7: the encoders see other batches in a cache, and Adam enlarges rounding


def cache(argv: list, folder, **options) -> CachedDataset:
    words = [str(word) for word in [*argv, "--cached_dataset", folder]]
    args = parse_arguments(words)
    make_cache(args, CacheArguments(**options), start_accelerator(args))
    return CachedDataset(folder)


def common(base, pairs, sdxl: bool = False) -> list:
    return ["--pretrained_model_name_or_path", base, "--train_data_dir", pairs, "--resolution", 64, "--mixed_precision",
            "no", "--report_to", "none"] + (["--sdxl"] if sdxl else [])


@pytest.fixture(scope="module")
def sd15_cache(tiny_sd15, pairs_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "sd15"
    cache(common(tiny_sd15, pairs_dir), folder, pairs_per_shard=24)
    return folder


def largest_difference(a: list[dict], b: list[dict]) -> float:
    names = ("train_loss", "model_mse_unaccumulated", "ref_mse_unaccumulated", "margin_mean", "avg_lose_l_scale")
    return max(abs(x[name] - y[name]) for x, y in zip(a, b, strict=True) for name in names if name in x)


def test_twenty_steps_agree_with_uncached_training(train_run, tiny_sd15, pairs_dir, sd15_cache):
    argv = common(tiny_sd15, pairs_dir) + ["--use_winner_preserving"]
    uncached = train_run(argv)
    cached = train_run(argv + ["--cached_dataset", sd15_cache])
    assert len(uncached) == 20 and largest_difference(uncached, cached) < TOLERANCE
    assert uncached[-1]["train_loss"] != uncached[0]["train_loss"]


def test_sdxl_and_several_passes_agree(train_run, tiny_sdxl, pairs_dir, tmp_path):
    argv = common(tiny_sdxl, pairs_dir, sdxl=True)
    cache(argv, tmp_path / "cache")
    argv += ["--max_train_samples", 10, "--train_batch_size", 4, "--max_train_steps", 6]
    assert largest_difference(train_run(argv), train_run(argv + ["--cached_dataset", tmp_path / "cache"])) < TOLERANCE


def test_the_cache_alone_is_enough_and_pairs_are_chosen_from_it_by_the_same_rules(train_run, tiny_sd15, pairs_dir,
                                                                                   sd15_cache):
    argv = ["--dreamlike_pairs_only", "--no_hflip", "--max_train_steps", 3, "--train_method", "sft"]
    uncached = train_run(common(tiny_sd15, pairs_dir) + argv)
    without_data = [word for word in common(tiny_sd15, pairs_dir) if word not in ("--train_data_dir", pairs_dir)]
    cached = train_run(without_data + argv + ["--cached_dataset", sd15_cache])
    assert largest_difference(uncached, cached) < TOLERANCE


def test_rows_with_bad_images_have_the_same_outcome(train_run, tiny_sd15, pairs_dir, tmp_path):
    table = datasets.load_dataset("parquet", data_dir=str(pairs_dir), split="train").select(range(12)).to_list()
    good = table[0]["jpg_0"]
    table[3]["jpg_1"] = b"no image"
    table[5]["jpg_0"] = None
    table[7]["jpg_0"] = table[7]["jpg_1"] = good
    for row in table:
        row["label_0"] = 1.0
    datasets.Dataset.from_list(table).to_parquet(str(tmp_path / "pairs.parquet"))
    argv = common(tiny_sd15, tmp_path / "pairs.parquet") + ["--max_bad_fraction", 1, "--max_train_steps", 6]
    made = cache(argv, tmp_path / "cache")
    assert {row: list(columns) for row, columns in made.faults.items()} == {3: ["jpg_1"], 5: ["jpg_0"],
                                                                            7: ["jpg_0, jpg_1"]}
    for method in ("diffusion-dpo", "sft"):  # sft can use row 3: its winner is whole
        words = argv + ["--train_method", method]
        uncached, cached = train_run(words), train_run(words + ["--cached_dataset", tmp_path / "cache"])
        assert largest_difference(uncached, cached) < TOLERANCE


def test_what_is_kept_is_what_the_encoders_answered(sd15_cache, tiny_sd15, pairs_dir):
    import torch
    from diffusers import AutoencoderKL

    from training.images import decode_image, image_bytes, to_pixels
    vae = AutoencoderKL.from_pretrained(tiny_sd15, subfolder="vae")
    table = datasets.load_dataset("parquet", data_dir=str(pairs_dir), split="train")
    made = CachedDataset(sd15_cache)
    image = decode_image(image_bytes(table[30]["jpg_1"]))
    for flip in (False, True):
        with torch.no_grad():
            moments = vae.encode(to_pixels(image, 64, flip=flip)[None]).latent_dist.parameters
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
def test_another_run_s_settings_are_refused_by_name(train_run, tiny_sd15, pairs_dir, sd15_cache, change, said):
    with pytest.raises(UserError, match=said):
        train_run(common(tiny_sd15, pairs_dir) + ["--cached_dataset", sd15_cache, *change])


def test_another_model_s_cache_is_refused_by_name(train_run, pairs_dir, sd15_cache, tmp_path):
    from shapes.pipeline import build_pipeline
    other = build_pipeline(tmp_path / "other", "sd15", seed=1)
    with pytest.raises(UserError, match="vae was [0-9a-f]{12}, is [0-9a-f]{12}; text_encoders was .*made with .*sd15"):
        train_run(common(other, pairs_dir) + ["--cached_dataset", sd15_cache])


def test_another_cache_s_folder_is_not_continued(tiny_sd15, pairs_dir, sd15_cache):
    with pytest.raises(UserError, match=r"holds another cache \(different resolution\)"):
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
    program("training.cache", argv, processes=2)
    for path in sorted(sd15_cache.glob("*.safetensors")):
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
