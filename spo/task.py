"""SPO's online training as a task of training/fit.py: sample pairs from the policy's own denoising steps, learn from them,
sample again.

A round samples spo_sample_batch_size prompts a device and takes the optimizer steps that its kept pairs are enough for.
Draws follow from (seed, epoch, prompt), so resuming needs a position alone.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields

import torch
from torch import Tensor, nn

from common.errors import UserError
from losses.spo import clipped_ratio, gaussian_log_prob, spo_loss
from models.family import Family, Text
from models.guidance import guided, select
from models.policy import Policy, load_policy
from spo.resampler import Pairs
from spo.sampling import Judge, Progress, Round, Sampler, load_judge, load_prompts
from training.fit import StepLoss
from training.guards import count_in
from training.optimizers import effective_learning_rate
from training.run import Run
from training.state import LoraWeights, WholeWeights
from training.validation import Validation, encode_validation

Batch = tuple[Pairs, float]  # and how much they weigh in their step


class SPOTask:
    """Step-aware preference optimisation. See training.fit.Task for what each method is for."""

    name = "spo"

    def __init__(self, run: Run, family: Family, policy: Policy, judge: Judge, prompts: list[str],
                 shown: tuple[Text, Text] | None = None):
        self.run, self.family, self.policy, self.spo = run, family, policy, run.options.more[0]
        self.trained = policy.network
        self.weights = LoraWeights(family, run) if policy.lora else WholeWeights(family.weights_file)
        self.max_steps = run.options.optimizer.max_train_steps
        self.sampler = Sampler(run, family, policy.network, judge, prompts)
        self.digest = digest_of(prompts)
        self.validation = Validation(run, family, policy, shown)
        self.progress = Progress()
        self.round: Round | None = None  # the one that is learned from
        self.steps_left = 0  # of it
        self.results: list[tuple[Pairs, Tensor]] = []  # of a step's micro-batches: pairs, loss

    # --- what a checkpoint keeps -----------------------------------------------------------------------------------------

    @property
    def resumable(self) -> bool:
        """At a round's end: the pairs of one under way cannot be drawn again, as the weights that drew them have moved."""
        return self.steps_left == 0

    def record(self, steps_back: int = 0) -> dict:
        """cut: the run ended inside of a round, whose other pairs are gone; the progress is that of its end."""
        return {"prompts": self.digest, "cut": self.steps_left > 0 or steps_back > 0, "progress": asdict(self.progress)}

    def restore(self, record: dict, first_step: int) -> None:
        if not record:
            return
        if not self.run.options.run.allow_changed_resume:
            self.check_record(record, first_step)
        progress = record.get("progress")
        if not isinstance(progress, dict) or not isinstance(progress.get("widest"), (int, float)):
            raise UserError("the checkpoint's progress.json does not say where SPO stood: name an earlier one with "
                            "--resume_from_checkpoint")
        counts = {field.name: count_in(progress, field.name) for field in fields(Progress) if field.name != "widest"}
        self.progress = Progress(**counts, widest=progress["widest"])
        if self.progress.prompts >= len(self.sampler.prompts):  # fewer prompts than the checkpoint had, all of them done
            self.progress = Progress(epoch=self.progress.epoch + 1)

    def check_record(self, record: dict, step: int) -> None:
        """Refuse to go on from a checkpoint where that is not the run it belongs to. Raises UserError."""
        if record.get("prompts") != self.digest:
            raise UserError(f"the prompts of {self.spo.spo_prompts or self.run.options.data.source} are not those that the "
                            "checkpoint was made with, or not in their order: go back to those, choose another "
                            "--output_dir, or add --allow_changed_resume")
        if record.get("cut") and not 0 < self.max_steps <= step:
            raise UserError(f"the run ended at step {step} in the middle of a round, and the round's other pairs are gone: "
                            "name an earlier checkpoint with --resume_from_checkpoint, or add --allow_changed_resume to go "
                            "on with the next round")

    # --- a step ----------------------------------------------------------------------------------------------------------

    def finished(self, step: int) -> bool:
        if self.max_steps:
            return step >= self.max_steps
        return self.progress.epoch >= self.run.options.optimizer.num_train_epochs

    def batches(self, first_step: int) -> Iterator[tuple[int, Iterable[Batch]]]:
        optimizer, step = self.run.options.optimizer, first_step
        pairs_per_step = optimizer.train_batch_size * optimizer.gradient_accumulation_steps
        while not self.finished(step):
            self.round = self.sampler(self.progress)
            groups = self.round.pairs.split(pairs_per_step)
            if not groups:
                self.run.accelerator.log(self.round.logs, step=step)
            if self.progress.prompts >= len(self.sampler.prompts):
                if self.progress.learned == 0:
                    self.run.warn(self.no_pairs_message())
                    return
                self.progress = Progress(epoch=self.progress.epoch + 1)
            if not groups:
                yield 0, ()
            self.steps_left = len(groups)
            for group in groups:
                if 0 < self.max_steps <= step:
                    return  # the other pairs are left, and the record says so
                parts = group.split(optimizer.train_batch_size)
                step, self.steps_left = step + 1, self.steps_left - 1
                yield len(parts), [(pairs, len(pairs) * len(parts) / len(group)) for pairs in parts]  # 1 where all are alike

    def loss(self, model: nn.Module, batch: Batch) -> StepLoss:
        """SPO's loss of N pairs and what is logged about it."""
        (pairs, weight), clip, beta = batch, self.spo.spo_clip, self.spo.spo_beta
        with torch.no_grad(), self.policy.as_reference(self.run.device) as reference:
            reference_w, reference_l = self.log_probs(reference, pairs)
        policy_w, policy_l = self.log_probs(model, pairs)
        ratio_w, ratio_l = clipped_ratio(policy_w, reference_w, clip), clipped_ratio(policy_l, reference_l, clip)
        loss = spo_loss(ratio_w, ratio_l, beta)

        ratios = torch.stack([ratio_w, ratio_l]).detach()
        margin = beta * (ratios[0].log() - ratios[1].log())
        clipped = (ratios <= 1 - clip) | (ratios >= 1 + clip)
        self.results.append((pairs, loss.detach()))
        return StepLoss(loss, {
            "train_loss": loss.detach(), "implicit_acc_accumulated": ((margin.sign() + 1) / 2).mean(),
            "margin_mean": margin.mean(), "margin_square": margin.square().mean(),
            "ratio_w": ratios[0].mean(), "ratio_l": ratios[1].mean(), "clipped_share": clipped.float().mean()}, weight)

    def log_probs(self, network: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the winners' and the losers' transitions under a network, (N,) each.

        Where winner and loser share x_t, they share the prediction too.
        """
        sampler, members = self.sampler, pairs.x_t.shape[1]
        x_t, rows, steps = pairs.x_t.flatten(0, 1), *(of.repeat_interleave(members) for of in (pairs.prompt, pairs.step))
        times = sampler.times.to(rows.device)[steps]
        with self.run.accelerator.autocast():
            prediction = guided(self.family, network, x_t, times, select(self.round.text, rows), self.round.empty,
                                sampler.size, sampler.guidance)
        mean, std, _ = sampler.transition(prediction, x_t, steps)
        mean, std = (tensor.unflatten(0, (len(pairs), members)) for tensor in (mean, std))
        winners, losers = (gaussian_log_prob(pairs.x_next[:, i], mean[:, i % members], std[:, 0]) for i in (0, 1))
        return winners, losers

    # --- after a step ----------------------------------------------------------------------------------------------------

    def flags(self) -> dict[str, float]:
        return {}

    def stepped(self) -> None:
        pass

    def settle(self, step: int, logs: dict[str, float]) -> str | None:
        self.results = []
        logs |= self.round.logs
        return None

    def samples(self, logs: dict[str, float]) -> list[dict]:
        """Pairs of the micro-batches whose loss is not finite; all of them, if every process's loss is finite and the
        gradient is not."""
        timesteps = self.sampler.times.tolist()
        gradient = math.isfinite(logs["train_loss"])
        return [{"prompt": self.round.prompts[row], "timestep": timesteps[step], "loss": str(float(loss))}
                for pairs, loss in self.results if gradient or not loss.isfinite()
                for row, step in zip(pairs.prompt.tolist(), pairs.step.tolist())]

    def validate(self, step: int) -> None:
        self.validation(step)

    def no_pairs_message(self) -> str:
        progress, threshold = self.progress, self.spo.spo_threshold
        epoch = f"no pair of epoch {progress.epoch + 1} could be learned from"
        if progress.kept == 0:
            return (f"{epoch}: the best and worst of a pool never differed by more than --spo_threshold {threshold:g} in "
                    f"probability ({progress.widest:.3g} at most in {progress.compared} pools). Lower --spo_threshold below "
                    f"{progress.widest:.3g}; the run ends here")
        return (f"{epoch}: {progress.kept} pairs were kept, but no round had one for each of the "
                f"{self.run.accelerator.num_processes} devices. Lower --spo_threshold or raise --spo_sample_batch_size; the "
                "run ends here")

    # --- the start -------------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, str]:
        run, options, spo, optimizer = self.run, self.run.options, self.spo, self.run.options.optimizer
        prompts, per_round, world = len(self.sampler.prompts), self.sampler.prompts_per_round, run.accelerator.num_processes
        inner = f", {spo.spo_num_inner_step} inner steps" if spo.spo_num_inner_step else ""
        length = f"{self.max_steps} steps" if self.max_steps else f"{optimizer.num_train_epochs} epochs"
        return {
            "method": f"spo, beta {spo.spo_beta:g}, ratios clipped at 1 +- {spo.spo_clip:g}",
            "base": f"{options.model.pretrained_model_name_or_path} ({self.family.label}, {options.data.resolution} px)"
                    + (f", weights of {options.model.unet_init}" if options.model.unet_init else ""),
            "policy": self.policy.in_words(options),
            "reference": "policy without adapter" if self.policy.lora else "frozen copy",
            "precision": f"{options.memory.mixed_precision}, log-probabilities in float32",
            "sampling": f"{spo.spo_num_steps} random steps, eta {self.sampler.eta:g}, guidance {spo.spo_guidance:g}; pools "
                        f"of {spo.spo_k} from step {spo.spo_divert_start_step}{inner}, threshold {spo.spo_threshold:g}",
            "judge": str(spo.spm_checkpoint or spo.spm_clip),
            "prompts": f"{prompts}, {per_round} per round, {math.ceil(prompts / per_round)} rounds per epoch",
            "batch": f"{run.batch_in_words}; {length}",
            "optimizer": f"{optimizer.optimizer}, learning rate {effective_learning_rate(optimizer, world):.4g}, "
                         f"{optimizer.lr_scheduler}",
            "seed": str(run.seed),
            "output": str(run.output_dir),
        }


def make_task(run: Run, family: Family, kind: type[SPOTask] = SPOTask) -> SPOTask:
    """Prompts first, before any large model is read; then the judge, encoders, policy and reference. kind: a variant of the
    task, for experiments. Raises UserError."""
    options, spo = run.options, run.options.more[0]
    family.walk(spo.spo_num_steps, (options.data.resolution,) * 2)  # refuses what the base has no room for
    with run.accelerator.main_process_first():
        prompts = load_prompts(options)
    judge = load_judge(spo, options.model.cache_dir, run.device)
    family.load_encoders(run.dtype, run.device)
    shown = encode_validation(run, family)
    policy = load_policy(family, options.memory, run.dtype, run.device, needs_reference=True,
                         resolution=options.data.resolution)
    return kind(run, family, policy, judge, prompts, shown)


def digest_of(prompts: list[str]) -> str:
    """Identity of the prompts and of their order, which their draws follow from."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
