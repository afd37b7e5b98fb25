"""Files that mean harm: nothing in them runs, nothing is written or read where it should not be."""

import ast
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from common.errors import UserError
from common.train_options import ModelOptions
from models.family import open_family
from models.networks import load_network
from models.weights import from_hub, read_state_dict
from training.checkpoints import choose_checkpoint, fault

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("common", "losses", "models", "data", "training", "spo", "eval", "prompts", "shapes", "benchmarks", "scripts")
           for path in sorted((ROOT / folder).rglob("*.py"))] + [ROOT / "train.py"]


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def payload(tmp_path):
    """(a function that writes a malicious file, the mark that its payload leaves when it runs)"""
    mark = tmp_path / "payload-ran"

    def write(path: Path, kind: str = "torch") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"state": Payload(mark), "weight": torch.zeros(2)}
        if kind == "torch":
            torch.save(content, path)
        elif kind == "legacy":
            torch.save(content, path, _use_new_zipfile_serialization=False)
        else:
            path.write_bytes(pickle.dumps(content))
        return path

    write(tmp_path / "control.pth")
    torch.load(tmp_path / "control.pth", weights_only=False)
    assert mark.exists()  # it does run where it is let
    mark.unlink()
    return write, mark


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["unet.pth", "unet.bin", "unet.safetensors"])
def test_a_pickle_as_unet_is_refused_and_does_not_run(payload, tmp_path, tiny_sd15, kind, name):
    write, mark = payload
    path = write(tmp_path / "run" / name, kind)
    for load in (read_state_dict, lambda path: load_network(open_family(ModelOptions(str(tiny_sd15))), path)):
        with pytest.raises(UserError) as error:
            load(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not mark.exists()


def test_a_pickle_inside_a_pipeline_folder_is_refused_and_does_not_run(payload, tmp_path, tiny_sd15):
    write, mark = payload
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sd15, folder)
    for part in ("unet", "vae"):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        write(folder / part / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError):
        load_network(open_family(ModelOptions(str(folder))))
    with pytest.raises(UserError):
        from_hub(AutoencoderKL, folder, "the VAE", subfolder="vae")
    assert not mark.exists()


@pytest.mark.parametrize("metric", ["pickscore", "hpsv2", "aesthetics", "clip", "imagereward"])
def test_a_pickle_as_metric_weights_is_refused_and_does_not_run(payload, tmp_path, metric):
    from eval.metrics import load_metric, read_config
    from shapes.tiny_metrics import write_tiny_metrics

    write, mark = payload
    config = read_config(write_tiny_metrics(tmp_path / "metrics", image_size=64, patch_size=16))
    weights = [path for path in (tmp_path / "metrics").rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".safetensors")]
    assert weights
    for path in weights:
        path.unlink()
        write(path.with_name("pytorch_model.bin") if path.suffix == ".safetensors" else path)
    with pytest.raises(UserError):
        load_metric(metric, "cpu", config)
    assert not mark.exists()


def test_a_manifest_cannot_name_files_outside_its_checkpoint(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = tmp_path / "run" / "checkpoint-3"
    folder.mkdir(parents=True)
    for name in ("../../secret", str(secret), "/dev/zero", "link"):
        (folder / "manifest.json").write_text(json.dumps({name: {"bytes": 6, "sha256": "0" * 64}}))
        if name == "link":
            (folder / "link").symlink_to(secret)
        assert "outside" in fault(folder)
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        choose_checkpoint("latest", tmp_path / "run")


def call_name(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_unpickles_or_runs_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = call_name(node), {keyword.arg: keyword.value for keyword in node.keywords}
        where = f"{path.name}:{node.lineno} {name}"
        if name == "torch.load":
            assert ast.unparse(keywords.get("weights_only", ast.Constant(None))) == "True", where
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                            "os.system", "os.popen", "eval", "exec", "joblib.load", "dill.load", "marshal.loads",
                            "shutil.unpack_archive", "np.lib.format.read_array"), where
        assert not name.endswith((".extractall", ".extract")), where
        assert "trust_remote_code" not in keywords, where
        assert ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) == "False", where
        assert "shell" not in keywords, where
        if name.endswith("jinja2.Environment") and path.parent.name == "eval":  # what shows other people's prompts
            assert ast.unparse(keywords["autoescape"]) == "True", where


def test_scripts_quote_what_they_are_given():
    """A prompt, label or path with spaces, quotes or $(...) stays one word: no bare $* and no eval."""
    for path in sorted((ROOT / "scripts").rglob("*.sh")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\\\w])eval\s", text.replace("scripts/eval", "").replace("-m eval", "")
                             .replace("/eval/", "")), path
        assert not re.search(r"(?<!\")\$@(?!\")", re.sub(r'"\$@"', "", text)) and "$*" not in re.sub(r'\$\*\)?"', "", text), path
        assert "curl" not in text or "| sh" not in text, path
