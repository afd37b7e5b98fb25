"""FLUX.1: packed latents, T5 and a CLIP's pooled output, and in FLUX.1-dev guidance as an input of the network.

The network rounds sigma to the type of its hidden states before it multiplies by 1000: under bf16 autocast it sees 500
different times, 3 of 1000 off at most. Policy and reference see the same.
"""

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from models.family import Text
from models.flow import FlowFamily, pack, unpack
from models.parts import each_alone
from models.tokens import token_ids, tokenize

SINGLE_BLOCKS = 38


class Flux(FlowFamily):
    name, label = "flux", "FLUX.1"
    network, pipeline, pipeline_parts = FluxTransformer2DModel, FluxPipeline, {}
    compiled_blocks = (FluxTransformerBlock, FluxSingleTransformerBlock)
    lora_targets = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                                                "to_add_out")]
    lora_targets += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
    lora_targets += [f"single_transformer_blocks.{n}.proj_out" for n in range(SINGLE_BLOCKS)]  # not the last layer's
    encoder_names = ("text_encoder", "text_encoder_2")
    default_sequence = longest_sequence = 512
    steps, guidance, embeds_guidance = 28, 3.5, True
    distilled_names, ignored_options = ("schnell",), ()

    @property
    def license(self) -> str:
        return "apache-2.0" if self.is_distilled else "other"  # dev: Black Forest Labs' non-commercial one

    def tokenize(self, captions: list[str]) -> Text:
        """input_ids.0 (B, 77) for CLIP, input_ids.1 (B, --max_sequence_length) for T5."""
        clip, t5 = self.tokenizers.values()
        return {"input_ids.0": tokenize(clip, captions),
                "input_ids.1": token_ids(t5, captions, self.sequence_length)}

    def caption_room(self, tokenizer) -> int:
        return self.sequence_length - 1

    @each_alone
    def encode_text(self, tokens: Text) -> Text:
        """embeddings (B, L, D): T5's, padding included, as the network was trained; pooled (B, P): CLIP's."""
        clip, t5 = self.text_encoders
        return {"embeddings": t5(tokens["input_ids.1"])[0], "pooled": clip(tokens["input_ids.0"]).pooler_output}

    def predict(self, network: nn.Module, x_t: Tensor, times: Tensor, text: Text, size: tuple[int, int],
                guidance: float | None = None) -> Tensor:
        """guidance: what the network is told, --embedded_guidance while training, alike for policy and reference."""
        (height, width), embeddings = x_t.shape[2:], text["embeddings"]
        told = None
        if self.config["guidance_embeds"]:
            value = self.options.embedded_guidance if guidance is None else guidance
            told = torch.full((len(x_t),), value, dtype=torch.float32, device=x_t.device)
        text_ids = x_t.new_zeros(embeddings.shape[1], 3, dtype=torch.float32)
        velocity = network(hidden_states=pack(x_t), timestep=times / 1000, guidance=told, encoder_hidden_states=embeddings,
                           pooled_projections=text["pooled"], txt_ids=text_ids,
                           img_ids=position_ids(height // 2, width // 2, x_t.device), return_dict=False)[0]
        return unpack(velocity, height, width)


def position_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 3): 0, row, column of each token."""
    grid = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3).float()
