"""A loss that is not finite for chosen pairs, as a bad batch would make it: install() breaks the task of preference pairs."""

import training.preference
from training.guards import BadPairs


def prelude(first: int, last: int, value: str = "nan") -> str:
    """For a launch (tests/forge.py): positions from `first` to `last` give `value`."""
    return f"from tests.training import broken_loss\nbroken_loss.install({first}, {last}, float({value!r}))"


def install(first: int, last: int, value: float) -> None:
    original, receive = training.preference.preference_loss, BadPairs.receive
    now: list[int] = []

    def note_positions(self, batch):
        now[:] = batch["position"].tolist()
        return receive(self, batch)

    def broken(*args, **options):
        result = original(*args, **options)
        hit = [number for number, position in enumerate(now) if first <= position <= last]
        if hit:
            result.loss = result.loss * value
            result.logs["train_loss"] = result.loss.detach()
            result.margin = result.margin.clone()
            result.margin[hit] = value
        return result

    BadPairs.receive, training.preference.preference_loss = note_positions, broken
