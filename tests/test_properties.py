"""Whatever configs, prompt files, manifests and checkpoints hold, the user meets a result or one clear line."""

import json
import os
import string
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from eval.manifest import image_path, read_manifest
from prompts import read_group
from common.options import flag_names
from common.train_checks import parse_options
from common.train_options import GROUPS, TrainOptions
from training.checkpoints import MANIFEST, PROGRESS, choose_checkpoint, fault, read_progress, write_manifest
from common.errors import UserError
from training.records import EventLog
from common.images import BadImage, decode_image, image_bytes
from models.weights import read_state_dict

COMMON = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
                    max_leaves=12)
OPTIONS = [name for group in GROUPS for name in sorted(flag_names(group))]


def clear(error: UserError) -> None:
    """One line that says something."""
    message = str(error)
    assert message.strip() and "\n" not in message.strip() and "Traceback" not in message


def text_or_json(content) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


@COMMON
@given(st.binary(max_size=200) | st.dictionaries(st.sampled_from(OPTIONS) | st.text(max_size=12), JSON, max_size=4) | JSON)
@example(b"\xff\xfe")
@example(b"a: &a [*a]")
@example(b"!!python/object/apply:os.system ['false']")
@example({"train_batch_size": "many"})
@example({"validation_prompts": ["\ud800"]})
@example({"seed": 10**400})
def test_configs(tmp_path, content):
    config = tmp_path / "config.yaml"
    if isinstance(content, bytes):
        config.write_bytes(content)
    else:
        config.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
    try:
        options = parse_options([f"--config={config}", "--pretrained_model_name_or_path=base", "--train_data_dir=pairs"])
        assert isinstance(options, TrainOptions)
    except UserError as error:
        clear(error)


@COMMON
@given(st.binary(max_size=300) | JSON | st.lists(st.fixed_dictionaries({"prompt": st.text(max_size=30)}) | st.text(), max_size=5))
@example(b"[" * 100_000)
@example(b'["\\ud800"]')
@example(b'[{"prompt": "a"}]\x00')
@example([{"prompt": 10**300}])
def test_prompt_files(tmp_path, content):
    path = tmp_path / "group.json"
    path.write_bytes(text_or_json(content))
    try:
        prompts = read_group(path)
        assert prompts and all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
        "".join(prompts).encode()  # what is accepted can be written
    except UserError as error:
        clear(error)


@COMMON
@given(st.binary(max_size=300) | JSON | st.lists(st.fixed_dictionaries(
    {"prompt": st.text(max_size=30) | JSON, "gen_image_path": st.text(max_size=30) | JSON}), max_size=4))
@example(b"[" * 100_000)
@example([{"prompt": "a", "gen_image_path": "a\0b"}])
@example([{"prompt": "a", "gen_image_path": "x" * 5000}])
@example(b'[{"prompt": "\\ud800", "gen_image_path": "a.png"}]')
def test_generation_manifests(tmp_path, content):
    path = tmp_path / "papv2_seed0_64x64_1s_7.5cfg.json"
    path.write_bytes(text_or_json(content))
    try:
        for entry in read_manifest(path):
            image_path(path, entry)
            json.dumps(entry["prompt"], ensure_ascii=False).encode()  # what is accepted can be written
    except UserError as error:
        clear(error)


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "unet.pth").write_bytes(os.urandom(200))
    (folder / "optimizer.bin").write_bytes(os.urandom(100))
    (folder / PROGRESS).write_text(json.dumps({"step": 7, "lr_scheduler": {}, "settings": {}, "record": {}}))
    write_manifest(folder)
    return folder


@COMMON
@given(st.data())
def test_any_change_of_a_checkpoint_is_recognised(data):
    with tempfile.TemporaryDirectory() as temporary:
        good, folder = checkpoint(Path(temporary, "checkpoint-3")), checkpoint(Path(temporary, "checkpoint-7"))
        assert fault(folder) is None
        path = folder / data.draw(st.sampled_from(["unet.pth", "optimizer.bin", PROGRESS, MANIFEST]))
        before = path.read_bytes()
        after = data.draw(st.binary(max_size=300) | JSON.map(text_or_json)
                          | st.integers(0, len(before) - 1).map(lambda cut: before[:cut])
                          | st.tuples(st.integers(0, len(before) - 1), st.integers(1, 255)).map(
                              lambda place: before[:place[0]] + bytes([before[place[0]] ^ place[1]]) + before[place[0] + 1:]))
        path.write_bytes(after)
        problem = fault(folder)
        if path.name == MANIFEST:  # another spelling of the same, or fewer files: still true of what it names
            assert problem is None or "\n" not in problem
        else:
            assert after == before or problem
        assert choose_checkpoint("latest", Path(temporary)) == (good if problem else folder)


@COMMON
@given(JSON | st.fixed_dictionaries({"step": JSON, "lr_scheduler": JSON, "settings": JSON, "record": JSON}))
@example({"step": True, "lr_scheduler": {}, "settings": {}, "record": {}})
@example({"step": -1, "lr_scheduler": {}, "settings": {}, "record": {}})
def test_progress_of_any_content_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, PROGRESS).write_text(json.dumps(content))
        try:
            progress = read_progress(Path(temporary))
            assert type(progress["step"]) is int and progress["step"] >= 0
        except UserError as error:
            clear(error)


@COMMON
@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda tail: b"\x80\x02" + tail)
       | st.binary(max_size=200).map(lambda tail: b"PK\x03\x04" + tail), st.sampled_from([".pth", ".safetensors", ".bin"]))
def test_weights_of_any_bytes_are_refused_in_one_line(content, suffix):
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, f"unet{suffix}")
        path.write_bytes(content)
        try:
            read_state_dict(path)
        except UserError as error:
            clear(error)


@COMMON
@given(st.one_of(st.binary(max_size=300), st.none(), st.integers(), st.text(),
                 st.fixed_dictionaries({"bytes": st.binary(max_size=50) | st.none(), "path": st.text() | st.none()}),
                 st.sampled_from([b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"BM", b"II*\0", b"P6 9 9 9 "])
                 .flatmap(lambda head: st.binary(max_size=200).map(lambda tail: head + tail))))
def test_images_of_any_bytes_are_used_or_refused(cell):
    try:
        image = decode_image(image_bytes(cell))
        assert image.mode == "RGB"
    except BadImage as error:
        assert str(error).strip()


@COMMON
@given(st.lists(st.binary(max_size=60) | JSON.map(text_or_json), max_size=6), st.integers(0, 100))
def test_event_logs_of_any_content_are_taken_up(lines, end):
    with tempfile.TemporaryDirectory() as temporary:
        log = EventLog(Path(temporary, "bad_data.jsonl"))
        log.path.write_bytes(b"\n".join(lines))
        log.rewind("position", end)
        log.write([{"position": end}])
        kept = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
        assert kept[-1] == {"position": end} and all(event["position"] < end for event in kept[:-1])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_given_a_word_is_taken_or_refused_in_one_line(name):
    for value in ("nonsense", "-1", "1e400", "nan", "", string.whitespace):
        try:
            parse_options(["--pretrained_model_name_or_path=base", "--train_data_dir=pairs", f"--{name}={value}"])
        except UserError as error:
            clear(error)
