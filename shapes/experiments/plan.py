"""What is run, in which order: worlds, objectives, variants, rates and seeds."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from common.options import option

PARTS = {  # the most telling first
    "frontier": "Diffusion-DPO, plain and safeguarded, on pairs that others drew: every rate with seed 0, the middle ones with each",
    "variants": "its rivals and controls there: every rate with seed 0, the further seeds at each one's best",
    "objectives": "the other objectives there, plain and safeguarded, with a shorter run: the ranking",
    "flow": "Diffusion-DPO, plain and safeguarded, on the flow-matching base",
    "on-policy": "on pairs that the base itself drew",
    "mixed": "on pairs of both kinds",
    "lambda": "what each kind of lambda does to a step's own winners, and what it costs; at which beta DSPO's loser matters",
    "dmpo": "DMPO with the same variants: plain and safeguarded with each seed at every rate, the others at their best",
    "dspo": "DSPO likewise, at the beta at which its loser matters; plain and safeguarded at its published one",
}
LONG = ("frontier", "flow")  # the parts that are run with long runs, too
SEED = 0  # chooses each configuration's best (rate, steps); the further seeds are reported
JUDGED = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # shares of a run's steps after which it draws
SHORT = 0.4  # share of the steps that the ranking of objectives takes
MU = 0.9
LIKELY = 3e-5  # the rate to begin with

SAFEGUARD = {"use_winner_preserving": True, "winner_preserving_mu": MU}
DSPO_BETA = 1000.0  # the smallest power of ten at which its loser matters, by the rule in instruments.py
# A quarter of Diffusion-DPO's beta: at the start the winner is pulled twice as hard. DSPO at that beta pushes it away, at
# first by beta / 2 - 1: this turns it around, as hard.
WINNER_WEIGHT = {"sd15": 1250.0, "sd3": 25.0, "dspo": DSPO_BETA}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "safeguarded": SAFEGUARD,
    "mu 0.6": SAFEGUARD | {"winner_preserving_mu": 0.6},
    "per pair": SAFEGUARD | {"winner_preserving_granularity": "sample"},
    "fixed lambda": {"fixed_lambda": 1.0 - MU},
    "winner's error added": {"winner_error_weight": WINNER_WEIGHT},
    "winners only": {"train_method": "sft"},
}
CORE = ("plain", "safeguarded")
OBJECTIVES = ("dmpo", "dspo", "mapo", "poly-dpo", "linear-dpo", "ipo", "dpop", "kto")


@dataclass
class Settings:
    title = "the experiment"

    output: str | None = option(None, "folder for the runs and the report",
                                default_text="output/claims, claims_smoke or claims_long")
    smoke: bool = option(False, "tiny budgets: does everything run?")
    full: bool = option(False, "every part, and then the long runs: hours")
    long: bool = option(False, "runs of 300 steps, 48 captions, lower rates; by default of the parts frontier and flow")
    parts: list[str] = option([], f"of {', '.join(PARTS)}; by default all but dmpo and dspo")
    report: bool = option(False, "only write the report of the runs that are there")
    rates: list[float] = option([], "the grid", above=0, default_text="1e-5 to 1e-3; with --long 3e-6 to 3e-4")
    seeds: int = option(3, "further seeds, which are reported", at_least=1)
    steps: int | None = option(None, "optimizer steps of a run", at_least=10, default_text="80; with --long 300")
    batch_size: int = option(8, "pairs per step", at_least=1)
    pairs: int = option(400, "pairs trained on", at_least=2)
    captions: int | None = option(None, "captions that the base was never trained on, drawn at each judgement", at_least=1,
                                  default_text="24; with --long 48")
    inference_steps: int = option(12, "sampling steps of each drawing", at_least=1)
    instrument_steps: int = option(30, "steps on which each kind of lambda is measured", at_least=1)
    timing_rounds: int = option(12, "rounds of three steps, plain and safeguarded by turns", at_least=2)
    workers: int = option(2, "runs at a time, one thread each", at_least=1)

    def __post_init__(self):
        self.output = self.output or "output/claims" + ("_smoke" if self.smoke else "_long" if self.long else "")
        self.steps = self.steps or (10 if self.smoke else 300 if self.long else 80)
        self.captions = self.captions or (2 if self.smoke else 48 if self.long else 24)
        if self.smoke:
            self.rates, self.seeds, self.batch_size = self.rates or [1e-4], 1, 2
            self.pairs, self.inference_steps, self.instrument_steps, self.timing_rounds = 24, 2, 2, 2
        if self.long:
            self.parts = self.parts or list(LONG)
        self.rates = self.rates or ([3e-6] if self.long else []) + [1e-5, 3e-5, 1e-4, 3e-4] + ([] if self.long else [1e-3])
        self.parts = self.parts or [part for part in PARTS if self.full or part not in ("dmpo", "dspo")]

    @property
    def long_runs(self) -> "Settings":
        """What --full does after every part."""
        return replace(self, output=f"{self.output}_long", full=False, long=True, parts=[], rates=[], steps=None, captions=None)

    @property
    def further(self) -> range:
        return range(1, self.seeds + 1)

    @property
    def middle(self) -> list[float]:
        """The rates that further seeds run: those between the lowest and the highest; of long runs all."""
        return (not self.long and self.rates[1:-1]) or self.rates

    @property
    def lower(self) -> list[float]:
        """The grid of the objectives' short runs: without the rates at which they get nowhere, or destroy all at once."""
        return (self.rates[1:-1] if self.long else self.rates[1:-2]) or self.rates


