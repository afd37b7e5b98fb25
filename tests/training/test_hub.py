"""Publishing: what goes up, what stays, and what a failure says. The hub itself is replaced by a recorder."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from common.errors import UserError
from common.train_checks import parse_options
from training.hub import push


class Recorder:
    fails = False
    uploads: list = []

    def create_repo(self, name, exist_ok):
        if Recorder.fails:
            raise ConnectionError("no route to the hub")
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, **what):
        Recorder.uploads.append(what)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    monkeypatch.setattr(Recorder, "uploads", [])
    (tmp_path / "run").mkdir()
    return parse_options(["--pretrained_model_name_or_path", "org/base", "--dataset_name", "org/pairs", "--output_dir",
                          str(tmp_path / "run"), "--beta_dpo", "5000", "--use_winner_preserving", "--winner_preserving_mu", "0.9"])


def test_the_pipeline_goes_up_with_a_card_and_checkpoints_stay(options, tmp_path):
    assert push(options, "openrail++") == "https://huggingface.co/me/run"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "base_model: org/base" in card and "license: openrail++" in card and "`org/pairs`" in card and "mu 0.9" in card and "| beta_dpo | 5000.0 |" in card
    [upload] = Recorder.uploads
    assert {"checkpoint-*", "replaced-*", "logs/*"} <= set(upload["ignore_patterns"])


def test_a_card_names_no_local_folder_as_its_base_model(options, tmp_path):
    (tmp_path / "my-base").mkdir()
    options.model.pretrained_model_name_or_path = str(tmp_path / "my-base")
    push(options, "openrail++")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "mu 0.9" in card
    options.objective.train_method = "sft"
    push(options, "openrail++")
    assert "safeguard" not in (tmp_path / "run" / "README.md").read_text()
    assert "base_model" not in card and "`my-base` trained with" in card and str(tmp_path) not in card


def test_a_failed_push_is_one_line_and_says_that_nothing_is_lost(options, monkeypatch):
    monkeypatch.setattr(Recorder, "fails", True)
    with pytest.raises(UserError, match="the run is complete in .*run.*no route to the hub"):
        push(options, "openrail++")
