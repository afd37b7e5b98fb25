"""The settings of an objective, checked when they are made."""

import math
from dataclasses import dataclass

METHODS = ("diffusion-dpo", "dspo", "dmpo", "sft")
GRANULARITIES = ("batch", "sample")


@dataclass(frozen=True)
class LossConfig:
    """Which objective, and how strong. An out-of-range value raises ValueError naming the field.

    method: one of METHODS.
    beta: strength of the implicit KL to the reference, > 0; multiplies mean-squared errors (T * omega is absorbed).
    dmpo_alpha: label-smoothing mass of DMPO's target distribution, in [0, 1).
    use_winner_preserving: apply the SDPO safeguard to the loser's gradient.
    winner_preserving_mu: its strength in [0, 1]; larger is more conservative.
    winner_preserving_granularity: one lambda for the local batch (published) or one for each pair.
    sdxl: DSPO has a different published form for SDXL; no other objective looks at it.
    """

    method: str = "diffusion-dpo"
    beta: float = 5000.0
    dmpo_alpha: float = 0.0
    use_winner_preserving: bool = False
    winner_preserving_mu: float = 0.0
    winner_preserving_granularity: str = "batch"
    sdxl: bool = False

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta must be a finite number above 0, not {self.beta}")
        if not 0 <= self.dmpo_alpha < 1:
            raise ValueError(f"dmpo_alpha must lie in [0, 1), not {self.dmpo_alpha}")
        if not 0 <= self.winner_preserving_mu <= 1:
            raise ValueError(f"winner_preserving_mu must lie in [0, 1], not {self.winner_preserving_mu}")
        if self.winner_preserving_granularity not in GRANULARITIES:
            raise ValueError(f"winner_preserving_granularity must be one of {', '.join(GRANULARITIES)}, "
                             f"not {self.winner_preserving_granularity!r}")
