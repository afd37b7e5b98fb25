"""Optimizers, rates and schedules."""

import pytest
import torch
from transformers.optimization import Adafactor

from common.errors import UserError
from common.train_options import OptimizerOptions
from training.optimizers import adamw_8bit, effective_learning_rate, make_optimizer, make_schedule


def parameters():
    return [torch.nn.Parameter(torch.ones(3))]


def test_8bit_adam_is_asked_of_two_libraries_and_missed_in_one_line(monkeypatch):
    asked = []

    def missing(name):
        asked.append(name)
        raise ImportError(name)

    monkeypatch.setattr("training.optimizers.importlib.import_module", missing)
    with pytest.raises(UserError, match="needs bitsandbytes or torchao"):
        adamw_8bit()
    assert asked == ["bitsandbytes.optim", "torchao.optim"]


def test_scale_lr_multiplies_by_the_pairs_of_a_step():
    options = OptimizerOptions(learning_rate=1e-8, train_batch_size=8, gradient_accumulation_steps=32)
    assert effective_learning_rate(options, 8) == 1e-8
    options.scale_lr = True
    assert effective_learning_rate(options, 8) == pytest.approx(1e-8 * 2048)


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("adafactor", Adafactor), ("sgd", torch.optim.SGD)])
def test_the_optimizer_has_the_rate_and_its_own_settings(name, kind):
    optimizer = make_optimizer(parameters(), OptimizerOptions(optimizer=name, adam_weight_decay=0.03, adam_beta1=0.5), 1e-3)
    assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == 1e-3
    if name != "sgd":
        assert optimizer.param_groups[0]["weight_decay"] == 0.03
    if name == "adamw":
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.999)


def test_schedules_warm_up_and_an_unknown_one_is_refused_by_name():
    options = OptimizerOptions(optimizer="sgd", lr_warmup_steps=4)
    optimizer = make_optimizer(parameters(), options, 1.0)
    schedule, rates = make_schedule(optimizer, options, 10), []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step(), schedule.step()
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    for name in ("nope", "piecewise_constant"):
        with pytest.raises(UserError, match=f"--lr_scheduler {name} is none of .*cosine"):
            make_schedule(optimizer, OptimizerOptions(lr_scheduler=name, lr_warmup_steps=0), 10)


def test_a_schedule_that_the_rate_does_not_suit_is_told_from_an_unknown_one():
    options = OptimizerOptions(optimizer="sgd", lr_scheduler="polynomial", lr_warmup_steps=0)
    with pytest.raises(UserError, match="--lr_scheduler polynomial cannot be used here .*initial lr.*--learning_rate"):
        make_schedule(make_optimizer(parameters(), options, 1e-8), options, 10)
