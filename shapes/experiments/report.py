"""claims.md: what was run, the claims, the frontier, the objectives' ranking; its pictures lie beside it."""

from pathlib import Path

import numpy as np
from scipy import stats

from common.files import read_json, write_text
from shapes.experiment import table
from shapes.experiments import pictures
from shapes.experiments.claims import OVERHEAD_TOLERANCE, SCORE_TOLERANCE, WINNER_TOLERANCE, all_claims
from shapes.experiments.instruments import BETAS, COUNTS, LAMBDAS, RATE, instrument_path, instruments, pulls_path
from shapes.experiments.plan import (ALL_WORLDS, CORE, DSPO_BETA, FRONTIERS, LONG, OBJECTIVES, PARTS, SEED, SHORT, WORLD, Config,
                                     Settings, short, stages)
from shapes.experiments.results import Results, interval, score
from shapes.experiments.runs import COLLAPSED, is_done


def write_report(settings: Settings) -> None:
    results, output = Results(settings), Path(settings.output)
    sections = [introduction(results), claims_section(results)]
    sections += [frontier_section(results, plain) for plain in FRONTIERS if results.base(plain.world) and results.best(plain)]
    sections += [objectives_section(results), lambda_section(settings), dspo_section(settings)]
    write_text(output / "claims.md", "\n\n".join(section for section in sections if section) + "\n")
    print(f"wrote {output / 'claims.md'}")


def introduction(results: Results) -> str:
    settings = results.settings
    bases = [results.base(world) for world in ALL_WORLDS if world.base == WORLD.base]  # the same, where it is there
    drawn = next((f"; the SD1.5-shaped base scores {score(base):.3f}" for base in bases if base), "")
    minutes = read_json(Path(settings.output, "minutes.json")) or 0.0
    reports = (
        f"{settings.steps} steps of {settings.batch_size} pairs from {settings.pairs}, a constant rate after a warm-up, "
        f"AdamW. {settings.captions} captions that no base was trained on, {settings.inference_steps} sampling steps, one "
        f"noise for all runs{drawn}. Seed {SEED} chooses each configuration's rate and step; brackets are 95% t-intervals "
        f"over {settings.seeds} further seeds at that choice, conditional on these captions. A run that falls {COLLAPSED} "
        "below the base ends there, and its last drawings stand for the rest. "
        f"{minutes:.0f} minutes with {settings.workers} worker(s).")
    status = []
    for part in LONG if settings.long else PARTS:
        wanted = [run for stage in stages(part, settings) for run in stage(results.best_rate)]
        done = sum(is_done(run, settings) for run in wanted if run.rate)
        if part == "lambda":
            wanted = [path for path, *_ in instruments(settings)]
            done = sum(path.is_file() for path in wanted)
        status.append([part, PARTS[part], f"{done} of {len(wanted)}"])
    return (f"# Claims on the shapes world\n\n{reports}\n\n## What was run\n\n" + table(["part", "", "runs"], status))


def label(frontier: Config) -> str:
    if frontier.method == "diffusion-dpo":
        return f"{'flow matching' if frontier.world.base == 'sd3' else 'noise prediction'}, {frontier.world.pairs}"
    return f"{frontier.method.upper()}{f', beta {frontier.beta:g}' if frontier.beta else ''}, {frontier.world.pairs}"


