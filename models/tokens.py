"""Token ids of prompts, as CLIP tokenizers give them."""

from torch import Tensor

MAX_CAPTION_CHARACTERS = 20_000  # 77 tokens never reach so far, and tokenizing a whole book takes seconds


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """(N, 77) token ids, padded and truncated."""
    captions = [caption[:MAX_CAPTION_CHARACTERS] for caption in captions]
    return tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids
