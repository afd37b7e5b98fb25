"""The forward diffusion side of a training step: latents, prompt embeddings, noising, targets and the two predictions."""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from training.options import TrainArguments
from data.images import scale_pixels
from models.policy import (REFINER_AESTHETIC_SCORE, REFINER_TIMESTEPS, TURBO_TIMESTEPS, Models, adapters_off,
                             is_refiner, is_turbo, on_device)


VAE_BATCH = 8  # images encoded at a time: more are no faster, and at 1024 px their activations take gigabytes


@dataclass
class NoisyBatch:
    """What both UNets see, and what they should predict; N = 2B samples, winners first (sft: N = B).

    latents, target: (N, C, h, w) float32; timesteps: (N,) int64; conditioning: the UNet's further keyword arguments.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    conditioning: dict


def winners_first(per_pair: Tensor) -> Tensor:
    """(B, k, ...) -> (k * B, ...), all winners before all losers."""
    return per_pair.transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def encode_moments(vae, pixel_values: Tensor) -> Tensor:
    """The VAE's mean and log-variance as one (N, 2C, h, w) in its dtype, of images (N, 3, H, W) in [-1, 1].

    Contiguous, as a cache gives them: from channels-last latents the UNets would pick kernels that round otherwise.
    """
    parts = pixel_values.to(vae.dtype).split(VAE_BATCH)
    return torch.cat([vae.encode(part).latent_dist.parameters for part in parts]).contiguous()


def encode_images(vae, pixel_values: Tensor, vae_noise: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) float32 of images (N, 3, H, W) in [-1, 1], sampled with the given normal noise."""
    return latents_of_moments(encode_moments(vae, pixel_values), vae_noise, vae.config.scaling_factor)


def latents_of_moments(moments: Tensor, vae_noise: Tensor, scaling_factor: float) -> Tensor:
    distribution = DiagonalGaussianDistribution(moments)
    return sample_latents(distribution.mean, distribution.std, vae_noise, scaling_factor)


def sample_latents(mean: Tensor, std: Tensor, vae_noise: Tensor, scaling_factor: float) -> Tensor:
    return (mean.float() + std.float() * vae_noise) * scaling_factor


@torch.no_grad()
def encode_prompts(text_encoders: list, input_ids: list[Tensor], sdxl: bool) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, 77) for each encoder -> embeddings (B, 77, D) and, for SDXL, the pooled one (B, P).

    SD1.5 takes the last hidden state; SDXL concatenates both encoders' hidden_states[-2] and pools with the second.
    """
    if not sdxl:
        return text_encoders[0](input_ids[0])[0], None
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(text_encoders, input_ids)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds


def size_ids(args: TrainArguments, count: int, device: torch.device) -> Tensor:
    """SDXL's size conditioning: original size, crop corner, target size (refiner: an aesthetic score). (count, 6 or 5)"""
    last = [REFINER_AESTHETIC_SCORE] if is_refiner(args) else [args.resolution, args.resolution]
    ids = torch.tensor([args.resolution, args.resolution, 0, 0, *last], dtype=torch.float32)
    return ids.to(device, non_blocking=True).expand(count, -1)


def choose_timesteps(uniform: Tensor, args: TrainArguments, num_train_timesteps: int) -> Tensor:
    """Uniforms in [0, 1) -> timesteps ~ U{0..T-1}; turbo models have four, the refiner the lowest 200."""
    if is_turbo(args):
        steps = torch.tensor(TURBO_TIMESTEPS).to(uniform.device, non_blocking=True)
        return steps[(uniform * len(TURBO_TIMESTEPS)).long()]
    timesteps = (uniform * num_train_timesteps).long()
    return timesteps % REFINER_TIMESTEPS if is_refiner(args) else timesteps


@torch.no_grad()
def noisy_batch(batch: dict[str, Tensor], models: Models, args: TrainArguments) -> NoisyBatch:
    """From a micro-batch of B pairs on the device to the UNets' inputs. One timestep and one noise a pair."""
    members = batch["vae_noise"].shape[1]  # winner and loser; the winner alone for sft
    if "moments" in batch:  # from a cache
        moments = winners_first(batch["moments"])
        embeddings, pooled = batch["embeddings"], batch.get("pooled")
    else:
        moments = encode_moments(models.vae, scale_pixels(winners_first(batch["pixel_values"])))
        input_ids = [batch[f"input_ids.{number}"] for number in range(len(models.tokenizers))]
        embeddings, pooled = encode_prompts(models.text_encoders, input_ids, args.sdxl)
    latents = latents_of_moments(moments, winners_first(batch["vae_noise"]), models.scaling_factor)

    scheduler = models.scheduler
    timesteps = choose_timesteps(batch["timestep"], args, scheduler.config.num_train_timesteps).repeat(members)
    noise = batch["noise"].repeat(members, 1, 1, 1)
    input_noise = batch["input_noise"].repeat(members, 1, 1, 1) if "input_noise" in batch else noise
    noisy = scheduler.add_noise(latents, input_noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = noise

    conditioning = {"encoder_hidden_states": embeddings.repeat(members, 1, 1)}
    if args.sdxl:
        conditioning["added_cond_kwargs"] = {"text_embeds": pooled.repeat(members, 1),
                                             "time_ids": size_ids(args, len(noisy), noisy.device)}
    return NoisyBatch(noisy, timesteps, target, conditioning)


def predict(unet, inputs: NoisyBatch) -> Tensor:
    """(N, C, h, w), in whatever dtype the UNet answers."""
    return unet(inputs.latents, inputs.timesteps, return_dict=False, **inputs.conditioning)[0]


@torch.no_grad()
def predict_reference(models: Models, policy, inputs: NoisyBatch) -> Tensor:
    """The reference's prediction: of the frozen copy, or of `policy` (not wrapped) with its adapter off."""
    if models.reference is not None:
        with on_device(models.reference, inputs.latents.device) as reference:  # nothing moves where it is at home there
            return predict(reference, inputs)
    with adapters_off(policy):
        return predict(policy, inputs)
