"""--winner_preserving_space parameter: the guarantee in parameters, and its way through the real program."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from losses import LossConfig, preference_loss
from tests.runs import SMALL, scalars, weights
from common.errors import UserError
from training.parameter_space import check_whole_gradients, parameter_space_gradients, parameter_space_loss


def linear_problem(seed):
    """Predictions by a shared linear map, in which winner and loser gradients mix; B = 2 pairs."""
    torch.manual_seed(seed)
    weight, latents, target = torch.nn.Parameter(torch.randn(16, 16) / 4), torch.randn(4, 16), torch.randn(4, 16)
    latents[2:] = latents[:2] + 0.3 * torch.randn(2, 16)
    reference = (latents @ weight).detach().view(4, 1, 4, 4)
    return weight, (lambda: (latents @ weight).view(4, 1, 4, 4)), reference, target.view(4, 1, 4, 4)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_an_update_lowers_what_the_winners_gradient_lowers(mu):
    """The first-order bound that fails for the output-space lambda under a shared random Jacobian holds here."""
    config, output_space_fails = LossConfig(beta=10.0, use_winner_preserving=True, winner_preserving_mu=mu), 0
    for seed in range(20):
        weight, predict, reference, target = linear_problem(seed)
        [gradient], result = parameter_space_gradients(predict(), reference, target, config, [weight])
        winners, = torch.autograd.grad(preference_loss(predict(), reference, target, config, 0.0).loss, weight)
        bound = mu * winners.square().sum() * (1 - 1e-4) - 1e-7
        assert 0 <= result.winner_scale <= 1
        assert (winners * gradient).sum() >= bound
        published, = torch.autograd.grad(preference_loss(predict(), reference, target, config).loss, weight)
        output_space_fails += bool((winners * published).sum() < bound)
    assert output_space_fails > 0 or mu == 0  # here the winners dominate, and the published lambda of mu 0 suffices


def test_the_gradient_takes_the_usual_way_through_accumulation(fresh_accelerate):
    """Two micro-steps add up to the mean of their gradients; the loss scale of fp16 leaves no trace."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    config = LossConfig(beta=10.0, use_winner_preserving=True, winner_preserving_mu=0.5)
    weight, predict, reference, target = linear_problem(1)
    expected, result = parameter_space_gradients(predict(), reference, target, config, [weight], loss_scale=1024.0)
    for _ in range(2):
        loss, got = parameter_space_loss(accelerator, [weight], predict(), reference, target, config)
        accelerator.backward(loss)
    torch.testing.assert_close(weight.grad, expected[0])
    assert got.loss == result.loss and 0 < got.winner_scale < 1


def test_sharded_gradients_are_refused():
    check_whole_gradients(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    with pytest.raises(UserError, match="needs whole gradients on every device, and FSDP shards them"):
        check_whole_gradients(SimpleNamespace(distributed_type=DistributedType.FSDP))


@pytest.mark.slow
def test_two_processes_with_a_lambda_of_zero_train_alike_in_both_spaces(tiny_sd15, pairs_dir, tmp_path, train):
    """mu 1 silences the loser in either space, so that the gradients, all-reduced once a step, must agree."""
    runs = {}
    for space in ("output", "parameter"):
        train(["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, *SMALL,
               "--seed", 3, "--optimizer", "sgd", "--learning_rate", 1e-3, "--max_train_steps", 2, "--beta_dpo", 50,
               "--gradient_accumulation_steps", 2, "--checkpointing_steps", 0, "--use_winner_preserving",
               "--winner_preserving_mu", 1, "--winner_preserving_space", space, "--output_dir", tmp_path / space],
              processes=2)
        runs[space] = weights(tmp_path / space), scalars(tmp_path / space)
        assert set(runs[space][1]["avg_lose_l_scale"].values()) == {0.0}
    apart = max((runs["output"][0][key] - runs["parameter"][0][key]).abs().max() for key in runs["output"][0])
    assert apart < 1e-7
    assert runs["parameter"][1]["grad_norm"] == pytest.approx(runs["output"][1]["grad_norm"], rel=1e-4)