def claims_section(results: Results) -> str:
    claims = all_claims(results)
    frontiers = [frontier for frontier in FRONTIERS if any(claim.frontier == frontier for claim in claims)]
    found = {(claim.text, claim.frontier): f"{claim.verdict}, {claim.shown}" for claim in claims}
    rows = [[text, *(found.get((text, frontier), "-") for frontier in frontiers)]
            for text in dict.fromkeys(claim.text for claim in claims)]
    reasons = [[claim.text, label(claim.frontier), claim.verdict, claim.reason] for claim in claims]
    explained = (
        "Of Diffusion-DPO where no objective is named; \"it\" is the safeguard at mu 0.9. Winner's errors in % of the "
        "reference's, averaged over the training batches since the judgement before; a rise below "
        f"{WINNER_TOLERANCE:g}% is none. Scores are the oracle's, "
        f"in [0, 1]; a difference below {SCORE_TOLERANCE} does not matter. \"At least as good\" is confirmed where the "
        f"interval lies above -{SCORE_TOLERANCE}; \"better\" where it lies above 0, and refuted where it lies below "
        f"{SCORE_TOLERANCE}. Plain comes to harm where the run's end is below the base and below its own best; the rate is "
        f"the lowest at which seed {SEED}'s was below the base. Room is the ratio of the largest rates whose whole run ends "
        f"better than the base, interpolated in log(rate). Overhead: below {OVERHEAD_TOLERANCE:.0%}.")
    return "\n\n".join(["## Claims", explained, table(["claim", *map(label, frontiers)], rows),
                        table(["claim", "of", "verdict", "reason"], reasons)])


def best_row(results: Results, config: Config, share: float = 1.0) -> list[str] | None:
    """A configuration at the (rate, step) that SEED chose: the further seeds' figures there."""
    cell = results.best(config, share)
    if cell is None:
        return None
    base = results.base(config.world)

    def over(value) -> list[float]:
        return list(results.over_seeds(config, cell, value).values())

    def percent(name: str) -> str:
        values = over(lambda point: 100 * point[name] / point["reference"] if name in point else None)
        return interval(values).show("+.1f") if values else "-"

    def mean(name: str, form: str) -> str:
        values = over(lambda point: point.get(name))
        return format(np.mean(values), form) if values else "-"

    gains = list((by_seed := results.gain(config, cell)).values())
    one_seed = f" (seed {SEED} alone)" if list(by_seed) == [SEED] else ""
    wins = over(lambda point: float(np.mean(np.greater(point["scores"], base["scores"]))))
    seconds = results.points(config, cell.rate, SEED)[cell.step]["seconds"]
    rates = results.rates(config, share=share)
    edge = " (edge)" if len(rates) >= 3 and cell.rate in (rates[0], rates[-1]) else ""
    return [f"{short(cell.rate)}{edge}", str(cell.step), f"{seconds:.0f}", f"{np.mean(over(score)):.3f}",
            interval(gains).show() + one_seed, f"{np.mean(wins):.0%}", percent("winner"), percent("loser"),
            mean("lambda", ".2f"), mean("cleanliness", ".3f"), mean("colour", ".2f")]


BEST_HEADER = ["rate", "step", "s to it", "oracle", "against the base", "wins", "winner's error, %", "loser's error, %",
               "lambda", "cleanliness", "colour"]


def frontier_section(results: Results, plain: Config) -> str:
    configs = pictures.configs_with_runs(results, plain)
    images = {"quality": pictures.quality, "map": pictures.room_map, "drawings": pictures.drawings}
    if not pictures.core_of(results, plain)[1]:  # interrupted before plain and safeguarded had a rate in common
        images = {"map": pictures.room_map}
    section = plain.world.name if plain.method == "diffusion-dpo" else plain.objective
    lines = []
    for name, draw in images.items():
        path = Path(results.settings.output, "images", f"claims_{section}_{name}.png")
        draw(results, plain, path)
        lines.append(f"![{label(plain)}: {name}](images/{path.name})")
    rooms = []
    for config in configs:
        largest = [results.largest_good_rate(config, seed) for seed in (SEED, *results.settings.further)]
        cells = [score(point) > score(results.base(plain.world)) for rate in results.rates(config)
                 for point in results.points(config, rate, SEED).values()]
        room = results.room(config, plain) if config != plain else None
        rates = ", ".join(f"{short(float(f'{found[0]:.2g}'))}{'+' * found[1]}" for found in largest if found)
        ratio = room[0].show(".1f") + " or more" * room[1] if room else "-"
        rooms.append([config.variant, rates, ratio, f"{np.mean(cells):.0%}"])
    return "\n\n".join([
        f"## The frontier: {label(plain)} pairs",
        "Each variant at its best; (edge): at an end of the grid.",
        table(["variant", *BEST_HEADER], [[config.variant, *best_row(results, config)] for config in configs]), *lines,
        f"In the map, seed {SEED}'s scores against the base in hundredths. The room: largest good rate by seed, from 0 on "
        "(+: it may lie beyond the rates run); its ratio to plain's over the further seeds; the share of (rate, step) cells "
        f"better than the base, seed {SEED}.",
        table(["variant", "largest good rate", "times plain's", "better than the base"], rooms)])


