"""Z-Image: lists of images and captions of any length, and a language model's hidden states of the caption as a chat.

The network reads 1 - sigma and answers with minus the velocity. Its guidance scale s stands for s + 1 of the usual one.
"""

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn

from models import parts
from models.family import Text
from models.flow import FlowFamily
from models.parts import each_alone
from models.tokens import cut


class ZImage(FlowFamily):
    name, label, license = "z_image", "Z-Image", "apache-2.0"
    network, pipeline, pipeline_parts = ZImageTransformer2DModel, ZImagePipeline, {}
    compiled_blocks = (ZImageTransformerBlock,)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]  # of the refiners too
    packing = 1
    default_sequence = longest_sequence = 512
    steps, guidance, distilled_sampling = 50, 5.0, (8, 0.0)

    # --- text ------------------------------------------------------------------------------------------------------------

    def tokenize(self, captions: list[str]) -> Text:
        """input_ids and mask (B, L) of each caption as a user's message, padded at the end."""
        tokens = self.tokenizers["text_encoder"]([self._as_chat(caption) for caption in cut(captions)], padding="max_length",
                                                 max_length=self.sequence_length, truncation=True, return_tensors="pt")
        return {"input_ids": tokens.input_ids, "mask": tokens.attention_mask.bool()}

    def _as_chat(self, caption: str) -> str:
        return self.tokenizers["text_encoder"].apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True)

    def caption_room(self, tokenizer) -> int:
        """What the chat's own words in front of the caption leave."""
        return self.sequence_length - len(tokenizer(self._as_chat("\0").split("\0")[0]).input_ids)

    @each_alone
    def encode_text(self, tokens: Text) -> Text:
        """embeddings (B, L, D): hidden_states[-2], zeros where mask (B, L) is False."""
        states = self.text_encoders[0](input_ids=tokens["input_ids"], attention_mask=tokens["mask"],
                                       output_hidden_states=True).hidden_states[-2]
        return {"embeddings": states * tokens["mask"].unsqueeze(-1), "mask": tokens["mask"]}

    # --- images and the network ------------------------------------------------------------------------------------------

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The distribution's mode, as the published training takes it: the noise is not looked at."""
        return super().latents(moments, torch.zeros_like(noise))

    def predict(self, network: nn.Module, x_t: Tensor, times: Tensor, text: Text, size: tuple[int, int]) -> Tensor:
        captions = [rows[:length] for rows, length in zip(text["embeddings"], parts.lengths(text["mask"]))]
        images = list(x_t.unsqueeze(2).unbind())
        return -torch.stack(network(images, 1 - times / 1000, captions, return_dict=False)[0]).squeeze(2)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, official: bool) -> Tensor:
        """conditional + s (conditional - unconditional), the pipeline's convention and the official evaluation's."""
        return super().guide(unconditional, conditional, scale, official=True)
