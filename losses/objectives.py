"""The table of objectives: which function computes each, from what. A new one is a file, a line and its settings."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from losses.config import LossConfig
from losses.diffusion_dpo import diffusion_dpo_loss
from losses.dmpo import dmpo_loss
from losses.dpop import dpop_logits
from losses.dspo import dspo_loss, dspo_sdxl_loss
from losses.errors import preference_margin
from losses.ipo import ipo_loss
from losses.kto import kto_loss, pair_gains
from losses.linear_dpo import linear_dpo_loss
from losses.mapo import mapo_loss, mapo_margin
from losses.poly_dpo import poly_dpo_loss


@dataclass(frozen=True)
class Pairs:
    """What an objective may look at, of B pairs. Whatever is of the reference is None where there is none."""

    error_w: Tensor  # (B,) of the policy
    error_l: Tensor
    ref_error_w: Tensor | None  # (B,)
    ref_error_l: Tensor | None
    pred_w: Tensor  # (B, C, H, W), the winners'
    ref_pred_w: Tensor | None
    target_w: Tensor
    kto_z: Tensor | None  # (), for kto alone


OBJECTIVES = {  # u: the margins (B,); p: the Pairs; c: the LossConfig
    "diffusion-dpo": lambda u, p, c: diffusion_dpo_loss(u),
    "dmpo": lambda u, p, c: dmpo_loss(u, c.dmpo_alpha),
    "dspo": lambda u, p, c: (dspo_sdxl_loss(u, p.pred_w, p.ref_pred_w) if c.sdxl
                             else dspo_loss(u, p.pred_w, p.ref_pred_w, p.target_w, c.beta)),
    "mapo": lambda u, p, c: mapo_loss(p.error_w, u, c.mapo_weight),
    "poly-dpo": lambda u, p, c: poly_dpo_loss(u, c.poly_alpha),
    "linear-dpo": lambda u, p, c: linear_dpo_loss(u, p.error_w, p.error_l, c.linear_eta),
    "ipo": lambda u, p, c: ipo_loss(u, c.ipo_target),
    "dpop": lambda u, p, c: diffusion_dpo_loss(dpop_logits(u, p.error_w, p.ref_error_w, c.beta, c.dpop_penalty)),
    "kto": lambda u, p, c: kto_loss(*pair_gains(p.error_w, p.error_l, p.ref_error_w, p.ref_error_l), c.beta, p.kto_z,
                                    c.kto_liked_weight),
}

UNEQUAL_PULLS = ("mapo", "ipo", "kto")  # may pull at the loser harder than at the winner, or at either the wrong way


def pair_margin(pairs: Pairs, config: LossConfig) -> Tensor:
    """The margin of each pair, (B,): u against the reference, or MaPO's m, which has none."""
    if config.method == "mapo":
        return mapo_margin(pairs.error_w, pairs.error_l, config.mapo_scale, config.mapo_timesteps)
    return preference_margin(pairs.error_w, pairs.error_l, pairs.ref_error_w, pairs.ref_error_l, config.beta)


def pair_loss(pairs: Pairs, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The loss () and the margins (B,) of a batch of pairs."""
    margin = pair_margin(pairs, config)
    loss = OBJECTIVES[config.method](margin, pairs, config)
    if config.winner_error_weight > 0:
        loss = loss + config.winner_error_weight * pairs.error_w.mean()
    return loss, margin


def pulls(pairs: Pairs, config: LossConfig) -> tuple[Tensor, Tensor]:
    """a_w = dL/de_w and a_l = -dL/de_l of each pair, two (B,): how hard the loss pulls the winner's error down and
    pushes the loser's up. For objectives that look at the errors alone, all but dspo."""
    with torch.enable_grad():
        error_w, error_l = (error.detach().requires_grad_() for error in (pairs.error_w, pairs.error_l))
        loss, _ = pair_loss(replace(pairs, error_w=error_w, error_l=error_l), config)
        pull_w, pull_l = torch.autograd.grad(loss, (error_w, error_l))
    return pull_w, -pull_l
