"""Files are whole or absent, as readable as any other, and known by their content."""

import json
import os
import stat

import pytest

from common.errors import UserError
from common.files import (BLOCK_BYTES, SAMPLED_BLOCKS, digest, fingerprint, make_folder, make_readable, make_room, read_json,
                          whole_file, write_bytes, write_json, write_text)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_replaces_another_only_when_it_is_whole(tmp_path, umask):
    path = tmp_path / "file"
    write_text(path, "before")
    with pytest.raises(RuntimeError):
        with whole_file(path) as aside:
            aside.write_text("half")
            raise RuntimeError("killed here")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as aside:
        aside.write_text("after")
        assert path.read_text() == "before" and aside.parent == tmp_path
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path] and mode(path) == 0o644
    write_bytes(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff" and mode(path) == 0o644


def test_json_that_every_reader_takes(tmp_path):
    write_json(tmp_path / "a.json", {"colour": "grün", "n": [1, 0.5, None]})
    assert read_json(tmp_path / "a.json") == json.loads((tmp_path / "a.json").read_text()) == {"colour": "grün", "n": [1, 0.5, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert not (tmp_path / "b.json").exists()
    (tmp_path / "c.json").write_text("[" * 100_000)
    assert read_json(tmp_path / "c.json") is None and read_json(tmp_path / "missing.json") is None


def test_private_files_become_readable(tmp_path, umask):
    (tmp_path / "unet").mkdir()
    private = tmp_path / "unet" / "weights.safetensors"
    private.touch(mode=0o600)
    make_readable(tmp_path)
    assert mode(private) == 0o644


def test_folders_that_cannot_be_made_are_told_with_their_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output: the folder .* cannot be made"):
        make_folder(tmp_path / "file" / "below", "--output")
    make_room(tmp_path / "new" / "report.html", "--report")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(UserError, match="--report: .* is a folder"):
        make_room(tmp_path / "new", "--report")


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    content = bytearray(os.urandom(SAMPLED_BLOCKS * BLOCK_BYTES + 999))
    first.write_bytes(content), second.write_bytes(content)
    assert fingerprint(first) == fingerprint(second) and digest(first) == digest(second)
    content[-1] ^= 1
    second.write_bytes(content)
    assert fingerprint(first) != fingerprint(second) and digest(first) != digest(second)
    whole = fingerprint(tmp_path)
    (tmp_path / "notes.md").write_text("no part of a model")
    assert fingerprint(tmp_path) == whole == fingerprint(tmp_path, [first, second])
    assert fingerprint(tmp_path, [first]) != whole
