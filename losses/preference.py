"""From predictions to a loss: errors, margin, safeguard, objective."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.config import LossConfig
from losses.diffusion_dpo import diffusion_dpo_loss
from losses.dmpo import dmpo_loss
from losses.dspo import dspo_loss, dspo_sdxl_loss
from losses.errors import denoising_errors, implicit_accuracy, preference_margin
from losses.safeguard import scale_gradient, winner_preserving_scale


@dataclass
class PreferenceLoss:
    """loss: scalar, to be minimised. margin: (B,) logits, detached; None for sft. winner_scale: lambda, () or (B,).
    logs: scalars on the device, detached, under the names that the trackers show. Nothing here waits for the device."""

    loss: Tensor
    margin: Tensor | None
    winner_scale: Tensor
    logs: dict[str, Tensor]


def preference_loss(model_pred: Tensor, ref_pred: Tensor | None, target: Tensor, config: LossConfig,
                    loser_scale: Tensor | float | None = None) -> PreferenceLoss:
    """One objective on a batch of B pairs.

    model_pred, ref_pred, target: (2B, C, H, W) predictions of the policy, of the reference (no gradient) and what they
    should be, winners first; any float dtype, errors are taken in float32. For `sft` the tensors hold winners alone,
    (B, C, H, W), and ref_pred is not looked at.
    loser_scale: overrides the safeguard's lambda with a given () or (B,) one; for controls and measurements.

    Raises ValueError when the shapes do not match or a preference objective gets an odd number of samples.
    """
    if model_pred.shape != target.shape:
        raise ValueError(f"model_pred {tuple(model_pred.shape)} and target {tuple(target.shape)} differ in shape")
    if config.method == "sft":
        loss = denoising_errors(model_pred, target).mean()
        return PreferenceLoss(loss, None, loss.new_ones(()), {"train_loss": loss.detach(),
                                                              "model_mse_unaccumulated": loss.detach()})
    if ref_pred is None or ref_pred.shape != target.shape or len(target) % 2:
        got = None if ref_pred is None else tuple(ref_pred.shape)
        raise ValueError(f"{config.method} needs winners and losers stacked, and the reference's prediction for each: "
                         f"target {tuple(target.shape)}, ref_pred {got}")

    model_pred, ref_pred, target = model_pred.float(), ref_pred.detach().float(), target.float()
    model_error_w, model_error_l = denoising_errors(model_pred, target).chunk(2)
    ref_error_w, ref_error_l = denoising_errors(ref_pred, target).chunk(2)

    if loser_scale is not None:
        scale = torch.as_tensor(loser_scale, dtype=torch.float32, device=target.device)
    elif config.use_winner_preserving:
        scale = winner_preserving_scale(model_pred, target, config.winner_preserving_mu,
                                        config.winner_preserving_granularity)
    else:
        scale = torch.ones((), device=target.device)
    scaled_error_l = scale_gradient(model_error_l, scale)
    margin = preference_margin(model_error_w, scaled_error_l, ref_error_w, ref_error_l, config.beta)

    winner = slice(0, len(margin))
    if config.method == "diffusion-dpo":
        loss = diffusion_dpo_loss(margin)
    elif config.method == "dmpo":
        loss = dmpo_loss(margin, config.dmpo_alpha)
    elif config.sdxl:
        loss = dspo_sdxl_loss(margin, model_pred[winner], ref_pred[winner])
    else:
        loss = dspo_loss(margin, model_pred[winner], ref_pred[winner], target[winner], config.beta)

    with torch.no_grad():
        margin = margin.detach()
        logs = {
            "train_loss": loss.detach(),
            "implicit_acc_accumulated": implicit_accuracy(margin),
            "model_mse_unaccumulated": 0.5 * (model_error_w + model_error_l).mean(),
            "ref_mse_unaccumulated": 0.5 * (ref_error_w + ref_error_l).mean(),
            "avg_win_diff_loss": (model_error_w - ref_error_w).mean(),
            "avg_lose_diff_loss": (model_error_l - ref_error_l).mean(),
            "avg_lose_l_scale": scale.mean(),
            "margin_mean": margin.mean(),
            "margin_square": margin.square().mean(),  # becomes margin_std once averaged over batches and processes
        }
    return PreferenceLoss(loss, margin, scale, logs)
