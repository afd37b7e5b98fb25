"""What people's votes say of a comparison: the "Human" row beside the metrics', and how far judges and metrics agree."""

import sys
from itertools import combinations

import numpy as np

from common.errors import UserError
from common.votes import CHOICES, MIRRORED, Ballot, counted, gather
from eval.scores import ScoredImage
from eval.statistics import outcome, win_rate_interval

Pairs = list[tuple[str, ScoredImage, ScoredImage]]


def match_votes(ballots: list[Ballot], images: list[ScoredImage]) -> dict[tuple[str, str, str], dict[str, str]]:
    """(prompt, SHA-256 of an image, of another) -> what each judge chose, left meaning the first image; the votes whose images
    are among `images`, by content. Raises UserError where a judged image has changed, or none is among them."""
    contents = {image.sha256 for image in images if image.sha256}
    here = {str(image.path.absolute()): image.sha256 for image in images if image.sha256}
    judged = gather(ballots)
    for pair in judged.values():
        for shown in (pair.first, pair.second):
            if shown.sha256 not in contents and shown.path in here:
                raise UserError(f"{shown.path} has changed since it was judged: make a new page, or bring the image back")
    found = {key: pair.choices for key, pair in judged.items() if {*key[1:]} <= contents}
    if not found:
        raise UserError(f"none of the {len(judged)} pairs judged in {', '.join(ballot.source for ballot in ballots)} is of these "
                        "images: they are gone, or the votes are of another page")
    if len(found) < len(judged):
        print(f"{len(judged) - len(found)} of {len(judged)} judged pairs are of other images: left out", file=sys.stderr)
    return found


def votes_by_pair(ballots: list[Ballot], pairs: Pairs) -> list[dict[str, str]]:
    """For each pair what each judge chose, left meaning A. Raises UserError where there is no vote of them."""
    found = match_votes(ballots, [image for _, *both in pairs for image in both])
    chosen = []
    for prompt, a, b in pairs:
        first, second = sorted((a.sha256, b.sha256))
        choices = found.pop((prompt, first, second), {})
        chosen.append(choices if first == a.sha256 else {judge: MIRRORED[choice] for judge, choice in choices.items()})
    if not any(chosen):
        raise UserError("the votes are of these images, but of no pair of this comparison: judge a page of these two manifests")
    return chosen


def judges_agree(values: list[dict[str, float]]) -> dict | None:
    """How often two judges of one pair say the same (one wins, the other, or neither); None where no pair has two judges."""
    same = [a == b for of_pair in values for a, b in combinations(of_pair.values(), 2)]
    return {"compared": len(same), "share": float(np.mean(same))} if same else None


def metric_agrees(metric: str, values: list[dict[str, float]], pairs: Pairs) -> dict | None:
    """How often a metric prefers the image that a vote does, where neither is tied, with its interval."""
    signs, prompts = [], []
    for (prompt, a, b), of_pair in zip(pairs, values):
        by_metric = np.sign(a.scores[metric] - b.scores[metric])
        agree = [value * by_metric for value in of_pair.values() if value * by_metric]
        signs += agree
        prompts += [prompt] * len(agree)
    if not signs:
        return None
    agreed = np.array(signs)
    return {"votes": len(signs), "share": float(np.mean(agreed > 0)), "ci95": win_rate_interval(agreed, prompts)}


def human_row(ballots: list[Ballot], pairs: Pairs, metrics: list[str], count_ties: bool) -> dict:
    """The summary's "human": each vote counts once, "both bad" as a tie; interval and test are over prompts, as the metrics'.
    `by_pair` has the votes (for A, for B, for neither) of each pair."""
    chosen = votes_by_pair(ballots, pairs)
    values = [{judge: CHOICES[choice] for judge, choice in choices.items()} for choices in chosen]
    votes = np.array([value for of_pair in values for value in of_pair.values()])
    prompts = [prompt for (prompt, _, _), of_pair in zip(pairs, values) for _ in of_pair]
    repeated = [pair for ballot in ballots for pair in ballot.repeated()]
    return {
        "judges": len({judge for of_pair in values for judge in of_pair}), "pairs_judged": sum(map(bool, values)),
        "total_votes": len(votes), "both_bad": sum(choice == "bad" for choices in chosen for choice in choices.values()),
        **outcome(votes, prompts, count_ties),
        "judges_agree": judges_agree(values),
        "metrics_agree": {metric: metric_agrees(metric, values, pairs) for metric in metrics},
        "repeated": {"pairs": len(repeated), "alike": sum(first == second for first, second in repeated)},
        "by_pair": [[sum(value == side for value in of_pair.values()) for side in (1, -1, 0)] for of_pair in values],
    }


def human_lines(row: dict, labels: dict[str, str]) -> list[str]:
    """What the program prints of it below the table."""
    def percent(agreement: dict) -> str:
        interval = " ({:.0%} to {:.0%})".format(*agreement["ci95"]) if agreement.get("ci95") else ""
        return f"{agreement['share']:.1%}{interval}"

    agreed = [f"{labels[metric]} {percent(found)}" for metric, found in row["metrics_agree"].items() if found]
    both_bad = "1 vote says" if row["both_bad"] == 1 else f"{row['both_bad']} votes say"
    lines = [f"Human: {counted(row['total_votes'], 'vote')} by {counted(row['judges'], 'judge')} on "
             f"{counted(row['pairs_judged'], 'pair')}; {both_bad} both bad",
             f"metrics agree with the votes for a side: {', '.join(agreed) or 'there are none'}"]
    if row["judges_agree"]:
        lines.append(f"two judges of one pair agree: {percent(row['judges_agree'])} of {row['judges_agree']['compared']}")
    if row["repeated"]["pairs"]:
        lines.append(f"pairs shown twice and judged alike: {row['repeated']['alike']} of {row['repeated']['pairs']}")
    return lines
