"""Metrics of one's own, named by class in a metrics.yaml: scored, kept, compared, and refused in one line."""

import json
import sys

import pyarrow.parquet as pq
import pytest
import yaml

from common.errors import UserError
from eval import compare, pairs, score
from eval.metrics import METRICS, load_metric, metric_version, read_config

PROMPTS = ["a red cat", "a dog", "a house"]
CODE = '''
import torch

from eval.metrics.base import Metric


class Redness(Metric):
    """How red an image is, in pixels that the metric asks for."""

    image_size = 32

    def __init__(self, device="cpu", weight=1.0):
        super().__init__(device)
        self.weight = weight

    def _score(self, pixels, prompts):
        return self.weight * (pixels[:, 0] - pixels[:, 1]).mean(dim=(1, 2))


class Width(Metric):
    """Looks at the images themselves."""

    def score(self, images, prompts):
        return torch.tensor([float(image.width + len(prompt)) for image, prompt in zip(images, prompts)])


class Sized(Width):
    """Has a size of its own use."""

    def __init__(self, device="cpu", image_size=32):
        super().__init__(device)


class Flat(Metric):
    image_size = 32

    def _score(self, pixels, prompts):
        return torch.zeros(len(pixels), 1)


class Broken(Metric):
    def score(self, images, prompts):
        return 1 / 0


def no_class():
    pass
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one's own on the path, and how a metrics.yaml names its classes."""
    (tmp_path / "path" / "my_pkg").mkdir(parents=True)
    file = tmp_path / "path" / "my_pkg" / "my_file.py"
    (file.parent / "__init__.py").write_text("")
    file.write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield file
    for name in [name for name, known in METRICS.items() if known.own]:
        del METRICS[name]
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def config(tmp_path, **sections):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({name: {"class": f"my_pkg.my_file:{section.pop('cls')}", **section}
                                    for name, section in sections.items()}))
    return path


def kept(manifest):
    return json.loads(manifest.with_name(f"{manifest.stem}_scores.json").read_text())


def test_it_is_scored_beside_the_others(package, make_manifest, metrics_config, tmp_path, capsys):
    path = config(tmp_path, redness={"cls": "Redness", "weight": 2.0, "label": "Redness x2"}, width={"cls": "Width"},
                  sized={"cls": "Sized", "image_size": 32})
    manifest = make_manifest("a", PROMPTS)
    assert score.main(["--manifests", str(manifest), "--metrics", "redness", "width", "sized", "oracle", "--metrics_config", str(path),
                       "--device", "cpu"]) == 1  # the oracle judges captions of drawings alone
    told = kept(manifest)
    assert [image["scores"]["width"] for image in told["images"]] == [64.0 + len(prompt) for prompt in PROMPTS]
    assert all(image["scores"]["sized"] == image["scores"]["width"] for image in told["images"])
    assert told["metrics"]["redness"]["label"] == "Redness x2" and len({i["scores"]["redness"] for i in told["images"]}) == 3
    assert "FinalResults Redness x2 for own" in capsys.readouterr().out
    assert score.main(["--manifests", str(manifest), "--metrics", "clip", "--metrics_config", str(metrics_config),
                       "--device", "cpu"]) == 0
    assert {"redness", "width", "clip"} <= kept(manifest)["metrics"].keys()


def test_it_runs_as_a_program_with_its_folder_on_the_path(package, make_manifest, tmp_path, run, python):
    path = config(tmp_path, redness={"cls": "Redness"})
    manifest = make_manifest("a", PROMPTS)
    ended = run([python, "-m", "eval.score", "--manifests", manifest, "--metrics", "redness", "--metrics_config", path,
                 "--device", "cpu"], PYTHONPATH=str(package.parents[1]))
    assert "FinalResults redness for own" in ended.stdout


def test_it_is_compared(package, make_manifest, tmp_path):
    path, outdir = config(tmp_path, redness={"cls": "Redness", "label": "Redness"}), tmp_path / "vs"
    a, b = make_manifest("a", PROMPTS), make_manifest("b", PROMPTS, 1)
    compare.main(["--json_a", str(a), "--json_b", str(b), "--metrics", "redness", "--metrics_config", str(path), "--outdir",
                  str(outdir), "--device", "cpu"])
    [folder] = outdir.iterdir()
    assert json.loads((folder / "summary.json").read_text())["metrics"][0]["label"] == "Redness"
    assert "Redness" in (folder / "report.html").read_text()


def test_it_decides_pairs(package, make_manifest, tmp_path):
    path, manifest = config(tmp_path, redness={"cls": "Redness"}), make_manifest("a", ["a red cat"] * 3)
    flags = ["--manifests", str(manifest), "--metrics", "redness", "--metrics_config", str(path)]
    assert score.main([*flags, "--device", "cpu"]) == 0
    del METRICS["redness"]  # as in a program of its own
    pairs.main([*flags, "--output", str(tmp_path / "pairs")])
    [row] = pq.read_table(tmp_path / "pairs" / "train-00000.parquet").to_pylist()
    assert (row["redness_0"] > row["redness_1"]) == (row["label_0"] == 1.0)


def test_kept_scores_follow_the_classs_file_and_settings(package, tmp_path):
    def version(**settings):
        return metric_version("redness", read_config(config(tmp_path, redness={"cls": "Redness", **settings})))

    first = version()
    assert version() == first == version(label="other", untrained=True) != version(weight=3.0)
    package.write_text(CODE + "\n# changed")
    assert version() != first


@pytest.mark.parametrize("cls, said", [
    ("my_file", "must be package.module:Class"), ("my_pkg.my_file:", "must be package.module:Class"),
    ("../x:Y", "must be package.module:Class"), ("my_pkg.nothing:X", "cannot be imported.*PYTHONPATH"),
    ("my_pkg.my_file:Rednes", "my_file.py has no class Rednes: it has Redness, Width, Sized, Flat, Broken$"),
    ("my_pkg:Redness", "__init__.py has no class Redness: it has none"), ("my_pkg.broken:X", r"cannot be imported .*\): mend its file"),
    ("my_pkg.my_file:no_class", "no subclass of .*Metric"),
])
def test_a_wrong_class_is_reported_in_one_line(cls, said, package, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"mine": {"class": cls}}))
    (package.parent / "broken.py").write_text("import no_such_module")
    with pytest.raises(UserError, match=said):
        load_metric("mine", config=read_config(path))


def test_names_of_the_metrics_that_are_there_are_taken(package, tmp_path):
    with pytest.raises(UserError, match="pickscore is the name of a metric that is there already"):
        read_config(config(tmp_path, pickscore={"cls": "Redness"}))
    with pytest.raises(UserError, match="no setting wieght: it takes weight"):
        load_metric("redness", config=read_config(config(tmp_path, redness={"cls": "Redness", "wieght": 1.0})))


def test_scores_of_a_wrong_shape_fail_their_metric_alone(package, make_manifest, tmp_path, capsys):
    path, manifest = config(tmp_path, flat={"cls": "Flat"}, redness={"cls": "Redness"}), make_manifest("a", PROMPTS)
    assert score.main(["--manifests", str(manifest), "--metrics", "flat", "redness", "--metrics_config", str(path),
                       "--device", "cpu"]) == 1
    assert "flat was not scored: it gave scores of shape (3, 1) for 3 images" in capsys.readouterr().err
    assert list(kept(manifest)["metrics"]) == ["redness"]


def test_an_error_in_the_class_fails_its_metric_alone_and_names_its_line(package, make_manifest, tmp_path, capsys):
    path, manifest = config(tmp_path, broken={"cls": "Broken"}, redness={"cls": "Redness"}), make_manifest("a", PROMPTS)
    assert score.main(["--manifests", str(manifest), "--metrics", "broken", "redness", "--metrics_config", str(path),
                       "--device", "cpu"]) == 1
    line = CODE.splitlines().index("        return 1 / 0") + 1
    assert f"broken was not scored: ZeroDivisionError in {package}, line {line}: division by zero" in capsys.readouterr().err
    assert list(kept(manifest)["metrics"]) == ["redness"]
