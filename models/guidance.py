"""Classifier-free guidance, for everything that samples: generation, validation, SPO and its preference model."""

import torch
from torch import Tensor, nn

from models.family import Family, Text


def encode_prompts(family: Family, prompts: list[str], device: torch.device) -> Text:
    """The text of P prompts, rows in their order."""
    return family.encode_text({name: ids.to(device) for name, ids in family.tokenize(prompts).items()})


def encode_with_empty(family: Family, prompts: list[str], device: torch.device) -> tuple[Text, Text]:
    """The text of P prompts, and one row of the empty prompt as the base's own pipeline has it: encoded, or zeros."""
    if family.empty_is_zeros:
        text = encode_prompts(family, prompts, device)
        return text, {name: torch.zeros_like(rows[:1]) for name, rows in text.items()}
    text = encode_prompts(family, [*prompts, family.empty_prompt], device)
    return {name: rows[:-1] for name, rows in text.items()}, {name: rows[-1:] for name, rows in text.items()}


def select(text: Text, rows: Tensor) -> Text:
    """The text of N samples, given by rows (N,)."""
    return {name: value[rows] for name, value in text.items()}


def both_predictions(family: Family, network: nn.Module, x_t: Tensor, times: Tensor, text: Text, empty: Text,
                     size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The predictions (N, C, h, w) without and with the prompt, in one pass over 2N samples. empty: one row."""
    doubled = {name: torch.cat([empty[name].expand_as(rows), rows]) for name, rows in text.items()}
    prediction = family.predict(network, torch.cat([x_t, x_t]), torch.cat([times, times]), doubled, size)
    unconditional, conditional = prediction.chunk(2)
    return unconditional, conditional


def guided(family: Family, network: nn.Module, x_t: Tensor, times: Tensor, text: Text, empty: Text, size: tuple[int, int],
           scale: float, official: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """The guided prediction (N, C, h, w), combined in dtype; see Family.guide for scale and official."""
    if family.embeds_guidance:
        return family.predict(network, x_t, times, text, size, scale).to(dtype)
    predictions = both_predictions(family, network, x_t, times, text, empty, size)
    unconditional, conditional = (part.to(dtype) for part in predictions)
    return family.guide(unconditional, conditional, scale, official)
