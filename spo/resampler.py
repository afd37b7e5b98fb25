"""SPO's step-wise resampler (arXiv:2406.04314, section 3.2): winner-loser pairs from prompts alone.

One loop over the denoising steps. From `divert_start_step` on, a pool of candidates is drawn from one latent, compared
by the step-aware preference model, and one member chosen at random carries on: each pair shares its starting point.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from data.draws import seeded_generator
from losses.spo import best_and_worst

# predict(latents (N, C, h, w), time, prompts (N,)) -> the guided prediction (N, C, h, w);
# score(clean latents (N, C, h, w), time, prompts (N,)) -> (N,). `prompts` are positions in the batch of prompts, a time is
# the family's own, an int or a float.
# transition(prediction (N, C, h, w), latents, steps (N,)) -> mean, standard deviation (N, 1, 1, 1), clean latents
Predict = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]
Score = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]
Transition = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class ResamplerConfig:
    """num_inner_step 0: every pool is compared at once (SD1.5). Above 0: each of the pool's branches walks that many
    steps on its own before the comparison, and every transition becomes a pair (SDXL: 3)."""

    num_steps: int = 20
    divert_start_step: int = 4
    pool_size: int = 4
    num_inner_step: int = 0
    threshold: float = 0.3


@dataclass
class Pairs:
    """N transitions of a winner and a loser.

    x_t: (N, 1, C, h, w) where winner and loser always share it, (N, 2, C, h, w), winner first, where branches walk on
    their own; x_next: (N, 2, C, h, w), winner first; step: (N,) the denoising step, 0 the noisiest; prompt: (N,)
    position of its prompt in the batch.
    """

    x_t: torch.Tensor
    x_next: torch.Tensor
    step: torch.Tensor
    prompt: torch.Tensor

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, rows) -> "Pairs":
        return Pairs(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def split(self, size: int) -> list["Pairs"]:
        """Parts of that many pairs, the last one perhaps smaller."""
        return [self[start:start + size] for start in range(0, len(self), size)]

    @staticmethod
    def none(shape: tuple[int, int, int], config: "ResamplerConfig", device: torch.device) -> "Pairs":
        """No pair, in the shapes that a device with pairs has."""
        rows = torch.zeros(0, dtype=torch.int64, device=device)
        x_t = torch.zeros(0, 2 if config.num_inner_step else 1, *shape, device=device)
        return Pairs(x_t, torch.zeros(0, 2, *shape, device=device), rows, rows)

    @staticmethod
    def concatenate(parts: list["Pairs"]) -> "Pairs":
        return Pairs(**{field.name: torch.cat([getattr(p, field.name) for p in parts]) for field in fields(Pairs)})


@dataclass
class Comparison:
    """One comparison of the pools of b prompts: the last denoising step it covers, scores (k, b), kept (b,)."""

    step: int
    scores: torch.Tensor
    kept: torch.Tensor


def prompt_generator(seed: int, epoch: int, prompt_index: int) -> torch.Generator:
    """The source of all of one prompt's draws in one epoch, on the CPU: the same on every device and in every batch."""
    return seeded_generator(seed, 4, epoch, prompt_index)


@torch.no_grad()
def resample(predict: Predict, score: Score, transition: Transition, times: torch.Tensor, config: ResamplerConfig,
             generators: list[torch.Generator], shape: tuple[int, int, int], device: torch.device,
             ) -> tuple[Pairs, list[Comparison]]:
    """Denoise one trajectory a prompt and collect the pairs on the way.

    times: (num_steps,); generators: one a prompt (b of them), see prompt_generator; shape: a latent's (C, h, w). Returns the
    kept pairs, steps in order, and every comparison made. The predictor runs once a step, on pool_size * b latents after the
    start.
    """
    b, last = len(generators), config.num_steps - 1
    every_prompt = torch.arange(b, device=device)

    def draw(width: int) -> torch.Tensor:  # (width, b, C, h, w)
        return torch.stack([torch.randn((width, *shape), generator=g) for g in generators], dim=1).to(device)

    x = draw(1)  # (width, b, C, h, w): width is 1, or pool_size while branches are open
    transitions, parts, comparisons = [], [], []  # transitions: (step, x_t, x_next) since the pool was drawn
    for step, t in enumerate(times.tolist()):
        width = len(x)
        flat = x.flatten(0, 1)
        prediction = predict(flat, t, every_prompt.repeat(width))
        mean, std, x0 = transition(prediction, flat, torch.full((len(flat),), step, device=device))
        mean, std = mean.unflatten(0, (width, b)), std.flatten()[0]

        # With inner steps the last timestep always belongs to the open segment (the official SDXL program).
        segment_is_over = len(transitions) == 1 + config.num_inner_step and not (step == last and config.num_inner_step)
        if segment_is_over:
            scores = score(x0, t, every_prompt.repeat(width)).unflatten(0, (width, b))
            comparisons.append(_compare(scores, transitions, config, parts))
            transitions = []
            chosen = torch.cat([torch.randint(width, (1,), generator=g) for g in generators]).to(device)
            x, mean = x[chosen, every_prompt][None], mean[chosen, every_prompt][None]

        opens_pool = step >= config.divert_start_step and len(x) == 1
        x_next = mean + std * draw(config.pool_size if opens_pool else len(x))
        if step >= config.divert_start_step:
            transitions.append((step, x, x_next))
        x = x_next

    scores = score(x.flatten(0, 1), 0, every_prompt.repeat(len(x))).unflatten(0, (len(x), b))
    comparisons.append(_compare(scores, transitions, config, parts))
    return Pairs.concatenate(parts), comparisons


def _compare(scores: torch.Tensor, transitions: list, config: ResamplerConfig, parts: list[Pairs]) -> Comparison:
    """Add the kept pairs of a segment's transitions to `parts`."""
    best, worst, kept = best_and_worst(scores, config.threshold)
    prompts = kept.nonzero().flatten()
    members = torch.stack([best, worst])[:, kept]  # (2, N)
    for step, x_t, x_next in transitions:
        if len(x_t) > 1:
            x_t = x_t[members, prompts]
        elif config.num_inner_step:
            x_t = x_t[:, prompts].expand(2, *(-1,) * (x_t.dim() - 1))
        else:
            x_t = x_t[:, prompts]
        parts.append(Pairs(x_t.transpose(0, 1), x_next[members, prompts].transpose(0, 1),
                           torch.full_like(prompts, step), prompts))
    return Comparison(transitions[-1][0], scores.cpu(), kept.cpu())
