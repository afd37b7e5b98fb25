"""The step-aware preference model's training as a task of training/fit.py."""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import read_json, whole_file, write_json
from models.devices import writing
from models.family import Family
from models.networks import load_network
from models.policy import cast_compute_weights
from spo.preference_model.data import LabelledPairs, load_pairs
from spo.preference_model.model import (EVALUATION_TIMESTEPS, StepAwarePreferenceModel, clamp_resize_clamp, load_spm,
                                        load_spm_tokenizer)
from spo.preference_model.restore import Restorer, accuracies, agreement
from training.fit import StepLoss
from training.run import Run
from training.state import WholeWeights, whole_state
from training.stored_pairs import StoredPairs

WEIGHTS_FILE = "step-aware_preference_model.bin"


def preference_cross_entropy(scores: Tensor, label_0: Tensor) -> Tensor:
    """Cross-entropy (B,) of softmax(score_0, score_1) to the soft labels; a tie's is shifted by log 0.5, so that 0 is the
    least it can be. scores: (2, B); label_0: (B,) the probability that image 0 is preferred."""
    log_probabilities = scores.log_softmax(dim=0)
    loss = -(label_0 * log_probabilities[0] + (1 - label_0) * log_probabilities[1])
    return loss + torch.where(label_0 == 0.5, torch.tensor(0.5).log(), 0.0)


class SPMTask(StoredPairs):
    """The preference model learns to rank restored images. See training.fit.Task for what each method is for."""

    name = "spm"

    def __init__(self, run: Run, spm: StepAwarePreferenceModel, restorer: Restorer, pairs: LabelledPairs,
                 validation: LabelledPairs | None):
        super().__init__(run, pairs, run.options.optimizer.max_train_steps)
        self.trained, self.weights = spm, WholeWeights(WEIGHTS_FILE)
        self.restorer, self.validation = restorer, validation

    def batches(self, first_step: int) -> Iterator[tuple[int, Iterable[dict]]]:
        if first_step == 0:
            self.validate(0)
        yield from super().batches(first_step)

    def loss(self, model: nn.Module, batch: dict) -> StepLoss:
        """Each pair weighs one over the number of its prompt's pairs, among those of all processes."""
        accelerator, restorer = self.run.accelerator, self.restorer
        timestep = restorer.family.times(batch["timestep"])
        pixels = clamp_resize_clamp(restorer.images(batch, timestep), self.trained.image_size)
        labels = restorer.labels(batch)
        scores = model(pixels, timestep.repeat(2), restorer.input_ids(batch)).unflatten(0, (2, -1))
        losses = preference_cross_entropy(scores, labels)
        total = accelerator.reduce(batch["weight"].sum(), reduction="sum")
        loss = (batch["weight"] * losses).sum() * accelerator.num_processes / total  # processes average their gradients
        scores = scores.detach()
        self.results.append((timestep, loss.detach(), scores[0] - scores[1]))
        return StepLoss(loss, {"train_loss": loss.detach(), "accuracy": agreement(scores, labels).mean()})

    def validate(self, step: int) -> None:
        run = self.run
        if self.validation is None:
            return
        self.trained.eval()
        found = accuracies(run, self.trained, self.restorer, self.validation)
        self.trained.train()
        run.accelerator.log(found, step=step)
        if not found:
            run.warn("no pair to validate on counts: there is no accuracy to report")
            return
        if run.main:
            add_accuracies(run.output_dir, step, found)
        shown = "  ".join(f"t={t} {found[f'accuracy_t{t}']:.3f}" for t in EVALUATION_TIMESTEPS)
        run.say(f"step {step}: accuracy on {len(self.validation)} pairs: {shown}")

    def summary(self) -> dict[str, str]:
        run, options, optimizer = self.run, self.run.options, self.run.options.optimizer
        own = options.more[0]
        labels = f"by {own.spm_clip}, ties below {own.relabel_threshold:g}" if own.relabel_threshold else "the dataset's"
        return {
            "model": f"step-aware preference model made from {own.spm_clip}",
            "base": f"{options.model.pretrained_model_name_or_path} ({self.restorer.family.label}, "
                    f"{options.data.resolution} px), guidance {own.guidance:g}",
            "precision": options.memory.mixed_precision,
            "pairs": f"{len(self.dataset)} of {options.data.source}; validated on "
                     + (str(len(self.validation)) if self.validation else "none") + f"; {self.dataset.pairs.layout}",
            "labels": labels,
            "batch": run.batch_in_words,
            "steps": f"{self.max_steps}, {self.max_steps * run.pairs_per_step / len(self.dataset):.2f} passes over the "
                     "pairs",
            "optimizer": f"AdamW, learning rate {optimizer.learning_rate:.4g}, {optimizer.lr_warmup_steps} warm-up steps, "
                         "then linear decay",
            "seed": str(run.seed),
            "output": str(run.output_dir),
        }

    def save_result(self) -> Path:
        """The weights under the official names; returns where. Every process must call this. UserError on all alike."""
        path = self.run.output_dir / WEIGHTS_FILE
        state = whole_state(self.run.accelerator, self.trained)
        with writing(str(path), self.run.output_dir):
            if self.run.main:
                with whole_file(path) as aside:
                    torch.save(state, aside)
        return path


def make_task(run: Run, family: Family) -> SPMTask:
    """Pairs first, before any large model is read; then the frozen base, the trained model and the labels' judge. Raises
    UserError."""
    options, own = run.options, run.options.more[0]
    data, cache_dir = options.data, options.model.cache_dir
    tokenizer = load_spm_tokenizer(own.spm_tokenizer, cache_dir)
    with run.accelerator.main_process_first():
        pairs, validation = load_pairs(data, own.validation_split, family.latent_shape(data.resolution, data.resolution),
                                       run.seed, cache_dir)
    family.load_encoders(run.dtype, run.device)
    network = load_network(family)
    family.check_network(network, options.model.pretrained_model_name_or_path)
    network = cast_compute_weights(network.requires_grad_(False).eval(), run.dtype).to(run.device)
    spm = load_spm(own.spm_clip, cache_dir=cache_dir).train().to(run.device)
    spm.gradient_checkpointing = options.memory.gradient_checkpointing
    judge = None
    if own.relabel_threshold:
        judge = copy.deepcopy(spm).requires_grad_(False).eval()
        for each in filter(None, (pairs, validation)):
            each.judge_size = spm.image_size
    return SPMTask(run, spm, Restorer(run, family, network, judge, tokenizer), pairs, validation)


def add_accuracies(output_dir: Path, step: int, found: dict[str, float]) -> None:
    """Add a validation to OUTPUT_DIR/accuracy.json, a list of {"step", "accuracy_tN", ...} in order of steps."""
    path = output_dir / "accuracy.json"
    entries = read_json(path) or []
    write_json(path, [entry for entry in entries if entry["step"] < step] + [{"step": step} | found])
