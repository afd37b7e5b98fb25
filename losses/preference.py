"""From predictions to a loss: errors, margin, safeguard, objective."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from losses.config import LossConfig
from losses.errors import denoising_errors, implicit_accuracy
from losses.kto import kto_logits, kto_loss, kto_reference_point, pair_gains
from losses.objectives import UNEQUAL_PULLS, Pairs, pair_loss, pulls
from losses.safeguard import scale_gradient, winner_preserving_scale


@dataclass
class PreferenceLoss:
    """loss: scalar, to be minimised. margin: (B,) logits, detached; u, but m for mapo and None for sft.
    winner_scale: lambda, () or (B,).
    logs: scalars on the device, detached, under the names that the trackers show. Nothing here waits for the device."""

    loss: Tensor
    margin: Tensor | None
    winner_scale: Tensor
    logs: dict[str, Tensor]


def preference_loss(model_pred: Tensor, ref_pred: Tensor | None, target: Tensor, config: LossConfig,
                    loser_scale: Tensor | float | None = None,
                    kto_z: Tensor | Callable[[Tensor], Tensor] | None = None,
                    liked: Tensor | None = None) -> PreferenceLoss:
    """One objective on a batch of B pairs.

    model_pred, ref_pred, target: (2B, C, H, W) predictions of the policy, of the reference (no gradient) and what they
    should be, winners first; any float dtype, errors are taken in float32. For `sft` the tensors hold winners alone,
    (B, C, H, W). ref_pred may be None, and is not looked at, where config.needs_reference is false.
    loser_scale: overrides the safeguard's lambda with a given () or (B,) one; for controls and measurements.
    kto_z: KTO's reference point (), or a function from this batch's gains (2B,) to it, for the mean over all processes:
    lambda gain: kto_reference_point(accelerator.gather(gain)). By default this batch's own. Other methods ignore it.
    liked: (N,) bool, for kto alone: the tensors hold N single images, liked or not, instead of pairs.

    Raises ValueError when the shapes do not match or a preference objective gets an odd number of samples.
    """
    if model_pred.shape != target.shape:
        raise ValueError(f"model_pred {tuple(model_pred.shape)} and target {tuple(target.shape)} differ in shape")
    if config.method == "sft":
        loss = denoising_errors(model_pred, target).mean()
        return PreferenceLoss(loss, None, loss.new_ones(()), {"train_loss": loss.detach(),
                                                              "model_mse_unaccumulated": loss.detach()})
    if liked is not None and config.method == "kto":
        return _single_images(denoising_errors(model_pred, target), denoising_errors(ref_pred.detach(), target), liked,
                              config, kto_z)
    if len(target) % 2:
        raise ValueError(f"{config.method} needs winners and losers stacked: target {tuple(target.shape)}")
    if config.needs_reference and (ref_pred is None or ref_pred.shape != target.shape):
        got = None if ref_pred is None else tuple(ref_pred.shape)
        raise ValueError(f"{config.method} needs the reference's prediction for each winner and loser: "
                         f"target {tuple(target.shape)}, ref_pred {got}")

    pairs = _compare(model_pred.float(), ref_pred.detach().float() if config.needs_reference else None, target.float())
    if config.method == "kto":
        gain, _ = pair_gains(pairs.error_w, pairs.error_l, pairs.ref_error_w, pairs.ref_error_l)
        pairs = replace(pairs, kto_z=_reference_point(gain.detach(), kto_z))
    if loser_scale is not None:
        scale = torch.as_tensor(loser_scale, dtype=torch.float32, device=target.device)
    elif config.use_winner_preserving:
        scale = winner_preserving_scale(model_pred, target, config.winner_preserving_mu,
                                        config.winner_preserving_granularity,
                                        pulls(pairs, config) if config.method in UNEQUAL_PULLS else None)
    else:
        scale = torch.ones((), device=target.device)
    loss, margin = pair_loss(replace(pairs, error_l=scale_gradient(pairs.error_l, scale)), config)
    return PreferenceLoss(loss, margin.detach(), scale, _scalars(loss, margin, scale, pairs))


def _compare(model_pred: Tensor, ref_pred: Tensor | None, target: Tensor) -> Pairs:
    """The errors of policy and reference, and the winners' halves of the predictions."""
    error_w, error_l = denoising_errors(model_pred, target).chunk(2)
    winners = slice(0, len(error_w))
    if ref_pred is None:
        return Pairs(error_w, error_l, None, None, model_pred[winners], None, target[winners], None)
    ref_error_w, ref_error_l = denoising_errors(ref_pred, target).chunk(2)
    return Pairs(error_w, error_l, ref_error_w, ref_error_l, model_pred[winners], ref_pred[winners], target[winners],
                 None)


def _reference_point(gain: Tensor, given: Tensor | Callable[[Tensor], Tensor] | None) -> Tensor:
    """KTO's z () from what the caller gave. A function is called once, so it may communicate."""
    if callable(given):
        return given(gain)
    return kto_reference_point(gain) if given is None else given


def _single_images(error: Tensor, ref_error: Tensor, liked: Tensor, config: LossConfig,
                   kto_z: Tensor | Callable[[Tensor], Tensor] | None) -> PreferenceLoss:
    """KTO on N images, each liked or not: errors (N,), liked (N,) bool. margin: (N,), beyond 0 where an image is ranked as
    it was labelled."""
    gain = ref_error - error
    z = _reference_point(gain.detach(), kto_z)
    loss = kto_loss(gain, liked, config.beta, z, config.kto_liked_weight)
    margin = kto_logits(gain.detach(), liked, config.beta, z)
    logs = {
        "train_loss": loss.detach(), "implicit_acc_accumulated": implicit_accuracy(margin),
        "model_mse_unaccumulated": error.detach().mean(), "ref_mse_unaccumulated": ref_error.mean(),
        "liked_share": liked.float().mean(), "margin_mean": margin.mean(), "margin_square": margin.square().mean(),
    }
    return PreferenceLoss(loss, margin, loss.new_ones(()), logs)


@torch.no_grad()
def _scalars(loss: Tensor, margin: Tensor, scale: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """What the trackers show of a batch of pairs; nothing of the reference where there is none."""
    logs = {
        "train_loss": loss.detach(),
        "implicit_acc_accumulated": implicit_accuracy(margin),
        "model_mse_unaccumulated": 0.5 * (pairs.error_w + pairs.error_l).mean(),
        "avg_lose_l_scale": scale.mean(),
        "margin_mean": margin.mean(),
        "margin_square": margin.square().mean(),  # becomes margin_std once averaged over batches and processes
    }
    if pairs.ref_error_w is not None:
        logs |= {
            "ref_mse_unaccumulated": 0.5 * (pairs.ref_error_w + pairs.ref_error_l).mean(),
            "avg_win_diff_loss": (pairs.error_w - pairs.ref_error_w).mean(),
            "avg_lose_diff_loss": (pairs.error_l - pairs.ref_error_l).mean(),
        }
    return logs
