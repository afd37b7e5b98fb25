"""CLIP's tokenizer with its first merges alone: most of what a tiny run costs is reading 49,408 words again and again."""

import json
from pathlib import Path

LETTERS, MERGES = 512, 2200  # the byte-pair encoding's alphabet, and how many of its 48,894 merges are kept: common words


def shorten(folder: Path) -> Path:
    """Cut the CLIP tokenizers in a folder to a vocabulary of some two thousand; the words kept keep their numbers."""
    for path in folder.rglob("tokenizer.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        if model["type"] == "BPE" and len(model["vocab"]) == 49408:
            model["vocab"] = {word: number for word, number in model["vocab"].items()
                              if number < LETTERS + MERGES or word.startswith("<|")}
            model["merges"] = model["merges"][:MERGES]
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def build_tiny_pipeline(folder: Path, kind: str = "sd15", **settings) -> Path:
    """shapes.pipeline's untrained pipeline with such a vocabulary."""
    from shapes.pipeline import build_pipeline
    return shorten(build_pipeline(folder, kind, **settings))