def objectives_section(results: Results) -> str:
    """The ranking, each objective and variant at its own best of the same grid."""
    ranked = ranking(results)
    if len(ranked) <= len(CORE):
        return ""
    pictures.ranking(results, ranked, Path(results.settings.output, "images", "objectives_ranking.png"))
    return "\n\n".join([
        "## Objectives",
        f"Each at its own best of the rates {', '.join(map(short, results.settings.lower))} and the steps up to "
        f"{round(SHORT * results.settings.steps)}; published beta and settings, mu 0.9.",
        table(["objective", "variant", *BEST_HEADER],
              [[config.method, config.variant, *best_row(results, config, SHORT)] for config in ranked]),
        "![Objectives](images/objectives_ranking.png)"])


def ranking(results: Results) -> list[Config]:
    """Best first."""
    configs = [Config(WORLD, method, variant) for method in ("diffusion-dpo", *OBJECTIVES) for variant in CORE]
    configs.append(WORLD.winners_only)
    gains = {config: np.mean(results.gains(config, best)) for config in configs if (best := results.best(config, SHORT))}
    return sorted(gains, key=gains.__getitem__, reverse=True)


def lambda_section(settings: Settings) -> str:
    rows = []
    for kind in LAMBDAS:
        if record := read_json(instrument_path(kind, settings)):
            rises = np.array(record["rises"])
            share = stats.binomtest(int((rises > 0).sum()), len(rises)).proportion_ci(method="wilson")
            rows.append([kind, f"{np.mean(record['lambda']):.2f}",
                         f"{np.mean(rises > 0):.2f} [{share.low:.2f}, {share.high:.2f}]", f"{rises.mean():+.1e}",
                         f"{1000 * np.median(record['seconds']):.0f}"])
    return "\n\n".join([
        "## What a step does to its own winners",
        f"Diffusion-DPO at rate {short(RATE)}: the share of {settings.instrument_steps} steps after which the batch's own "
        "winner error, same noise and timesteps, had risen (Wilson's interval over steps).",
        table(["lambda from", "mean lambda", "steps that raised it", "mean change", "ms a step"], rows)]) if rows else ""


def dspo_section(settings: Settings) -> str:
    """The rule that chose the plan's DSPO_BETA, applied to the records."""
    pulls = {beta: record for beta in BETAS if (record := read_json(pulls_path(beta, settings)))}
    matters = next((f"{beta:g}" for beta, record in pulls.items() if np.mean(record["loser"]) >= COUNTS), "none of these")
    rows = [[f"{beta:g}", f"{np.mean(record['loser']):.2g}", f"{np.mean(record['winner']):+.2f}"]
            for beta, record in pulls.items()]
    return "\n\n".join([
        "## At which beta DSPO's loser matters",
        f"Over {settings.instrument_steps} steps of plain DSPO at rate {short(RATE)}: the loser's part of the gradient's "
        "length, and the cosine between the winner's part and the gradient of the winner's own error (1: training on "
        f"winners, -1: away from them). The smallest power of ten at which the loser's part is at least {COUNTS}: {matters}; "
        f"the plan's is {DSPO_BETA:g}.",
        table(["beta", "loser's part", "winner's direction"], rows)]) if rows else ""
