"""What was compared: settings that differ are refused or shown, both models are named, and untrained metrics are no results."""

import json

import pytest
import yaml

from common.errors import UserError
from eval import compare, leaderboard
from eval.report import write_report
from eval.comparable import describe_model, different_settings, settings_table

pytestmark = pytest.mark.usefixtures("shared_metrics")

PROMPTS = ["a red cat", "a dog", "a house", "z last"]
RECORD = {
    "pretrained_model_name_or_path": "sd15", "unet_path": "run/unet.pth", "pretrained_vae_model_name_or_path": None,
    "base_identity": "sha256:b", "unet_identity": "sha256:u", "vae_identity": "base", "lora": None, "seed": 0,
    "seed_per_prompt": False, "num_images_per_prompt": 1, "negative_prompt": "", "height": 64, "width": 64,
    "num_inference_steps": 50, "cfg": 7.5, "cfg_convention": "official", "scheduler": "euler", "latents_dtype": "float32",
    "empty_prompt": "encoded", "noise_dtype": "bfloat16", "noise_device": "cuda", "unet_dtype": "bfloat16",
    "text_encoder_dtype": "bfloat16", "vae_dtype": "float32", "compiled": False,
}


def entries(**changes) -> list[dict]:
    return [{"prompt": prompt, "gen_image_path": f"{index}.png",
             "metadata": {**RECORD, **changes, "index": index, "k": 0, "image_seed": index}}
            for index, prompt in enumerate(PROMPTS)]


def record(manifest, **changes):
    """Give a manifest of images these settings."""
    content = json.loads(manifest.read_text())
    for entry, of in zip(content, entries(**changes)):
        entry["metadata"] = of["metadata"]
    manifest.write_text(json.dumps(content))
    return manifest


def run(a, b, config, outdir, *more):
    code = compare.main([str(word) for word in ("--json_a", a, "--json_b", b, "--label_a", "SDPO", "--label_b", "SD1.5",
                                                "--metrics_config", config, "--outdir", outdir, "--device", "cpu", *more)])
    [folder] = outdir.iterdir()
    return code, folder, json.loads((folder / "summary.json").read_text())


def models(a: dict, b: dict) -> tuple[dict, dict]:
    return describe_model("a.json", entries(**a)), describe_model("b.json", entries(**b))


@pytest.mark.parametrize("change, what, a, b", [
    ({"seed": 1}, "seed", "0", "1"), ({"seed_per_prompt": True}, "seed", "0", "0 one per prompt"),
    ({"num_inference_steps": 30}, "steps", "50", "30"), ({"cfg": 5.0}, "guidance", "7.5 official", "5.0 official"),
    ({"cfg_convention": "diffusers"}, "guidance", "7.5 official", "7.5 diffusers"),
    ({"height": 128}, "size", "64x64", "128x64"), ({"scheduler": "default"}, "scheduler", "euler", "default"),
    ({"unet_dtype": "float32"}, "dtype", "bfloat16", "float32"), ({"noise_device": "cpu"}, "noise", "cuda", "cpu"),
    ({"empty_prompt": "pipeline"}, "empty prompt", "encoded", "pipeline"),
    ({"base_identity": "sha256:c", "pretrained_model_name_or_path": "other"}, "base", "sd15 (sha256:b)", "other (sha256:c)"),
    ({"vae_identity": "sha256:v"}, "VAE", "base", "sha256:v"),
])
def test_each_setting_that_differs_is_named(change, what, a, b):
    assert different_settings(*models({}, change)) == [{"what": what, "a": a, "b": b}]


def test_what_is_the_models_own_may_differ_and_so_may_a_base_by_another_name():
    own = {"unet_path": "x", "unet_identity": "sha256:x", "lora": {"rank": "4"}, "compiled": True,
           "pretrained_model_name_or_path": "copy/of/sd15"}
    assert different_settings(*models({}, own)) == []


def test_images_of_one_manifest_that_were_made_differently_are_seen():
    mixed = describe_model("a.json", entries() + entries(num_inference_steps=30))
    assert mixed["settings"]["num_inference_steps"] == "several"
    assert [of["what"] for of in different_settings(mixed, describe_model("b.json", entries()))] == ["steps"]