def short(rate: float) -> str:
    """1e-4 for 0.0001."""
    digits, exponent = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


class World(NamedTuple):
    base: str  # a key of WINNER_WEIGHT
    pairs: str

    @property
    def name(self) -> str:
        return f"{self.base}_{self.pairs}"

    @property
    def winners_only(self) -> "Config":
        return Config(self, "diffusion-dpo", "winners only")


WORLD = World("sd15", "off-policy")
WORLDS = {"flow": World("sd3", "off-policy"), "on-policy": World("sd15", "on-policy"), "mixed": World("sd15", "mixed")}
ALL_WORLDS = (WORLD, *WORLDS.values())


class Config(NamedTuple):
    """What is compared."""

    world: World
    method: str
    variant: str
    beta: float | None = None  # None: the published one

    def options(self) -> dict[str, Any]:
        """train.py's."""
        chosen = {name: value.get(self.method, value[self.world.base]) if isinstance(value, dict) else value
                  for name, value in VARIANTS[self.variant].items()}
        return {"train_method": self.method} | ({"beta_dpo": self.beta} if self.beta else {}) | chosen

    @property
    def objective(self) -> str:
        return f"{self.method}_beta{short(self.beta)}" if self.beta else self.method

    def with_variant(self, variant: str) -> "Config":
        """The same with another variant; training on winners alone is one run for all objectives."""
        return self.world.winners_only if variant == "winners only" else self._replace(variant=variant)


class Run(NamedTuple):
    config: Config
    rate: float
    seed: int
    share: float = 1.0  # of the settings' steps

    @property
    def name(self) -> str:
        """Its record's path below runs/, without the suffix."""
        variant = self.config.variant.replace(" ", "-").replace("'", "")
        ending = "" if self.share == 1.0 else "_short"
        return f"{self.config.world.name}/{self.config.objective}_{variant}_lr{short(self.rate)}_seed{self.seed}{ending}"


# Each as its plain variant: what the report has a section of.
FRONTIERS = [*(Config(world, "diffusion-dpo", "plain") for world in ALL_WORLDS), Config(WORLD, "dmpo", "plain"),
             Config(WORLD, "dspo", "plain", DSPO_BETA), Config(WORLD, "dspo", "plain")]

BestRate = Callable[[Config, float], float | None]  # the rate that SEED chose within that share of the steps
Stage = Callable[[BestRate], list[Run]]


def configs(world: World, methods: Iterable[str], variants: Iterable[str]) -> list[Config]:
    return [Config(world, method, variant) for method in methods for variant in variants]


def stages(part: str, settings: Settings) -> list[Stage]:
    """A part's stages; what each runs follows from what those before it found."""
    if part == "frontier":
        chosen = configs(WORLD, ["diffusion-dpo"], CORE)
        return [lambda best: grid(chosen, settings.rates, [SEED]),
                lambda best: grid(chosen, settings.middle, settings.further)]
    if part == "variants":
        others = [name for name in VARIANTS if name not in CORE]
        return grid_then_best(configs(WORLD, ["diffusion-dpo"], others), settings.middle, settings)
    if part == "objectives":
        return grid_then_best([*configs(WORLD, OBJECTIVES, CORE), WORLD.winners_only], settings.lower, settings, SHORT)
    if part in ("dmpo", "dspo"):
        plain = Config(WORLD, part, "plain", DSPO_BETA if part == "dspo" else None)
        core, others = ([plain.with_variant(name) for name in VARIANTS if (name in CORE) == wanted] for wanted in (True, False))
        published = configs(WORLD, ["dspo"], CORE) if part == "dspo" else []
        return [lambda best: grid(core, settings.middle, [SEED, *settings.further]),
                *grid_then_best(others + published, settings.middle, settings)]
    if part in WORLDS:
        chosen = configs(WORLDS[part], ["diffusion-dpo"], CORE)
        return [lambda best: grid(chosen, settings.middle, [SEED]),
                lambda best: grid(chosen, settings.middle, settings.further)]
    return []


def grid(chosen: list[Config], rates: Iterable[float], seeds: Iterable[int], share: float = 1.0) -> list[Run]:
    """The rates that are likely to be good first."""
    rates = sorted(rates, key=lambda rate: abs(math.log(rate / LIKELY)))
    return [Run(config, rate, seed, share) for seed in seeds for rate in rates for config in chosen]


def grid_then_best(chosen: list[Config], rates: list[float], settings: Settings, share: float = 1.0) -> list[Stage]:
    return [lambda best: grid(chosen, rates, [SEED], share),
            lambda best: [Run(config, best(config, share), seed, share) for seed in settings.further for config in chosen]]
