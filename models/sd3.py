"""Stable Diffusion 3 and 3.5: a joint transformer on text of two CLIPs and T5, no text mask.

The network reads 1000 sigma in float32; under autocast its time embedding is rounded to the pooled text's type.
"""

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import pad

from common.errors import UserError
from common.train_options import ModelOptions
from models.family import Text
from models.flow import FlowFamily
from models.parts import each_alone
from models.tokens import token_ids


class StableDiffusion3(FlowFamily):
    name, label, license = "sd3", "SD3", "other"  # Stability's community licence
    network, pipeline, pipeline_parts = SD3Transformer2DModel, StableDiffusion3Pipeline, {}
    compiled_blocks = (JointTransformerBlock,)
    lora_targets = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                                                "to_add_out")]
    lora_targets += [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]  # SD3.5 medium's second attention
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    default_sequence, longest_sequence = 256, 512
    steps, guidance = 28, 7.0
    packing, timestep_sampling, sampler_starts_at_one = 1, "logit_normal", False
    overflows_in_fp16, vae_in_float32 = False, True

    def __init__(self, options: ModelOptions, index: dict):
        super().__init__(options, index)
        self.resolution = self.config["sample_size"] * self.latent_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        largest = self.config["pos_embed_max_size"] * self.config["patch_size"] * self.latent_factor
        if max(height, width) > largest:
            raise UserError(f"{height}x{width} is no size for {self.label}: this base has positions for {largest} pixels a "
                            "side")
        return super().latent_shape(height, width)

    @property
    def has_t5(self) -> bool:
        return "text_encoder_3" in self.encoder_names

    def tokenize(self, captions: list[str]) -> Text:
        """input_ids.N: (B, 77) for each CLIP, (B, --max_sequence_length) for T5, where there is one."""
        lengths = [tokenizer.model_max_length for tokenizer in self.tokenizers.values()][:2] + [self.sequence_length]
        return {f"input_ids.{number}": token_ids(tokenizer, captions, length)
                for number, (tokenizer, length) in enumerate(zip(self.tokenizers.values(), lengths))}

    def caption_room(self, tokenizer) -> int:
        return self.sequence_length - 1 if self.has_t5 else tokenizer.model_max_length - 2

    @each_alone
    def encode_text(self, tokens: Text) -> Text:
        """embeddings (B, 77 + L, D): both CLIPs' hidden_states[-2] side by side, T5's behind them; pooled (B, P)."""
        clips = [encoder(tokens[f"input_ids.{number}"], output_hidden_states=True)
                 for number, encoder in enumerate(self.text_encoders[:2])]
        embeddings = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        embeddings = pad(embeddings, (0, self.config["joint_attention_dim"] - embeddings.shape[-1]))
        if self.has_t5:
            t5 = self.text_encoders[2](tokens["input_ids.2"])[0].to(embeddings.dtype)
        else:
            t5 = embeddings.new_zeros(len(embeddings), self.sequence_length, embeddings.shape[-1])
        return {"embeddings": torch.cat([embeddings, t5], dim=1),
                "pooled": torch.cat([output.text_embeds for output in clips], dim=-1)}

    def predict(self, network: nn.Module, x_t: Tensor, times: Tensor, text: Text, size: tuple[int, int]) -> Tensor:
        return network(hidden_states=x_t, timestep=times, encoder_hidden_states=text["embeddings"],
                       pooled_projections=text["pooled"], return_dict=False)[0]