def test_different_settings_are_refused_before_anything_is_scored(make_manifest, metrics_config, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.scoring.score_manifests", lambda *_: pytest.fail("scored"))
    a, b = record(make_manifest("a", PROMPTS)), record(make_manifest("b", PROMPTS, 1), num_inference_steps=30, cfg=5.0)
    with pytest.raises(UserError, match=r"\(steps 50 and 30; guidance 7.5 official and 5.0 official\).*--allow_different_settings"):
        run(a, b, metrics_config, tmp_path / "vs")
    assert not (tmp_path / "vs").exists()


def test_allowed_they_have_a_banner(make_manifest, metrics_config, tmp_path):
    a, b = record(make_manifest("a", PROMPTS)), record(make_manifest("b", PROMPTS, 1), num_inference_steps=30)
    code, folder, summary = run(a, b, metrics_config, tmp_path / "vs", "--metrics", "clip", "--allow_different_settings")
    assert code == 0 and summary["different_settings"] == [{"what": "steps", "a": "50", "b": "30"}]
    page = (folder / "report.html").read_text()
    assert 'class="banner"' in page and "were made with different settings" in page


def test_a_leaderboard_refuses_them_within_a_prompt_group_or_has_a_banner(make_manifest, metrics_config, tmp_path):
    manifests = [record(make_manifest(name, PROMPTS, seed), num_inference_steps=steps, unet_path=name)
                 for seed, (name, steps) in enumerate((("a", 50), ("b", 50), ("c", 30)))]
    flags = ["--manifests", *map(str, manifests), "--metrics_config", str(metrics_config), "--metrics", "clip", "--device", "cpu",
             "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"images of a and c .*\(steps 50 and 30\).*--allow_different_settings"):
        leaderboard.main(flags)
    assert not (tmp_path / "out").exists()
    assert leaderboard.main([*flags, "--allow_different_settings"]) == 0
    result, page = (json.loads((tmp_path / "out" / "leaderboard.json").read_text()), (tmp_path / "out" / "leaderboard.html").read_text())
    assert result["different_settings"] == [{"model_a": "a", "model_b": "c", "what": "steps", "a": "50", "b": "30"}]
    assert 'class="banner"' in page and "steps 50 (a) and 30 (c)." in page


def test_both_models_and_their_settings_are_shown(make_manifest, metrics_config, tmp_path):
    lora = {"base": "sd15", "rank": "16", "alpha": "32", "unet_init": "", "family": "sd15"}
    a = record(make_manifest("a", PROMPTS), unet_path="sdpo/<b>unet</b>.pth", unet_identity="sha256:1", lora=lora)
    b = record(make_manifest("b", PROMPTS, 1), unet_path="base")
    _, folder, summary = run(a, b, metrics_config, tmp_path / "vs", "--metrics", "clip")
    assert [summary["models"][side]["checkpoint"] for side in "ab"] == ["sdpo/<b>unet</b>.pth", "base"]
    assert summary["models"]["a"]["identity"] == "sha256:1" and summary["models"]["b"]["base"] == "sd15"
    assert summary["models"]["b"]["settings"]["num_inference_steps"] == 50 and summary["models"]["a"]["lora"] == lora
    assert summary["different_settings"] == summary["notes"] == []
    page = (folder / "report.html").read_text()
    for text in ("sdpo/&lt;b&gt;unet&lt;/b&gt;.pth", "rank 16, alpha 32, trained on sd15", "num inference steps"):
        assert text in page
    assert 'class="banner"' not in page


def test_without_settings_models_are_compared_as_before_with_a_note(make_manifest, metrics_config, tmp_path, capsys):
    a, b = make_manifest("a", PROMPTS), record(make_manifest("b", PROMPTS, 1))
    code, folder, summary = run(a, b, metrics_config, tmp_path / "vs", "--metrics", "clip")
    [note] = summary["notes"]
    assert code == 0 and note.startswith("SDPO records no settings") and f"note: {note}" in capsys.readouterr().err
    assert note in (folder / "report.html").read_text() and summary["models"]["a"]["settings"] is None
    assert ("seed", "-", "0", True) in settings_table(summary["models"])


def test_metadata_of_the_prompts_alone_is_no_settings():
    """The official program copies what its prompt file says of each prompt."""
    theirs = [{"prompt": "a", "gen_image_path": "a.png", "metadata": {"category": "animals"}}]
    assert describe_model("a.json", theirs)["settings"] is None


def test_an_earlier_comparison_has_a_page_too(make_manifest, metrics_config, tmp_path):
    _, folder, summary = run(make_manifest("a", PROMPTS), make_manifest("b", PROMPTS, 1), metrics_config, tmp_path / "vs",
                             "--metrics", "clip")
    for name in ("models", "different_settings", "notes"):
        del summary[name]
    for row in summary["metrics"]:
        del row["label"], row["untrained"]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "CLIPScore" in write_report(folder).read_text()


def test_an_untrained_metric_is_grey_and_counts_for_nothing(make_manifest, metrics_config, tmp_path, capsys):
    a, b = make_manifest("a", PROMPTS), make_manifest("b", PROMPTS, 1)
    trained = run(a, b, metrics_config, tmp_path / "trained", "--metrics", "clip", "aesthetics")[2]
    sections = yaml.safe_load(metrics_config.read_text())
    sections["pickscore"]["untrained"] = True
    marked = metrics_config.with_name("marked.yaml")
    marked.write_text(yaml.safe_dump(sections))
    capsys.readouterr()
    code, folder, summary = run(a, b, marked, tmp_path / "vs", "--metrics", "pickscore", "clip", "aesthetics")
    rows = {row["metric"]: row for row in summary["metrics"]}
    assert rows["pickscore"]["untrained"] and rows["pickscore"]["sign_test_p"] is rows["pickscore"]["sign_test_p_holm"] is None
    assert summary["averages"] == trained["averages"] and code == 0
    assert [rows[row["metric"]]["sign_test_p_holm"] for row in trained["metrics"]] == [
        row["sign_test_p_holm"] for row in trained["metrics"]]
    page = (folder / "report.html").read_text()
    assert page.count('class="rate untrained"') == 1 and "PickScore (untrained)" in page and "no result" in page
    assert "| PickScore (untrained) |" in capsys.readouterr().out


def test_where_no_metric_is_trained_nothing_is_averaged(make_manifest, tmp_path, metrics_config, capsys):
    marked = metrics_config.with_name("untrained.yaml")
    marked.write_text(yaml.safe_dump({name: {**section, "untrained": True}
                                      for name, section in yaml.safe_load(metrics_config.read_text()).items()}))
    _, folder, summary = run(make_manifest("a", PROMPTS), make_manifest("b", PROMPTS, 1), marked, tmp_path / "vs",
                             "--metrics", "clip")
    assert summary["averages"] is None and "no metric is trained" in capsys.readouterr().out
    assert "macro" not in (folder / "report.html").read_text()


def test_the_models_to_try_the_page_with_are_untrained(tmp_path):
    from shapes.tiny_metrics import write_tiny_metrics
    sections = yaml.safe_load(write_tiny_metrics(tmp_path, image_size=32, patch_size=16).read_text())
    assert all(section["untrained"] is True for section in sections.values()) and len(sections) == 6
