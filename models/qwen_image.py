"""Qwen-Image: packed latents of a video VAE, and a language model's hidden states of the caption in a template.

The network rounds sigma to the type of its hidden states: under bf16 autocast up to 2 of 1000 off, alike for policy and
reference. Guidance keeps the length of the conditional prediction, token by token.
"""

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from common.train_options import ModelOptions
from models import parts
from models.family import Text
from models.flow import FlowFamily, pack, unpack
from models.parts import each_alone
from models.tokens import cut

BEFORE = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
          "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n")
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"


class QwenImage(FlowFamily):
    name, label, license = "qwen_image", "Qwen-Image", "apache-2.0"
    network, pipeline, pipeline_parts = QwenImageTransformer2DModel, QwenImagePipeline, {}
    compiled_blocks = (QwenImageTransformerBlock,)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]  # the image's stream: of the text's, the last block is idle in part
    vae_class = AutoencoderKLQwenImage
    default_sequence, longest_sequence = 512, 1024
    steps, guidance, empty_prompt = 50, 4.0, " "

    def __init__(self, options: ModelOptions, index: dict):
        super().__init__(options, index)
        self.dropped = len(self.tokenizers["text_encoder"](BEFORE).input_ids)  # 34 tokens of the published tokenizer

    # --- text ------------------------------------------------------------------------------------------------------------

    def tokenize(self, captions: list[str]) -> Text:
        """input_ids and mask (B, L + the template's beginning), padded at the end."""
        tokens = self.tokenizers["text_encoder"]([f"{BEFORE}{caption}{BEHIND}" for caption in cut(captions)],
                                                 padding="max_length", max_length=self.sequence_length + self.dropped,
                                                 truncation=True, return_tensors="pt")
        return {"input_ids": tokens.input_ids, "mask": tokens.attention_mask.bool()}

    def caption_room(self, tokenizer) -> int:
        return self.sequence_length

    @each_alone
    def encode_text(self, tokens: Text) -> Text:
        """embeddings (B, L, D): the last hidden state behind the template's beginning, zeros where mask (B, L) is False."""
        states = self.text_encoders[0](input_ids=tokens["input_ids"], attention_mask=tokens["mask"],
                                       output_hidden_states=True).hidden_states[-1]
        mask = tokens["mask"][:, self.dropped:]
        return {"embeddings": states[:, self.dropped:] * mask.unsqueeze(-1), "mask": mask}

    # --- images ----------------------------------------------------------------------------------------------------------

    @property
    def latent_factor(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])

    @property
    def latent_channels(self) -> int:
        return self.vae_config["z_dim"]

    def encode_images(self, pixels: Tensor) -> Tensor:
        """As a video of one frame."""
        return super().encode_images(pixels.unsqueeze(2)).squeeze(2)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.float().chunk(2, dim=1)
        own_mean, own_std = self._statistics(moments.device)
        return (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise - own_mean) / own_std

    def decode(self, latents: Tensor) -> Tensor:
        own_mean, own_std = self._statistics(latents.device)
        return self.decode_unscaled((latents.float() * own_std + own_mean).unsqueeze(2)).squeeze(2)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, (1, C, 1, 1)."""
        return tuple(torch.tensor(self.vae_config[name], device=device).reshape(1, -1, 1, 1)
                     for name in ("latents_mean", "latents_std"))

    # --- the network -----------------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, times: Tensor, text: Text, size: tuple[int, int]) -> Tensor:
        """Text is cut at the batch's longest, and the mask is left out where nothing is padded, as the pipeline does."""
        height, width = x_t.shape[2:]
        lengths = parts.lengths(text["mask"])
        longest = max(lengths)
        mask = text["mask"][:, :longest] if min(lengths) < longest else None
        velocity = network(hidden_states=pack(x_t), timestep=times / 1000,
                           encoder_hidden_states=text["embeddings"][:, :longest], encoder_hidden_states_mask=mask,
                           img_shapes=[[(1, height // 2, width // 2)]] * len(x_t), return_dict=False)[0]
        return unpack(velocity, height, width)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, official: bool) -> Tensor:
        """Each token of the guided prediction as long as the conditional one's."""
        guided = pack(super().guide(unconditional, conditional, scale, official))
        length = pack(conditional).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * length, *conditional.shape[2:])

    def without_gradient(self, network: nn.Module) -> list[str]:
        """The last block's text stream ends in nothing."""
        last = f"transformer_blocks.{len(network.transformer_blocks) - 1}"
        return [f"{last}.attn.to_add_out", f"{last}.txt_mlp"]
