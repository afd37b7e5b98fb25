"""The settings of an objective, checked when they are made."""

import math
from dataclasses import dataclass

METHODS = ("diffusion-dpo", "dspo", "dmpo", "sft", "mapo", "poly-dpo", "linear-dpo", "ipo", "dpop", "kto")
REFERENCE_FREE = ("sft", "mapo")
GRANULARITIES = ("batch", "sample")

RANGES = {  # field: the lowest and the highest value allowed, both included
    "mapo_weight": (0, math.inf), "mapo_timesteps": (1, math.inf), "poly_alpha": (-1, math.inf), "linear_eta": (0, 0.5),
    "dpop_penalty": (0, math.inf), "kto_liked_weight": (0, 2), "winner_error_weight": (0, math.inf),
}


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
    mapo_weight, mapo_scale, mapo_timesteps: MaPO's b >= 0, s > 0 and T >= 1; it does not look at beta.
    poly_alpha: Poly-DPO's weight on undecided pairs, >= -1; below, it would reverse pairs that are right.
    linear_eta: Linear-DPO's lowest weight of a pair, in [0, 0.5]; the highest is 1 - eta.
    ipo_target: the margin that IPO aims at, > 0.
    dpop_penalty: DPOP's k >= 0. No value is published for diffusion; 1 to 10 is where to start.
    kto_liked_weight: KTO's weight of liked images, in [0, 2]; disliked ones weigh 2 - w. Published for pairs: 1.6.
    winner_error_weight: w >= 0 adds w times the winners' mean error to any objective of pairs.
    """

    method: str = "diffusion-dpo"
    beta: float = 5000.0
    dmpo_alpha: float = 0.0
    use_winner_preserving: bool = False
    winner_preserving_mu: float = 0.0
    winner_preserving_granularity: str = "batch"
    sdxl: bool = False
    mapo_weight: float = 0.1
    mapo_scale: float = 0.5
    mapo_timesteps: int = 1000
    poly_alpha: float = 8.0
    linear_eta: float = 1e-3
    ipo_target: float = 0.5
    dpop_penalty: float = 1.0
    kto_liked_weight: float = 1.0
    winner_error_weight: float = 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether the objective looks at the reference's prediction; where it does not, ref_pred may be None."""
        return self.method not in REFERENCE_FREE

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        for name in ("beta", "mapo_scale", "ipo_target"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, not {value}")
        for name, (lowest, highest) in RANGES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and lowest <= value <= highest):
                allowed = f"finite and at least {lowest}" if highest == math.inf else f"in [{lowest}, {highest}]"
                raise ValueError(f"{name} must be {allowed}, not {value}")
        if not 0 <= self.dmpo_alpha < 1:
            raise ValueError(f"dmpo_alpha must lie in [0, 1), not {self.dmpo_alpha}")
        if not 0 <= self.winner_preserving_mu <= 1:
            raise ValueError(f"winner_preserving_mu must lie in [0, 1], not {self.winner_preserving_mu}")
        if self.winner_preserving_granularity not in GRANULARITIES:
            raise ValueError(f"winner_preserving_granularity must be one of {', '.join(GRANULARITIES)}, "
                             f"not {self.winner_preserving_granularity!r}")
