"""The safeguard with inner products of parameter gradients (--winner_preserving_space parameter).

The published lambda compares gradients with respect to the predictions, and its guarantee holds there: an update moves
parameters, which winners and losers share, and what it does to a prediction is not what its gradient asked for. Here the
inner products are those of the parameters' gradients, so that the first-order guarantee holds for the update itself. It
costs a second backward pass and three more copies of the gradients. The compared gradients are the objective's, so each pair
counts with its own weight.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from common.errors import UserError
from losses import LossConfig, PreferenceLoss, parameter_space_scale, preference_loss
from models.devices import sharded


def parameter_space_gradients(model_pred: Tensor, ref_pred: Tensor, target: Tensor, config: LossConfig,
                              parameters: list[Tensor], loss_scale: float = 1.0) -> tuple[list[Tensor], PreferenceLoss]:
    """The safeguarded gradient of each parameter, and the loss with its lambda, of a batch of predictions with a graph.

    The loss is linear in the loser's scale: one backward pass with scale 0 gives G_w, the gradient through the winners,
    and one with scale 1 gives G_w + G_l. Shapes are preference_loss's. loss_scale: fp16's, against underflow in the
    backward pass; the gradients come back without it.
    """
    def gradients(loser_scale: float, retain_graph: bool) -> list[Tensor]:
        loss = preference_loss(model_pred, ref_pred, target, config, loser_scale).loss * loss_scale
        found = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, materialize_grads=True)
        return [gradient / loss_scale for gradient in found]

    through_winners = gradients(0.0, retain_graph=True)
    through_losers = [both - winners for both, winners in zip(gradients(1.0, retain_graph=False), through_winners)]
    scale = parameter_space_scale(through_winners, through_losers, config.winner_preserving_mu)
    combined = [winners + scale * losers for winners, losers in zip(through_winners, through_losers)]
    return combined, preference_loss(model_pred.detach(), ref_pred, target, config, scale)


def check_whole_gradients(accelerator: Accelerator) -> None:
    """Raises UserError where no device has all of a gradient."""
    if sharded(accelerator):
        raise UserError("--winner_preserving_space parameter needs whole gradients on every device, and "
                        f"{accelerator.distributed_type.value} shards them: train with DDP, or in the output space")


def parameter_space_loss(accelerator: Accelerator, parameters: list[Tensor], model_pred: Tensor, ref_pred: Tensor,
                         target: Tensor, config: LossConfig) -> tuple[Tensor, PreferenceLoss]:
    """A scalar whose gradient is the safeguarded one, so that it takes the usual way through accumulation, scaling and
    all-reduce; and the loss that it stands for. lambda is each process's own, as the published one is."""
    loss_scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
    gradients, result = parameter_space_gradients(model_pred, ref_pred, target, config, parameters, loss_scale)
    return sum((parameter * gradient).sum() for parameter, gradient in zip(parameters, gradients)), result
