"""The metrics by name. Each is one file with one class behind one signature: score(images, prompts) -> Tensor (N,).

A new metric is one file and one line in METRICS, or a class of one's own that a metrics.yaml names. What is known of a
metric without its model is here; torch and the metric's libraries are imported when it is loaded.
"""

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from common.errors import UserError, first_line
from common.files import fingerprint

if TYPE_CHECKING:
    from eval.metrics.base import Metric


class Known(NamedTuple):
    module: str
    name: str  # of the class
    label: str  # as the published logs call it
    revision: int = 1  # raised when the computation changes, so that kept scores are not reused
    image_size: int | None = 224  # side of the pixels it looks at; None: the images themselves
    own: bool = False  # named by a metrics.yaml: the class says its image_size


METRICS = {
    "pickscore": Known("eval.metrics.pickscore", "PickScore", "PickScore"),
    "hpsv2": Known("eval.metrics.hpsv2", "HPSv2", "HPSv2"),
    "hpsv2.1": Known("eval.metrics.hpsv2", "HPSv21", "HPSv2.1"),
    "aesthetics": Known("eval.metrics.aesthetics", "Aesthetics", "AesScore"),
    "clip": Known("eval.metrics.clip", "CLIPScore", "CLIPScore"),
    "imagereward": Known("eval.metrics.imagereward", "ImageReward", "ImageReward"),
    "oracle": Known("shapes.metric", "Oracle", "Oracle", image_size=None),  # drawn shapes only
}
PUBLISHED = ("pickscore", "hpsv2", "aesthetics", "clip", "imagereward")  # the five of the published tables
ALIASES = {"aes": "aesthetics", "hps": "hpsv2"}  # names of train.py's --choice_model
FOLDER = "folder of the yaml file"  # no name of an argument
OF_EVERY_METRIC = ("class", "label", "untrained", FOLDER)  # settings that are not the class's own
FILE_ENDINGS = (".json", ".pt", ".pth", ".bin", ".safetensors", "/")  # of a value that can only be a path
RELATIVE = "paths in a metrics.yaml are relative to its folder, or else to the working directory"
DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "metrics.yaml"


