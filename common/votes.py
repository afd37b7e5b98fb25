"""Votes of people, as a page of eval.judge saves them: its plan (what was shown), who judged, and the answers. Imports no
torch.

    {"page": digest of the plan, "plan": {...}, "judge": {"id", "name"}, "answers": ["left", ...], "check": "9f3c01aa"}

Answer k is of the plan's pair k, so a file may stop anywhere. `check` is a checksum of page, judge and answers: it finds an
edit by hand, it is no signature.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, warn

CHOICES = {"left": 1.0, "right": -1.0, "tie": 0.0, "bad": 0.0}  # what a choice says of the left image
MIRRORED = {"left": "right", "right": "left", "tie": "tie", "bad": "bad"}


def counted(number: int, noun: str) -> str:
    """1 vote, 2 votes."""
    return f"{number} {noun}{'s' * (number != 1)}"


@dataclass(frozen=True)
class Shown:
    """An image on the page: where it lay, the SHA-256 of its file, and the model that made it."""

    path: str
    sha256: str
    model: str


@dataclass(frozen=True)
class Vote:
    prompt: str
    left: Shown
    right: Shown
    choice: str  # of CHOICES
    repeat_of: int | None  # the earlier pair that this one shows again, sides swapped


@dataclass(frozen=True)
class Ballot:
    """One judge's votes of one page, in the order given."""

    source: str
    page: str
    judge: str  # an id of the browser's making
    name: str
    votes: list[Vote]

    def repeated(self) -> list[tuple[str, str]]:
        """(choice, choice the second time as seen from the first) of each pair that was judged twice."""
        return [(self.votes[vote.repeat_of].choice, MIRRORED[vote.choice])
                for vote in self.votes if vote.repeat_of is not None]


@dataclass
class Judged:
    """Two images of one prompt, and what each judge said of them."""

    prompt: str
    first: Shown
    second: Shown
    choices: dict[str, str]  # judge -> one of CHOICES, left meaning the first

    def values(self) -> list[float]:
        return [CHOICES[choice] for choice in self.choices.values()]


def gather(ballots: list[Ballot]) -> dict[tuple[str, str, str], Judged]:
    """The ballots by (prompt, SHA-256 of the first image, of the second), the two in order of these digests, whichever
    side they were shown on. Repeats are left out: they only measure the judge's own consistency."""
    judged: dict[tuple[str, str, str], Judged] = {}
    for ballot in ballots:
        for vote in ballot.votes:
            if vote.repeat_of is not None:
                continue
            swapped = vote.left.sha256 > vote.right.sha256
            first, second = (vote.right, vote.left) if swapped else (vote.left, vote.right)
            choice = MIRRORED[vote.choice] if swapped else vote.choice
            key = vote.prompt, first.sha256, second.sha256
            judged.setdefault(key, Judged(vote.prompt, first, second, {})).choices[ballot.judge] = choice
    return judged


def plan_digest(plan: dict) -> str:
    """The page's id."""
    text = json.dumps(plan, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def checksum(page: str, judge: str, answers: list[str]) -> str:
    """FNV-1a of 32 bits, in a line of the page's script as well."""
    value = 0x811C9DC5
    for byte in "\n".join([page, judge, *answers]).encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"


def read_votes(paths: list[str | os.PathLike]) -> list[Ballot]:
    """The ballots of several files. Of a judge's files of one page the fullest counts, so that a file saved in between
    changes nothing. Raises UserError for what no page saved as it is, and where there is no vote."""
    fullest: dict[tuple[str, str], Ballot] = {}
    for path in paths:
        ballot = read_ballot(path)
        key = ballot.page, ballot.judge
        if key in fullest:
            warn(f"{ballot.source} and {fullest[key].source} are of one judge and page: the one with more votes counts")
        fullest[key] = max(fullest.get(key, ballot), ballot, key=lambda one: len(one.votes))
    return list(fullest.values())


def read_ballot(path: str | os.PathLike) -> Ballot:
    """One votes file. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        plan, page, answers = content["plan"], content["page"], content["answers"]
        judge, name, check = content["judge"]["id"], content["judge"]["name"], content["check"]
        for value in (page, judge, name, check, *answers):
            _text(value)
    except FileNotFoundError:
        raise UserError(f"no votes at {path}: a page of eval.judge saves them") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is no votes file: save one from a page of eval.judge") from None
    if not isinstance(plan, dict) or plan_digest(plan) != page:
        raise UserError(f"{path}: its plan is not that of its page {page}: it was edited, or mixed with another page's; "
                        "save it again from the page")
    if not set(answers) <= set(CHOICES) or checksum(page, judge, answers) != check:
        raise UserError(f"{path}: its answers were edited, or are of another page: save it again from the page")
    if not answers:
        raise UserError(f"{path} holds no vote: judge a pair on its page, or leave it out")
    try:
        images = [Shown(*(_text(image[field]) for field in ("path", "sha256", "model"))) for image in plan["images"]]
        votes = [Vote(_text(pair["prompt"]), images[pair["left"]], images[pair["right"]], answer, pair.get("repeat_of"))
                 for pair, answer in zip(plan["pairs"], answers)]
        sound = len(votes) == len(answers) and all(
            vote.repeat_of is None or vote.repeat_of in range(number) for number, vote in enumerate(votes))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is no votes file: its plan is of another form; save it again from the page")
    return Ballot(str(path), page, judge, name, votes)


def _text(value) -> str:
    """The value. Raises TypeError or ValueError for what is no text that can be written."""
    if not isinstance(value, str):
        raise TypeError("no text")
    value.encode("utf-8")
    return value
