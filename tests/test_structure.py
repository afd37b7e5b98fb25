"""The house: arrows point down, no two files import each other, no file holds two jobs, a family is known by its file alone."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import besides itself, from the bottom to the top. scripts/ and tests/ are free.
BELOW = {
    "common": [],
    "losses": ["common"],
    "models": ["losses", "common"],
    "prompts": ["common"],
    "eval": ["models", "prompts", "common"],
    "data": ["models", "losses", "common"],
    "training": ["data", "models", "losses", "common"],
    "spo": ["training", "data", "models", "losses", "prompts", "common"],
    "train": ["spo", "training", "data", "models", "losses", "prompts", "common"],
    "shapes": ["train", "spo", "training", "data", "models", "losses", "eval", "prompts", "common"],
    "benchmarks": ["shapes", "train", "spo", "training", "data", "models", "losses", "eval", "prompts", "common"],
}
EXCEPTIONS = {  # (file, what it imports): why
    ("data/labels.py", "eval.metrics"): "AI feedback is a metric's score",
}
LONG = 350
LONGER = {  # file: why
}
FAMILY_WORDS = re.compile(r"sdxl|turbo|refiner", re.IGNORECASE)
FAMILY_FILES = {  # file or folder: why
    "models/stable_diffusion.py": "the family's own file",
    "models/family.py": "the registry, and --sdxl, which refuses any other family",
    "common/train_options.py": "--sdxl, and the published defaults in words",
    "training/defaults.py": "published defaults by family",
    "training/preference.py": "tells the loss that DSPO on SDXL has a formula of its own",
    "losses/config.py": "DSPO on SDXL has a formula of its own",
    "losses/dspo.py": "that formula",
    "losses/objectives.py": "chooses that formula",
    "models/flow.py": "a distilled variant is known by its name",
    "models/single_file.py": "tells single files of the two UNet families apart",
    "eval/options.py": "--sdxl, a published flag",
    "eval/generate.py": "--sdxl, a published flag, names a base",
    "spo/preference_model/options.py": "takes over --sdxl, a published flag",
    "shapes/": "builds tiny pipelines of each kind",
    "benchmarks/": "measures each kind",
}


def product_files() -> list[Path]:
    return [ROOT / "train.py", *(path for room in BELOW if room != "train" for path in sorted((ROOT / room).rglob("*.py")))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = product_files()
each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def imports(path: Path, at_start: bool = False) -> set[str]:
    """The modules that a file imports, those for the type checker excepted; at_start: not those inside of functions."""
    found, waiting = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if is_type_checking(node) or at_start and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            found |= {f"{node.module}.{alias.name}" if file_of(f"{node.module}.{alias.name}") else node.module
                      for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


@functools.cache
def file_of(module: str) -> Path | None:
    """The product file of a module's name."""
    path = ROOT / module.replace(".", "/")
    found = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return found if found.is_file() else None


@each_file
def test_arrows_point_down(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        above = module.split(".")[0]
        if above in BELOW and above != room and above not in BELOW[room]:
            assert any(file == name_of(path) and module.startswith(allowed) for file, allowed in EXCEPTIONS), (
                f"{name_of(path)} imports {module}")


def test_every_exception_is_needed():
    for (file, module) in EXCEPTIONS:
        assert any(name.startswith(module) for name in imports(ROOT / file)), f"{file} no longer imports {module}"
    assert [file for file in LONGER if lines_of(ROOT / file) <= LONG] == []
    assert [file for file in FAMILY_FILES if not file.endswith("/") and not family_lines(ROOT / file)] == []


def test_no_two_files_import_each_other():
    below = {path: {file_of(module) for module in imports(path)} - {None, path} for path in FILES}
    done: set[Path] = set()

    def visit(path: Path, way: list[Path]) -> None:
        assert path not in way, "a cycle: " + " > ".join(map(name_of, [*way[way.index(path):], path]))
        if path not in done:
            for other in below.get(path, ()):
                visit(other, [*way, path])
            done.add(path)

    for path in FILES:
        visit(path, [])


@pytest.mark.parametrize("path", sorted((ROOT / "common").glob("*.py")), ids=name_of)
def test_common_imports_nothing_heavy(path):
    assert not {module.split(".")[0] for module in imports(path)} & {
        "torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "peft", "safetensors"}


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@each_file
def test_a_file_holds_one_job(path):
    assert lines_of(path) <= LONG or name_of(path) in LONGER, f"{name_of(path)} has {lines_of(path)} lines"


def test_train_py_is_read_on_two_screens():
    assert lines_of(ROOT / "train.py") <= 160


def family_lines(path: Path) -> list[str]:
    """What a file's code says of a family by name: names, keys and values; comments, docstrings and messages are prose."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            node.value = ""
    return [line for line in ast.unparse(tree).splitlines() if FAMILY_WORDS.search(line)]


@each_file
def test_a_family_is_known_by_its_own_files_alone(path):
    listed = any(name_of(path) == known or known.endswith("/") and name_of(path).startswith(known) for known in FAMILY_FILES)
    assert listed or family_lines(path) == []