def canonical_name(name: str) -> str:
    """The registry's name for `name` or its alias. Raises UserError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in METRICS:
        raise UserError(f"no metric named {name}: choose from {', '.join(METRICS)} (or {', '.join(ALIASES)})")
    return name


def metric_class(name: str) -> "type[Metric]":
    known = METRICS[canonical_name(name)]
    if not known.own:
        return getattr(importlib.import_module(known.module), known.name)
    from eval.metrics.base import Metric
    try:
        module = importlib.import_module(known.module)
    except (ImportError, AttributeError, SyntaxError) as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{known.module}.".startswith(f"{error.name}.")
        raise UserError(f"{name}: the class {known.module}:{known.name} cannot be imported ({first_line(error, 200)}): "
                        + ("its folder belongs on PYTHONPATH" if absent else "mend its file")) from None
    cls = getattr(module, known.name, None)
    if cls is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
        raise UserError(f"{name}: {module.__file__} has no class {known.name}: it has {', '.join(classes) or 'none'}")
    if not isinstance(cls, type) or not issubclass(cls, Metric):
        raise UserError(f"{name}: {known.module}:{known.name} is no subclass of eval.metrics.base.Metric (docs/evaluation.md)")
    return cls


def register_own(name: str, section: dict, path: Path) -> None:
    """Know a metric by the class that its section of a metrics.yaml names. Raises UserError."""
    module, colon, cls = str(section["class"]).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), cls]):
        raise UserError(f"{path}: the class of {name} must be package.module:Class, not {section['class']!r}")
    if name in ALIASES or name in METRICS and not METRICS[name].own:
        raise UserError(f"{path}: {name} is the name of a metric that is there already: call the class's otherwise")
    METRICS[name] = Known(module, cls, str(section.get("label") or name), image_size=None, own=True)


def looks_at(name: str, settings: dict) -> int | None:
    """The side of the pixels that a metric looks at; None where it takes the images themselves."""
    from eval.metrics.base import Metric
    if not METRICS[name].own:
        return settings.get("image_size", METRICS[name].image_size)
    cls = metric_class(name)
    return settings.get("image_size", getattr(cls, "image_size", None)) if cls.score is Metric.score else None


def read_config(path: str | os.PathLike | None = None) -> dict[str, dict]:
    """metrics.yaml: for each metric, the arguments of its class and OF_EVERY_METRIC. A value that names a file or folder
    beside the yaml file means that one; FOLDER is the yaml file's. Metrics of one's own are known by name from here on. Raises UserError when the file
    is missing or no such mapping."""
    path = Path(path or DEFAULT_CONFIG)
    try:
        config = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise UserError(f"no metrics config at {path}: leave --metrics_config out or name a file like "
                        "configs/metrics.yaml") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, dict) or not all(isinstance(section, dict | None) for section in config.values()):
        raise UserError(f"{path} must map metric names to their settings, as configs/metrics.yaml does")
    for name, section in config.items():
        if (section or {}).get("class"):
            register_own(name, section, path)
        canonical_name(name)
    return {
        name: {key: str(path.parent / value) if isinstance(value, str) and (path.parent / value).exists() else value
               for key, value in (section or {}).items()} | {FOLDER: str(path.parent.absolute())}
        for name, section in config.items()
    }


def metric_settings(name: str, config: dict | str | os.PathLike | None = None) -> dict:
    """The settings of one metric's class; `config` is a metrics.yaml, what read_config made of one, or None for the
    default."""
    config = config if isinstance(config, dict) else read_config(config)
    return {key: value for key, value in config.get(canonical_name(name), {}).items() if key not in OF_EVERY_METRIC}


def is_untrained(name: str, config: dict[str, dict]) -> bool:
    """Whether its model learned nothing, so that its scores are no results."""
    return bool(config.get(name, {}).get("untrained"))


def metric_version(name: str, config: dict | str | os.PathLike | None = None) -> str:
    """What a kept score depends on besides image and prompt: the metric's revision and its settings, files by content; of a
    class of one's own its file too."""
    name, settings = canonical_name(name), metric_settings(name, config)
    parts = [f"{key}={'sha256:' + fingerprint(value) if isinstance(value, str) and Path(value).exists() else value}"
             for key, value in sorted(settings.items())]
    if METRICS[name].own:
        metric_class(name)  # which imports its module
        file = sys.modules[METRICS[name].module].__file__
        parts.insert(0, f"class={METRICS[name].module}:{METRICS[name].name} sha256:{fingerprint(file)}")
    return " ".join([f"{name} {METRICS[name].revision}", *parts])


def absent_paths(cls: "type[Metric]", settings: dict) -> list[str]:
    """Settings that look like paths, of nothing that exists: a hub's name with one slash may be meant as one; a default is none."""
    defaults = inspect.signature(cls.__init__).parameters
    return [value for key, value in settings.items()
            if isinstance(value, str) and value != defaults[key].default and ":" not in value
            and ("/" in value or value.endswith(FILE_ENDINGS)) and not Path(value).exists()]


def load_metric(name: str, device: str = "cpu", config: dict | str | os.PathLike | None = None) -> "Metric":
    """Load one metric's model.

    Args:
        name: a name of METRICS, or train.py's short form (aes, hps).
        device: where the model runs.
        config: a metrics.yaml, what read_config made of one, or None for configs/metrics.yaml.

    Raises:
        UserError: an unknown name or setting, or weights that cannot be loaded or do not fit.
    """
    name, cls = canonical_name(name), metric_class(name)
    config = config if isinstance(config, dict) else read_config(config)
    settings = metric_settings(name, config)
    unknown = set(settings) - set(cls.settings())
    if unknown:
        raise UserError(f"{name} has no setting {', '.join(sorted(unknown))}: it takes {', '.join(cls.settings())}")
    folder = Path(config.get(name, {}).get(FOLDER, "")).absolute()
    absent = [] if METRICS[name].own else absent_paths(cls, settings)  # one's own class reads its settings as it likes
    for value in absent:
        if value.endswith(FILE_ENDINGS) or value.startswith((".", "/", "~")) or value.count("/") > 1:
            raise UserError(f"{name} has no file {folder / value}: {RELATIVE}")
    try:
        metric = cls(device=device, **settings)
    except UserError as error:
        raise UserError(f"{error}; nor is there a file {folder / absent[0]}: {RELATIVE}" if absent else str(error)) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} cannot be loaded: {first_line(error, 200)}") from error
    metric.name, metric.label, metric.version = name, METRICS[name].label, metric_version(name, config)
    return metric
