"""Token ids of prompts, padded and truncated."""

from torch import Tensor

LONGEST_CAPTION = 20_000  # characters: no encoder reads so far, and tokenizing a whole book takes seconds


def cut(captions: list[str]) -> list[str]:
    return [caption[:LONGEST_CAPTION] for caption in captions]


def token_ids(tokenizer, captions: list[str], length: int) -> Tensor:
    """(N, length), padded and truncated."""
    return tokenizer(cut(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """(N, 77), as CLIP tokenizers give them."""
    return token_ids(tokenizer, captions, tokenizer.model_max_length)
