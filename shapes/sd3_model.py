"""The SD3-shaped base: a transformer that learns the mixture in flow matching, on the other base's VAE and text encoder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from common.train_checks import parse_options
from common.train_options import TrainOptions
from data.cache import CacheOptions, cache
from shapes.base_model import ship_part
from shapes.experiment import COMMON
from shapes.mixture import RESOLUTION, write_training_pairs
from shapes.pipeline import BASE_OPTIONS, NETWORKS, SHIPPED, assemble_sd3
from train import train

TEXT_WIDTH = 64  # of each of the two encoders
NUM_PAIRS = 40_000  # whose winners are learned
STEPS = 5000
EMA_DECAY = 0.999
AVERAGE = "average.safetensors"


def new_transformer() -> SD3Transformer2DModel:
    """The base's transformer, untrained: 4 joint blocks of width 128 over 8x8 patches of the latents."""
    return SD3Transformer2DModel(sample_size=RESOLUTION // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
                                 attention_head_dim=32, num_attention_heads=4, joint_attention_dim=2 * TEXT_WIDTH,
                                 caption_projection_dim=128, pooled_projection_dim=2 * TEXT_WIDTH,
                                 pos_embed_max_size=RESOLUTION // 4)


def options_of(output: Path, **more) -> TrainOptions:
    options = {"pretrained_model_name_or_path": output / "start", "cached_dataset": output / "cache", "train_method": "sft",
               "lora_rank": 0} | COMMON | BASE_OPTIONS["sd3"] | more
    return parse_options([f"--{name}={value}" for name, value in options.items()])


def prepare(output: Path, seed: int) -> None:
    """What the transformer's training needs, in `output`: start/ (a pipeline whose transformer is untrained), pairs/ and
    their cache. What is already there is kept."""
    if not (output / "pairs").is_dir():
        write_training_pairs(output / "pairs", NUM_PAIRS, seed)
    if not (output / "start").is_dir():
        torch.manual_seed(seed)
        transformer = new_transformer()
        assemble_sd3(AutoencoderKL.from_pretrained(SHIPPED / "vae").float(),
                     CLIPTextModel.from_pretrained(SHIPPED / "text_encoder").float(), transformer).save_pretrained(output / "start")
    cache(options_of(output, train_data_dir=output / "pairs"), CacheOptions(encode_batch_size=64))


def train_transformer(output: Path, seed: int) -> None:
    """Learn the winners by train.py's sft; the weights' moving average goes to `output`/AVERAGE at every checkpoint. A run
    that was broken off goes on, with a new average."""
    torch.set_num_threads(1)
    average: EMAModel | None = None

    def watch(step: int, network: nn.Module, scalars: dict[str, float]) -> None:
        nonlocal average
        if average is None:
            average = EMAModel(network.parameters(), decay=EMA_DECAY)
            return
        average.step(network.parameters())
        if step % options.run.checkpointing_steps == 0:
            names = [name for name, _ in network.named_parameters()]
            save_file(network.state_dict() | dict(zip(names, average.shadow_params)), output / AVERAGE)
            print(f"step {step}: loss {scalars['train_loss']:.4f}", flush=True)

    options = options_of(output, output_dir=output / "trained", train_batch_size=64, max_train_steps=STEPS, learning_rate=1e-3,
                         lr_scheduler="cosine", lr_warmup_steps=100, adam_beta2=0.99, adam_weight_decay=0,
                         proportion_empty_prompts=0.1, checkpointing_steps=500, checkpoints_total_limit=1, seed=seed)
    train(options, watch)


def ship(output: Path) -> None:
    """Write the average as float16 into shapes/base_sd3."""
    transformer = new_transformer()
    transformer.load_state_dict(load_file(output / AVERAGE))
    ship_part(transformer.half(), NETWORKS["sd3"][1])
