"""Build one of the three published prompt groups from its source.

    python -m prompts.build papv2|hpsv2|partiprompts [--source FILE_OR_FOLDER] [--output FILE]

    papv2          distinct captions of Pick-a-Pic v2's test split, in order of appearance
    hpsv2          HPDv2's benchmark prompts: anime, concept-art, paintings, photo, 800 each
    partiprompts   the Prompt column of PartiPrompts.tsv

Without --source they are downloaded. A local source is the published form (parquet, a folder of four JSON files, TSV)
or a prompt group as JSON. The texts belong to others, so prompts/ ignores them in git.
"""

import csv
import io
import urllib.request
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet
from huggingface_hub import HfFileSystem, hf_hub_download

from common.errors import UserError, first_line, run_program, warn
from common.files import make_room, write_json
from common.options import option, parse
from prompts import PROMPTS, parse_group, read_text

PUBLISHED_SIZES = {"papv2": 487, "hpsv2": 3200, "partiprompts": 1632}
PICK_A_PIC = "datasets/yuvalkirstain/pickapic_v2/data"
HPD_FILES = ("anime.json", "concept-art.json", "paintings.json", "photo.json")
PARTI_PROMPTS = "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"


@dataclass
class BuildOptions:
    title = "the prompt group"

    group: Literal["papv2", "hpsv2", "partiprompts"] = option(MISSING, "the group", positional=True)
    source: str | None = option(None, "a local file or folder instead of the download")
    output: str | None = option(None, "the file to write", default_text="prompts/GROUP.json")


def papv2(source: str | None) -> list[str]:
    """Distinct captions of the test split, in order of appearance; only the caption column is read."""
    if source is None:
        filesystem = HfFileSystem()
        paths, open_file = filesystem.glob(f"{PICK_A_PIC}/test-*.parquet"), filesystem.open
    elif Path(source).suffix == ".json":
        return list(dict.fromkeys(read_text_group(Path(source))))
    else:
        folder = Path(source)
        paths = [folder] if folder.is_file() else sorted(folder.rglob("test-*.parquet")) or sorted(folder.glob("*.parquet"))
        open_file = lambda path: open(path, "rb")  # noqa: E731
    if not paths:
        raise UserError(f"{source or PICK_A_PIC} holds no parquet file: give Pick-a-Pic v2's test split")
    captions = []
    for path in paths:
        with open_file(path) as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            if "caption" not in parquet.schema_arrow.names:
                raise UserError(f"{path} has no caption column: it is not Pick-a-Pic")
            captions += parquet.read(columns=["caption"])["caption"].to_pylist()
    faults = [row for row, caption in enumerate(captions, start=1) if not caption or not caption.strip()]
    if faults:
        raise UserError(f"{source or PICK_A_PIC}: row {faults[0]} has no caption")
    return list(dict.fromkeys(captions))


def hpsv2(source: str | None) -> list[str]:
    """The four benchmark files one after the other; repeated prompts stay."""
    if source is None:
        files = [Path(hf_hub_download("zhwang/HPDv2", f"benchmark/{name}", repo_type="dataset")) for name in HPD_FILES]
    elif Path(source).is_dir():
        files = [Path(source) / name for name in HPD_FILES]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{source} lacks {', '.join(missing)}: HPDv2's benchmark has {', '.join(HPD_FILES)}")
    else:
        files = [Path(source)]
    return [prompt for file in files for prompt in read_text_group(file)]


def partiprompts(source: str | None) -> list[str]:
    """The Prompt column of the TSV file."""
    if source is None:
        with urllib.request.urlopen(PARTI_PROMPTS, timeout=60) as response:
            return parse_tsv(response.read().decode("utf-8"), PARTI_PROMPTS)
    path = Path(source) / "PartiPrompts.tsv" if Path(source).is_dir() else Path(source)
    return read_text_group(path) if path.suffix == ".json" else parse_tsv(read_text(path), str(path))


def parse_tsv(text: str, source: str) -> list[str]:
    """Raises UserError with the line number of a row without a prompt."""
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    if "Prompt" not in (rows.fieldnames or []):
        raise UserError(f"{source}, line 1: no Prompt column, so this is not PartiPrompts.tsv")
    prompts = []
    for row in rows:
        if not row["Prompt"] or not row["Prompt"].strip():
            raise UserError(f"{source}, line {rows.line_num}: no prompt in this row")
        prompts.append(row["Prompt"])
    return prompts


def read_text_group(path: Path) -> list[str]:
    return parse_group(read_text(path), str(path))


def build(group: str, source: str | None, output: Path) -> list[str]:
    """Write the group to `output` and return its prompts. Raises UserError when the source is absent or malformed."""
    if source is not None and not Path(source).exists():
        raise UserError(f"no file or folder {source}")
    try:
        prompts = {"papv2": papv2, "hpsv2": hpsv2, "partiprompts": partiprompts}[group](source)
    except UserError:
        raise
    except Exception as error:
        if source is not None:
            raise UserError(f"{source} cannot be read as a source of {group}: {first_line(error, 200)}") from error
        # the hub's and the network's failures are of many kinds
        raise UserError(f"{group} cannot be downloaded ({first_line(error, 120)}): fetch it on another machine and "
                        f"give it with `python -m prompts.build {group} --source FILE_OR_FOLDER`") from error
    if not prompts:
        raise UserError(f"{source or group} holds no prompt")
    make_room(output, "--output")
    write_json(output, [{"prompt": prompt} for prompt in prompts])
    return prompts


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([BuildOptions], argv, program="python -m prompts.build", description=__doc__)
    output = Path(options.output or PROMPTS / f"{options.group}.json")
    prompts = build(options.group, options.source, output)
    print(f"wrote {output}: {len(prompts)} prompts ({len(set(prompts))} distinct)")
    if len(prompts) != PUBLISHED_SIZES[options.group]:
        warn(f"the published {options.group} has {PUBLISHED_SIZES[options.group]} prompts")


if __name__ == "__main__":
    run_program(main)
