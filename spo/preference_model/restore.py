"""What the step-aware preference model looks at: noised images as the frozen base restores them in one step, and labels."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.family import Family
from models.guidance import encode_with_empty, guided, select
from models.tokens import tokenize
from spo.preference_model.data import LabelledPairs
from spo.preference_model.model import EVALUATION_TIMESTEPS, StepAwarePreferenceModel, clamp_resize_clamp
from training.preference import winners_first
from training.run import Run


def labels_from_scores(scores: Tensor, threshold: float) -> Tensor:
    """Soft labels (B,) of image 0 from scores (2, B): a tie where the probabilities differ by less than `threshold`."""
    difference = torch.tanh((scores[0] - scores[1]) / 2)
    return torch.where(difference.abs() < threshold, 0.5, (difference > 0).float())


def agreement(scores: Tensor, label_0: Tensor) -> Tensor:
    """1 where the preferred image scores higher, 0 where it does not, one half for a tie (B,); with equal scores 0, as the
    official program has it. scores: (2, B); label_0: (B,)."""
    return label_0 * (scores[0] > scores[1]) + (1 - label_0) * (scores[0] < scores[1])


class Restorer:
    """Noised and restored images of a batch, and the labels: all that needs the frozen models. network: the base's; judge:
    PickScore in float32, which relabels; None leaves the dataset's labels."""

    def __init__(self, run: Run, family: Family, network: nn.Module, judge: StepAwarePreferenceModel | None, tokenizer):
        self.run, self.family, self.network, self.judge, self.tokenizer = run, family, network, judge, tokenizer
        self.own, resolution = run.options.more[0], run.options.data.resolution
        self.size = (resolution, resolution)

    @torch.no_grad()
    def images(self, batch: dict, timestep: Tensor) -> Tensor:
        """(2B, 3, H, W) around [-1, 1], images 0 first: noised to timestep (B,) with a pair's one noise, x0-hat decoded."""
        family = self.family
        text, empty = encode_with_empty(family, batch["caption"], timestep.device)
        moments = family.encode_images(winners_first(batch["pixel_values"]))
        latents = family.latents(moments, winners_first(batch["vae_noise"]))
        timestep = timestep.repeat(2)
        noisy, _ = family.noise(latents, batch["noise"].repeat(2, 1, 1, 1), timestep)
        rows = torch.arange(len(batch["caption"]), device=timestep.device).repeat(2)
        with self.run.accelerator.autocast():
            prediction = guided(family, self.network, noisy, timestep, select(text, rows), empty, self.size,
                                self.own.guidance)
        return family.decode(family.clean(prediction, noisy, timestep))

    @torch.no_grad()
    def labels(self, batch: dict) -> Tensor:
        """label_0 (B,): the dataset's, or by the untrained CLIP on the images themselves, in float32 as officially."""
        if self.judge is None:
            return batch["label_0"]
        pixels = winners_first(batch["judged"]).float() / 255
        scores = self.judge(pixels, torch.zeros(len(pixels), device=pixels.device), self.input_ids(batch))
        return labels_from_scores(scores.unflatten(0, (2, -1)), self.own.relabel_threshold)

    def input_ids(self, batch: dict) -> Tensor:
        return tokenize(self.tokenizer, batch["caption"]).to(batch["pixel_values"].device)


@torch.no_grad()
def accuracies(run: Run, spm: StepAwarePreferenceModel, restorer: Restorer, pairs: LabelledPairs) -> dict[str, float]:
    """Mean agreement() over the pairs at each evaluation timestep; at t = 0 the images themselves are looked at. As
    officially, a tie counts one half, but does not count where PickScore relabels; nor do pairs that cannot be used. {}
    where no pair counts. Every process must call this."""
    accelerator, batch_size = run.accelerator, run.options.optimizer.train_batch_size
    own = [(index, index) for index in range(accelerator.process_index, len(pairs), accelerator.num_processes)]
    batches = [own[start:start + batch_size] for start in range(0, len(own), batch_size)]
    right = torch.zeros(len(EVALUATION_TIMESTEPS), device=run.device)
    number = torch.zeros(1, device=run.device)
    for batch in DataLoader(pairs, batch_sampler=batches):
        batch = {name: value.to(run.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        labels, input_ids = restorer.labels(batch), restorer.input_ids(batch)
        counts = (batch["passed_over"] == 0) & ((labels != 0.5) | (restorer.judge is None))
        number += counts.sum()
        for row, t in enumerate(EVALUATION_TIMESTEPS):
            timestep = torch.full((len(labels),), t, device=run.device)
            images = restorer.images(batch, timestep) if t else winners_first(batch["pixel_values"])
            pixels = clamp_resize_clamp(images, spm.image_size)
            with accelerator.autocast():
                scores = spm(pixels, timestep.repeat(2), input_ids)
            right[row] += (agreement(scores.unflatten(0, (2, -1)), labels) * counts).sum()
    right, number = (accelerator.reduce(tensor, reduction="sum") for tensor in (right, number))
    if number == 0:
        return {}
    return {f"accuracy_t{t}": float(value / number) for t, value in zip(EVALUATION_TIMESTEPS, right)}
