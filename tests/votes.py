"""Votes as a judging page saves them, without a browser."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from common.votes import checksum


def page_content(page: Path) -> dict:
    """What a page of eval.judge holds as JSON."""
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page.read_text(), re.DOTALL)[1])


def write_votes(page: Path, path: Path, choose: Callable[[dict, dict, str], str], judge: str = "anna", limit: int | None = None) -> Path:
    """Judge a page's pairs by choose(left image, right image, prompt) and save the votes."""
    content = page_content(page)
    images, pairs = content["plan"]["images"], content["plan"]["pairs"][:limit]
    answers = [choose(images[pair["left"]], images[pair["right"]], pair["prompt"]) for pair in pairs]
    path.write_text(json.dumps({"page": content["page"], "plan": content["plan"], "judge": {"id": judge, "name": judge.title()},
                                "answers": answers, "check": checksum(content["page"], judge, answers)}))
    return path


def prefer(*models: str) -> Callable[[dict, dict, str], str]:
    """A judge who prefers the models named first."""
    return lambda left, right, _: "left" if models.index(left["model"]) < models.index(right["model"]) else "right"
