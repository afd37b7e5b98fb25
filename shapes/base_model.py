"""The parts of the base model: autoencoder and text encoder, trained from nothing, and the untrained UNet."""

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from transformers import CLIPTextModel

from common.progress import progress_bar
from shapes.mixture import RESOLUTION, sample_captions, write_training_pairs
from shapes.drawing import (COLOURS, FLAW_NAMES, KINDS, POSITIONS, SIZES, Flaws, caption, random_drawing, random_flaws,
                            render)
from shapes.oracle import judge
from shapes.pipeline import GUIDANCE_SCALE, SHIPPED, assemble, clip_tokenizer, draw_images, open_base, text_config

TEXT_WIDTH = 64
VAE_STEPS = 400
DECODER_STEPS = 3200
VAE_RATE = 1e-3
TEXT_STEPS = 400
NUM_PAIRS = 24_000
DOCS_IMAGES = Path(__file__).parents[1] / "docs" / "images"
STEPS = {"sd15": 30, "sd3": 28}  # of the drawings that are judged
DOCS_GRIDS = {"sd15": DOCS_IMAGES / "base_grid.png", "sd3": DOCS_IMAGES / "base_sd3_grid.png"}


def train_vae(steps: int, decoder_steps: int, seed: int, num_images: int = 10_000, batch_size: int = 16) -> AutoencoderKL:
    """Train the autoencoder (3x32x32 <-> 4x16x16) on drawings of every kind; its scaling_factor makes latents of unit
    variance. The loss is the mean absolute error with a slight pull of the latents towards a standard normal; then the
    decoder is trained on alone."""
    rng = random.Random(seed)
    images = np.stack([np.asarray(render(random_drawing(rng), RESOLUTION, _any_flaws(rng)))
                       for _ in progress_bar(range(num_images), desc="drawing")])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=1, latent_channels=4,
                        sample_size=RESOLUTION, mid_block_add_attention=False, force_upcast=False)
    start_as_pooling(vae)

    def loss_at(step):
        batch = images[torch.randint(len(images), (batch_size,))].float() / 127.5 - 1
        posterior = vae.encode(batch).latent_dist
        return F.l1_loss(vae.decode(posterior.sample()).sample, batch) + 3e-4 * posterior.kl().mean() / (4 * 16 * 16)

    def decoder_loss_at(step):
        batch = images[torch.randint(len(images), (batch_size,))].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.sample()
        return F.l1_loss(vae.decode(latents).sample, batch)

    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    _minimise(vae.parameters(), loss_at, steps, VAE_RATE, "autoencoder")
    _minimise(decoder, decoder_loss_at, decoder_steps, VAE_RATE, "decoder")
    with torch.no_grad():
        latents = torch.cat([vae.encode(images[i:i + 100].float() / 127.5 - 1).latent_dist.sample()
                             for i in range(0, 2000, 100)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae.eval()


@torch.no_grad()
def start_as_pooling(vae: AutoencoderKL) -> None:
    """Initial weights at which the autoencoder halves images by averaging and doubles them by repeating, nearly without
    noise in the latents. From random weights the loss after 800 steps was three times what it is from here after 400.

    Residual branches start at zero. The nonlinearity before each conv_out is passed by pairs of channels of opposite
    sign, silu(x) - silu(-x) = x, and its normalisation by a pair of constant channels that outweighs the others.
    """
    constant = 3.0
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            if module.conv_shortcut is not None:
                nn.init.dirac_(module.conv_shortcut.weight)
    pool = vae.encoder.down_blocks[0].downsamplers[0].conv.weight
    pool.zero_()
    pool[range(len(pool)), range(len(pool)), :2, :2] = 0.25
    nn.init.dirac_(vae.decoder.up_blocks[0].upsamplers[0].conv.weight)
    nn.init.dirac_(vae.quant_conv.weight)
    nn.init.dirac_(vae.post_quant_conv.weight)
    vae.quant_conv.bias[4:] = -6  # the latents' log variance
    for half, width in ((vae.encoder, 32), (vae.decoder, 16)):
        half.conv_in.weight[:6] = 0
        half.conv_in.bias[:8] = torch.tensor([0.0] * 6 + [constant, -constant])
        half.conv_in.weight[6:8] = 0
        half.conv_norm_out.weight.fill_(constant * (2 / width) ** 0.5)
        half.conv_out.weight[:3] = 0
        half.conv_out.bias[:3] = 0
        for colour in range(3):
            half.conv_in.weight[colour, colour, 1, 1] = 1
            half.conv_in.weight[colour + 3, colour, 1, 1] = -1
            half.conv_out.weight[colour, colour, 1, 1] = 1
            half.conv_out.weight[colour, colour + 3, 1, 1] = -1


def train_text_encoder(steps: int, seed: int, batch_size: int = 64) -> CLIPTextModel:
    """Train the text encoder to name, from every position after the caption's last word, each attribute of the
    drawing. Words that no caption uses end with an embedding of zeros."""
    rng = random.Random(seed)
    tokenizer = clip_tokenizer()
    encoder = CLIPTextModel(text_config(TEXT_WIDTH, 2))
    choices = [list(COLOURS)] + 2 * [[None, *KINDS], [None, *COLOURS], [None, *SIZES], [None, *POSITIONS]]
    heads = nn.Linear(TEXT_WIDTH, sum(map(len, choices)))
    seen = torch.zeros(len(tokenizer), dtype=torch.bool)

    def loss_at(step):
        drawings = [random_drawing(rng, several=0.5) for _ in range(batch_size)]
        tokens = tokenizer([caption(drawing) for drawing in drawings], padding="max_length", return_tensors="pt")
        seen[tokens.input_ids.unique()] = True
        states = heads(encoder(tokens.input_ids).last_hidden_state)
        after = (tokens.input_ids == tokenizer.eos_token_id)
        targets = torch.tensor([_attribute_indices(drawing, choices) for drawing in drawings])
        losses = [F.cross_entropy(logits[after], target[:, None].expand(-1, after.shape[1])[after])
                  for logits, target in zip(states.split([len(choice) for choice in choices], dim=-1), targets.T)]
        return sum(losses) / len(losses)

    parameters = [*encoder.parameters(), *heads.parameters()]
    _minimise(parameters, loss_at, steps, learning_rate=2e-3, name="text encoder")
    with torch.no_grad():
        encoder.get_input_embeddings().weight[~seen] = 0
    return encoder.eval()


def new_unet() -> UNet2DConditionModel:
    """The base's UNet, untrained: three levels, with cross-attention at the second and in the middle."""
    return UNet2DConditionModel(sample_size=RESOLUTION // 2, block_out_channels=(24, 48, 96), layers_per_block=1,
                                norm_num_groups=4, cross_attention_dim=TEXT_WIDTH, attention_head_dim=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


def prepare(output: Path, seed: int) -> None:
    """Everything that the UNet's training needs, in `output`: start/ (a pipeline whose UNet is untrained) and pairs/.
    What is already there is kept."""
    torch.manual_seed(seed)
    if not (output / "vae").is_dir():
        train_vae(VAE_STEPS, DECODER_STEPS, seed).save_pretrained(output / "vae")
    if not (output / "text_encoder").is_dir():
        train_text_encoder(TEXT_STEPS, seed).save_pretrained(output / "text_encoder")
    if not (output / "pairs").is_dir():
        write_training_pairs(output / "pairs", NUM_PAIRS, seed)
    if not (output / "start").is_dir():
        torch.manual_seed(seed)
        assemble(AutoencoderKL.from_pretrained(output / "vae"),
                 CLIPTextModel.from_pretrained(output / "text_encoder", dtype=torch.float32),
                 new_unet()).save_pretrained(output / "start")


def ship(output: Path) -> None:
    """Write the trained parts of the pipeline in output/trained as float16 into shapes/base."""
    trained = StableDiffusionPipeline.from_pretrained(output / "trained", dtype=torch.float16)
    for name in ("vae", "text_encoder", "unet"):
        ship_part(getattr(trained, name), SHIPPED / name)


def ship_part(part: nn.Module, folder: Path) -> None:
    """A part's weights, and its config in order and without a folder of this machine."""
    part.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"shipped {size / 1e6:.1f} MB in {folder}")


def judge_base(kind: str, num_prompts: int) -> None:
    """Report what the oracle says of a shipped base's drawings; a grid of unseen prompts' goes to docs/images."""
    pipeline, steps = open_base(kind), STEPS[kind]
    for unseen in (False, True):
        prompts = sample_captions(random.Random(1), num_prompts, unseen)
        start = time.time()
        images = draw_images(pipeline, prompts, num_inference_steps=steps)
        seconds = (time.time() - start) / num_prompts
        judgements = [judge(image, prompt) for image, prompt in zip(images, prompts)]
        shares = {name: sum(getattr(judgement, name) for judgement in judgements) / num_prompts
                  for name in ("shape", "colour", "background", "position", "all_right", "cleanliness", "score")}
        print(f"{num_prompts} {'unseen' if unseen else 'seen'} prompts, {steps} steps, guidance {GUIDANCE_SCALE}, "
              f"{1000 * seconds:.0f} ms an image: " + ", ".join(f"{key} {value:.3f}" for key, value in shares.items()))
    grid = [image.resize((96, 96), Image.Resampling.NEAREST) for image in images[:40]]  # of unseen prompts
    make_image_grid(grid, rows=4, cols=10).save(DOCS_GRIDS[kind])


def _minimise(parameters, loss_at, steps, learning_rate, name):
    """Adam with a short warm-up and a cosine decay to zero; logs the loss ten times."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps,
                                                   pct_start=max(0.05, 2 / steps), cycle_momentum=False)
    start, total = time.time(), 0.0
    for step in range(1, steps + 1):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % max(1, steps // 10) == 0:
            print(f"{name}: step {step}, loss {total / max(1, steps // 10):.4f}, {time.time() - start:.0f} s", flush=True)
            total = 0.0


def _any_flaws(rng):
    """Flaws of up to full strength, so that the autoencoder can show what a generator gets wrong."""
    return Flaws() if rng.random() < 0.4 else random_flaws(rng, rng.choice(FLAW_NAMES), 0.1, 1.0)


def _attribute_indices(drawing, choices):
    values = [drawing.background]
    for shape in (*drawing.shapes, None)[:2]:
        values += [shape.kind, shape.colour, shape.size, shape.position] if shape else [None] * 4
    return [choice.index(value) for choice, value in zip(choices, values)]
