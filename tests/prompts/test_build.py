"""The builder of the published prompt groups, on sources of their form; the format checks."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from common.errors import UserError
from prompts import PROMPTS, build, check, prompts_of, read_group


def written(path) -> list[str]:
    return [entry["prompt"] for entry in json.loads(path.read_text(encoding="utf-8"))]


def test_papv2_keeps_distinct_captions_in_order_of_appearance(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number, captions in enumerate((["b", "a", "b", "naïve 東京"], ["a", "c"])):
        pyarrow.parquet.write_table(pyarrow.table({"caption": captions, "jpg_0": [b"x"] * len(captions)}),
                                    data / f"test-0000{number}-of-00002.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["of training"]}), data / "train-00000-of-00001.parquet")
    build.main(["papv2", "--source", str(tmp_path), "--output", str(tmp_path / "out.json")])
    assert written(tmp_path / "out.json") == ["b", "a", "naïve 東京", "c"]
    assert "4 prompts (4 distinct)" in capsys.readouterr().out


def test_hpsv2_joins_its_four_files_and_keeps_repetitions(tmp_path, capsys):
    for name in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{name}.json").write_text(json.dumps([f"{name} {index // 2}" for index in range(800)]))
    build.main(["hpsv2", "--source", str(tmp_path), "--output", str(tmp_path / "out.json")])
    assert written(tmp_path / "out.json")[::800] == ["anime 0", "concept-art 0", "paintings 0", "photo 0"]
    said = capsys.readouterr()
    assert "3200 prompts (1600 distinct)" in said.out and "warning" not in said.err
    (tmp_path / "photo.json").unlink()
    with pytest.raises(UserError, match="lacks photo.json"):
        build.build("hpsv2", str(tmp_path), tmp_path / "out.json")


def test_partiprompts_reads_the_prompt_column(tmp_path):
    source = tmp_path / "PartiPrompts.tsv"
    source.write_text('Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n'
                      'a sign that says "Hi"\tArts\tWriting\tx\n"the saying ""BE"" on a wall"\tArts\tWriting\t\n')
    build.build("partiprompts", str(source), tmp_path / "out.json")
    assert written(tmp_path / "out.json") == ["bond", 'a sign that says "Hi"', 'the saying "BE" on a wall']


def test_a_published_group_is_a_source_too(tmp_path):
    source = tmp_path / "papv2.json"
    source.write_text(json.dumps([{"prompt": "x", "gen_image_path": ""}, {"prompt": "y", "metadata": {}}]))
    assert build.build("papv2", str(source), tmp_path / "out.json") == ["x", "y"]


@pytest.mark.parametrize("group, name, content, said", [
    ("partiprompts", "p.tsv", "Prompt\tNote\na\tb\n\tb\n", r"line 3: no prompt"),
    ("partiprompts", "p.tsv", "Text\na\n", r"line 1: no Prompt column"),
    ("hpsv2", "p.json", '[\n"a",\n""\n]', r"line 3: entry 2 has no"),
    ("hpsv2", "p.json", "[]", "lists no prompt"),
    ("papv2", "p.parquet", "nothing", "cannot be read as a source of papv2"),
    ("papv2", "absent", None, "no file or folder"),
])
def test_bad_sources(group, name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        build.build(group, str(tmp_path / name), tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_download_failure_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="no network.*--source"):
        build.build("hpsv2", None, tmp_path / "out.json")


@pytest.mark.parametrize("content, line, said", [
    ('[\n {"prompt": "a"},\n {"text": "b"}\n]', 3, 'entry 2 has no "prompt"'),
    ('[\n {"prompt": "a"},\n\n {"prompt": 5}\n]', 4, "entry 2"),
    ('[\n {"prompt": "a"}\n {"prompt": "b"}\n]', 3, "a comma or ] must follow"),
    ('[\n {"prompt": "a"},\n]', 3, "no entry follows the last comma"),
    ('[\n {"prompt": "a",}\n]', 2, "no JSON here"),
    ('{"prompt": "a"}', 1, "must begin with \\["),
    ('["a"]\nrest', 2, "nothing may follow"),
    ('["a",\n"', 2, "no JSON here"),
    ('["a"', 1, "a comma or ] must follow"),
])
def test_a_fault_is_reported_with_its_line(content, line, said, tmp_path):
    path = tmp_path / "g.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"g.json, line {line}: .*{said}"):
        read_group(path)


def test_captions_are_prompts(tmp_path):
    """SPO's published prompts are a list of {"caption", "trainset_idx"}."""
    (tmp_path / "g.json").write_text('[{"caption": "a red cat", "trainset_idx": 7}, {"prompt": "b", "caption": "c"}, "d"]')
    assert read_group(tmp_path / "g.json") == ["a red cat", "b", "d"]
    (tmp_path / "g.json").write_text('[{"caption": "a"},\n {"caption": " "}]')
    with pytest.raises(UserError, match='line 2: entry 2 has no "prompt" or "caption" that is non-empty text'):
        read_group(tmp_path / "g.json")


def test_empty_and_missing_groups(tmp_path):
    (tmp_path / "g.json").write_text("[]")
    with pytest.raises(UserError, match="lists no prompt"):
        read_group(tmp_path / "g.json")
    with pytest.raises(UserError, match="python -m prompts.build nosuch"):
        read_group("nosuch")


def test_our_own_groups(capsys):
    check.main(["own", "shapes"])
    assert "64 prompts (64 distinct)" in capsys.readouterr().out
    from shapes.drawing import parse
    for prompt in read_group("shapes"):
        parse(prompt)  # every one is a caption of the shapes world
    ignored = (PROMPTS / ".gitignore").read_text().split()
    assert {"papv2.json", "hpsv2.json", "partiprompts.json"} <= set(ignored)


def test_a_text_file_has_one_prompt_a_line_and_comments(tmp_path):
    (tmp_path / "own.txt").write_text("# mine\na red circle\n\n  a [blue] square \r\n #no prompt\nroom #5\n", encoding="utf-8")
    assert read_group(tmp_path / "own.txt") == ["a red circle", "a [blue] square", "room #5"]
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(UserError, match="lists no prompt"):
        read_group(tmp_path / "empty.txt")


def test_files_among_prompts_are_read_in_their_place(tmp_path):
    (tmp_path / "a.txt").write_text("# mine\na dog\na cat\n")
    (tmp_path / "b.json").write_text('[{"prompt": "a house"}, "a sign"]')
    assert prompts_of(["first", str(tmp_path / "a.txt"), str(tmp_path / "b.json"), "last"]) == [
        "first", "a dog", "a cat", "a house", "a sign", "last"]
    with pytest.raises(UserError, match="no prompt group at nothing.txt"):
        prompts_of(["nothing.txt"])
