"""SPO's online training: sample pairs from the policy's own denoising steps, learn from them, sample again.

A round samples spo_sample_batch_size prompts a device, gathers the kept pairs, deals them out evenly and takes the
optimizer steps they are enough for. train.py hands over to train() with --train_method spo. What is random follows from
(seed, epoch, prompt), so the number of devices changes nothing but rounding, and resuming needs a position alone.
"""

import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from losses.spo import clipped_ratio, ddim_gaussian, gaussian_log_prob, spo_loss
from spo.preference_model.model import StepAwarePreferenceModel, load_spm, load_spm_tokenizer, resize_then_clamp
from common.train_options import TrainArguments, warn
from training.checkpoints import (continuing, find_checkpoint, load_checkpoint, read_progress, register_hooks, save_checkpoint,
                                  save_result, write_run_file)
from data.pairs import tokenize
from data.draws import epoch_order, seeded_generator
from models.guidance import PromptConditioning, condition_on_prompts, decode_latents, guided_prediction
from training.guards import is_finite
from training.hub import push
from training.run import COMPUTE_DTYPES, gradient_norm, identify_run, take_step, tracker_config
from training.records import MetricsFile, StepScalars, bar_interval, peak_memory_gb
from models.policy import (Models, adapters_off, load_frozen_encoders, load_policy_and_reference,
                             load_tokenizers_and_scheduler, on_device)
from training.optimizers import effective_learning_rate, make_optimizer, make_schedule, optimizer_name
from spo.resampler import Comparison, Pairs, ddim_scheduler, previous_timestep, prompt_generator, resample
from common.signals import StopSignal
from spo.options import SPOArguments, check_spo_arguments, load_prompts, resampler_config
from training.validation import validate


@dataclass
class Progress:
    """Where a run stands; accelerate keeps it in every checkpoint. `prompts` and `round` count the prompts and rounds
    that the epoch has had: a round's size may change when a run is resumed. The others count the epoch's comparisons,
    kept pairs, pairs learned from, and its largest difference of probabilities in a pool."""

    epoch: int = 0
    prompts: int = 0
    round: int = 0
    step: int = 0
    compared: int = 0
    kept: int = 0
    learned: int = 0
    widest: float = 0.0

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def next_epoch(self) -> None:
        self.load_state_dict(asdict(Progress(epoch=self.epoch + 1, step=self.step)))


def train(args: TrainArguments, spo: SPOArguments, accelerator: Accelerator, stop: StopSignal) -> None:
    """Run SPO from start, or from a checkpoint, to the saved result. Raises UserError."""
    # 1. The run. One namespace of options, so that run.json and the checkpoints record SPO's too.
    check_spo_arguments(args, spo)
    vars(args).update(asdict(spo))
    device, main_process, world = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    dtype = COMPUTE_DTYPES[args.mixed_precision]
    accelerator.gradient_accumulation_steps = 1  # learn_from() weights its micro-batches by their size itself
    identify_run(args, accelerator)

    # 2. Prompts and models: frozen encoders, policy, reference, and the preference model.
    models = load_tokenizers_and_scheduler(args)
    scheduler = ddim_scheduler(models.scheduler, args.spo_num_steps)
    with accelerator.main_process_first():
        prompts = load_prompts(args, spo, args.seed)
    judge = load_judge(args, device)
    load_frozen_encoders(models, args, dtype, device)
    load_policy_and_reference(models, args, dtype, device)

    # 3. Optimizer and schedule.
    trainable = [parameter for parameter in models.policy.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trainable, args, effective_learning_rate(args, world))
    lr_scheduler = make_schedule(optimizer, args, args.max_train_steps)
    policy, optimizer = accelerator.prepare(models.policy, optimizer)
    unwrapped = accelerator.unwrap_model(policy)

    # 4. Continue where a checkpoint ended, or start.
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    write_run_file(args, accelerator)
    register_hooks(accelerator, lora=args.lora_rank > 0)
    checkpoint = find_checkpoint(args, accelerator)
    if checkpoint:
        check_record(read_progress(checkpoint), digest_of(prompts), args)
        load_checkpoint(accelerator, lr_scheduler, checkpoint, args)
        if progress.prompts >= len(prompts):  # fewer prompts than the checkpoint had, all of them done
            progress.next_epoch()
    saved = validated = progress.step
    round_size = world * args.spo_sample_batch_size
    rounds = math.ceil(len(prompts) / round_size)
    if main_process:
        accelerator.init_trackers(args.tracker_project_name, tracker_config(args))
        print(f"Training\n{summary(args, world, len(prompts), rounds)}", flush=True)
        if checkpoint:
            print(f"  resuming   {checkpoint}, after step {progress.step}", flush=True)
    metrics = MetricsFile(args.output_dir, progress.step)
    record = {"prompts": digest_of(prompts), "cut": False}

    def finished() -> bool:
        if args.max_train_steps:
            return progress.step >= args.max_train_steps
        return progress.epoch >= args.num_train_epochs

    # 5. The loop: one round a turn.
    group_size = args.train_batch_size * args.gradient_accumulation_steps
    skipped_in_a_row = 0
    bar = tqdm(initial=progress.step, total=args.max_train_steps or None, unit="step", dynamic_ncols=True,
               disable=not accelerator.is_local_main_process, mininterval=bar_interval())
    while not finished():
        bar.set_description(f"spo epoch {progress.epoch + 1} prompt {progress.prompts + 1}/{len(prompts)}")
        order = epoch_order(len(prompts), args.seed, progress.epoch, shuffle=True)
        chosen = order[progress.prompts:progress.prompts + round_size]
        conditioning = condition_on_prompts(models, args, [prompts[i] for i in chosen], device)
        pairs, comparisons = sample_pairs(unwrapped, models, judge, scheduler, conditioning, prompts, chosen, progress,
                                          args, accelerator)
        round_logs = round_statistics(comparisons, progress, args.spo_num_steps, accelerator)
        pairs = deal_out(pairs, args.seed, progress, accelerator)
        progress.learned += len(pairs) * world
        round_logs["spo/pairs"] = len(pairs) * world
        accelerator.log(round_logs, step=progress.step)

        for start in range(0, len(pairs), group_size):
            if args.max_train_steps and progress.step >= args.max_train_steps:
                record["cut"] = True
                break
            logs = learn_from(pairs[start:start + group_size], policy, unwrapped, models, conditioning, scheduler,
                              args, accelerator)
            logs["grad_norm"] = float(gradient_norm(accelerator, policy, args))
            finite = is_finite(accelerator, logs)
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            if not finite and main_process:
                warn(f"step {progress.step + 1} is skipped: loss {logs['train_loss']:g}, gradient norm "
                     f"{logs['grad_norm']:g} ({skipped_in_a_row} in a row)")
            take_step(accelerator, optimizer, lr_scheduler, finite)
            if skipped_in_a_row >= args.max_nonfinite_steps:
                raise UserError(f"neither loss nor gradient was finite in {skipped_in_a_row} steps in a row: lower "
                                "--learning_rate, or train in bf16, and continue from the last checkpoint with "
                                "--allow_changed_resume")
            progress.step += 1
            logs |= {"lr": lr_scheduler.get_last_lr()[0], "peak_memory_gb": peak_memory_gb(device)}
            accelerator.log(logs, step=progress.step)
            if main_process:
                metrics.append(progress.step, logs | round_logs)
            bar.update()
            bar.set_postfix(loss=f"{logs['train_loss']:.4g}", acc=f"{logs['implicit_acc_accumulated']:.3g}",
                            kept=f"{round_logs['spo/kept_share']:.2g}")

        progress.round += 1
        progress.prompts += len(chosen)
        if progress.prompts >= len(prompts):
            if progress.learned == 0:
                if main_process:
                    warn(no_pairs_message(args, progress, world))
                break
            progress.next_epoch()
        stopped = accelerator.gather(torch.tensor([stop.name is not None], device=device)).any()
        due = args.checkpointing_steps and progress.step // args.checkpointing_steps > saved // args.checkpointing_steps
        if (stopped or due) and not finished():
            checkpoint = save_checkpoint(accelerator, policy, lr_scheduler, progress.step, args, record=record)
            saved = progress.step
            if stopped:
                accelerator.end_training()
                if main_process:
                    print(f"Stopped by {stop.name or 'a signal'}: {checkpoint} is saved, "
                          f"{continuing(args.resume_from_checkpoint)}", flush=True)
                return
        if args.validation_prompts and (finished() or progress.step // args.validation_steps
                                        > validated // args.validation_steps):
            if main_process:
                validate(models, unwrapped, args, accelerator, progress.step)
            validated = progress.step
            accelerator.wait_for_everyone()
    bar.close()

    # 6. The result: a last checkpoint, unet.pth, the LoRA weights and a pipeline that diffusers opens.
    if progress.step > 0:
        if saved < progress.step:
            save_checkpoint(accelerator, policy, lr_scheduler, progress.step, args, record=record)
        save_result(accelerator, policy, args)
    accelerator.end_training()
    if main_process:
        if progress.step == 0:
            print("Done: nothing was learned, so nothing was written", flush=True)
            return
        print(f"Done: {Path(args.output_dir, 'unet.pth')} and a diffusers pipeline in {args.output_dir}", flush=True)
        if args.push_to_hub:
            print(f"Published at {push(args)}", flush=True)


def digest_of(prompts: list[str]) -> str:
    """Identity of the prompts and of their order, which their draws follow from."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def check_record(checkpoint: dict, prompts: str, args) -> None:
    """Refuse to go on from a checkpoint, given by its progress.json, where that is not the run it belongs to; prompts:
    this run's digest_of(). Raises UserError."""
    step, record = checkpoint["step"], checkpoint["record"]
    if args.allow_changed_resume:
        return
    if record.get("prompts") != prompts:
        raise UserError(f"the prompts of {args.spo_prompts or args.data_source} are not those that the checkpoint was "
                        "made with, or not in their order: go back to those, choose another --output_dir, or add "
                        "--allow_changed_resume")
    if record.get("cut") and not 0 < args.max_train_steps <= step:
        raise UserError(f"--max_train_steps ended the run at step {step} in the middle of a round, and the round's "
                        "other pairs are gone: name an earlier checkpoint with --resume_from_checkpoint, or add "
                        "--allow_changed_resume to go on with the next round")


# --- sampling ------------------------------------------------------------------------------------------------------

@dataclass
class Judge:
    """The step-aware preference model, frozen, with its tokenizer. It scores in float32, without autocast, as the official
    program does: rounding to bf16 moves scores by 0.01 to 0.08, and a pool's often lie closer together."""

    spm: StepAwarePreferenceModel
    tokenizer: PreTrainedTokenizerBase


def load_judge(args, device: torch.device) -> Judge:
    tokenizer = load_spm_tokenizer(args.spm_tokenizer, args.cache_dir)
    spm = load_spm(args.spm_clip, args.spm_checkpoint, args.cache_dir).requires_grad_(False).eval()
    return Judge(spm.to(device), tokenizer)


@torch.no_grad()
def sample_pairs(unet, models: Models, judge: Judge, scheduler: DDIMScheduler, conditioning: PromptConditioning,
                 prompts: list[str], chosen: np.ndarray, progress: Progress, args,
                 accelerator: Accelerator) -> tuple[Pairs, list[Comparison]]:
    """This device's share of a round: pairs, whose `prompt` is a row of `conditioning`, and comparisons.

    chosen: the round's prompts, of all devices, as positions in `prompts`; the last round of an epoch may have fewer
    of them than there are devices.
    """
    device, config = accelerator.device, resampler_config(args)
    own = np.array_split(np.arange(len(chosen)), accelerator.num_processes)[accelerator.process_index]
    if len(own) == 0:
        return Pairs.none(models.latent_shape, config, device), []
    generators = [prompt_generator(args.seed, progress.epoch, int(chosen[i])) for i in own]
    input_ids = tokenize(judge.tokenizer, [prompts[chosen[i]] for i in own]).to(device)
    text_features = judge.spm.text_features(input_ids)
    own = torch.from_numpy(own).to(device)

    def predict(latents: Tensor, t: int, rows: Tensor) -> Tensor:
        times = torch.full((len(latents),), t, device=device)
        with accelerator.autocast():
            return guided_prediction(unet, latents, times, conditioning, own[rows], args.spo_guidance)

    def score(latents: Tensor, t: int, rows: Tensor) -> Tensor:
        times = torch.full((len(latents),), t, device=device)
        pixels = resize_then_clamp(decode_latents(models.vae, latents), judge.spm.image_size)
        return judge.spm.score(pixels, times, text_features[rows])

    pairs, comparisons = resample(predict, score, scheduler, config, generators, models.latent_shape, device)
    pairs.prompt = own[pairs.prompt]
    return pairs, comparisons


def deal_out(pairs: Pairs, seed: int, progress: Progress, accelerator: Accelerator) -> Pairs:
    """Gather every device's pairs, shuffle them with one permutation and give each device the same number.

    Every process must call this. Pairs beyond a multiple of the number of devices are dropped; with fewer pairs than
    devices all get none. The permutation follows from the seed, the epoch and how many rounds of it were before.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    counts = accelerator.gather(torch.tensor([len(pairs)], device=accelerator.device))
    if counts.sum() == 0:
        return pairs
    if world > 1:
        longest = int(counts.max())
        present = (torch.arange(longest, device=counts.device)[None] < counts[:, None]).flatten()
        pairs = Pairs(**{field.name: accelerator.gather(_pad(getattr(pairs, field.name), longest))[present]
                         for field in fields(Pairs)})
    # One order for any number of devices: by prompt and step, then permuted.
    pairs = pairs[torch.argsort(pairs.prompt * (int(pairs.step.max()) + 1) + pairs.step)]
    shuffled = torch.randperm(len(pairs), generator=seeded_generator(seed, 5, progress.epoch, progress.round))
    return pairs[shuffled[:len(pairs) // world * world][rank::world].to(pairs.step.device)]


def _pad(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


# --- learning ------------------------------------------------------------------------------------------------------

def learn_from(group: Pairs, policy, unwrapped, models: Models, conditioning: PromptConditioning,
               scheduler: DDIMScheduler, args, accelerator: Accelerator) -> dict[str, float]:
    """The gradient of this device's pairs of one optimizer step, in micro-batches; returns the step's scalars.

    Each micro-batch counts by its size, in gradient and scalars; the devices exchange gradients in the last one only. A
    collective call.
    """
    scalars = StepScalars()
    starts = range(0, len(group), args.train_batch_size)
    for start in starts:
        pairs = group[start:start + args.train_batch_size]
        with nullcontext() if start == starts[-1] else accelerator.no_sync(policy):
            loss, logs = pair_loss(policy, unwrapped, models, conditioning, pairs, scheduler, args, accelerator)
            accelerator.backward(loss * len(pairs) / len(group))
        weight = len(pairs) * len(starts) / len(group)  # exactly 1 where all have the same size
        scalars.add({name: value * weight for name, value in logs.items()})
    return scalars.reduce(accelerator)


def pair_log_probs(unet, pairs: Pairs, conditioning: PromptConditioning, scheduler: DDIMScheduler, args,
                   accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the winners' and the losers' transitions under a UNet, (N,) each.

    Where winner and loser share x_t, they share the prediction too.
    """
    members = pairs.x_t.shape[1]
    x_t, rows = pairs.x_t.flatten(0, 1), pairs.prompt.repeat_interleave(members)
    times = scheduler.timesteps.to(rows.device)[pairs.step].repeat_interleave(members)
    with accelerator.autocast():
        prediction = guided_prediction(unet, x_t, times, conditioning, rows, args.spo_guidance)
    mean, std, _ = ddim_gaussian(prediction, x_t, times, previous_timestep(scheduler, times), scheduler.alphas_cumprod,
                                 args.spo_eta, scheduler.config.prediction_type)
    mean, std = (tensor.unflatten(0, (len(pairs), members)) for tensor in (mean, std))
    winners, losers = (gaussian_log_prob(pairs.x_next[:, i], mean[:, i % members], std[:, 0]) for i in (0, 1))
    return winners, losers


def pair_loss(policy, unwrapped, models: Models, conditioning: PromptConditioning, pairs: Pairs,
              scheduler: DDIMScheduler, args, accelerator: Accelerator) -> tuple[Tensor, dict[str, Tensor]]:
    """SPO's loss of N pairs and what is logged about it."""
    setting = pairs, conditioning, scheduler, args, accelerator
    with torch.no_grad():
        if models.reference is not None:
            with on_device(models.reference, accelerator.device) as reference:
                reference_w, reference_l = pair_log_probs(reference, *setting)
        else:
            with adapters_off(unwrapped):
                reference_w, reference_l = pair_log_probs(unwrapped, *setting)
    policy_w, policy_l = pair_log_probs(policy, *setting)
    ratio_w = clipped_ratio(policy_w, reference_w, args.spo_clip)
    ratio_l = clipped_ratio(policy_l, reference_l, args.spo_clip)
    loss = spo_loss(ratio_w, ratio_l, args.spo_beta)

    ratios = torch.stack([ratio_w, ratio_l]).detach()
    margin = args.spo_beta * (ratios[0].log() - ratios[1].log())
    clipped = (ratios <= 1 - args.spo_clip) | (ratios >= 1 + args.spo_clip)
    return loss, {"train_loss": loss.detach(), "implicit_acc_accumulated": ((margin.sign() + 1) / 2).mean(),
                  "margin_mean": margin.mean(), "margin_square": margin.square().mean(),
                  "ratio_w": ratios[0].mean(), "ratio_l": ratios[1].mean(), "clipped_share": clipped.float().mean()}


# --- what is told --------------------------------------------------------------------------------------------------

def round_statistics(comparisons: list[Comparison], progress: Progress, num_steps: int,
                     accelerator: Accelerator) -> dict[str, float]:
    """The round's share of pairs kept, over all and for each denoising step, and the scores' mean and their spread
    within a pool, over all devices; adds the counts to the epoch's. Every process must call this."""
    sums = torch.zeros(num_steps, 4)
    widest = 0.0
    for comparison in comparisons:
        scores = comparison.scores.float()
        sums[comparison.step] += torch.stack([torch.tensor(float(scores.shape[1])), comparison.kept.float().sum(),
                                              scores.mean(dim=0).sum(), scores.std(dim=0).sum()])
        difference = scores.amax(dim=0) - scores.amin(dim=0)
        widest = max(widest, float(torch.tanh(difference / 2).max()))
    sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    widest = float(accelerator.gather(torch.tensor([widest], device=accelerator.device)).max())

    compared, kept, score, spread = sums.sum(dim=0).tolist()
    progress.compared += int(compared)
    progress.kept += int(kept)
    progress.widest = max(progress.widest, widest)
    logs = {"spo/kept_share": kept / compared, "spo/score_mean": score / compared, "spo/score_spread": spread / compared,
            "spo/epoch": progress.epoch + 1}
    return logs | {f"spo/kept_share_step_{step:02d}": float(row[1] / row[0]) for step, row in enumerate(sums) if row[0]}


def no_pairs_message(args, progress: Progress, world: int) -> str:
    epoch = f"no pair of epoch {progress.epoch + 1} could be learned from"
    if progress.kept == 0:
        return (f"{epoch}: the best and worst of a pool never differed by more than --spo_threshold {args.spo_threshold:g} "
                f"in probability ({progress.widest:.3g} at most in {progress.compared} pools). Lower --spo_threshold "
                f"below {progress.widest:.3g}; the run ends here")
    return (f"{epoch}: {progress.kept} pairs were kept, but no round had one for each of the {world} devices. Lower "
            "--spo_threshold or raise --spo_sample_batch_size; the run ends here")


def summary(args, world: int, num_prompts: int, rounds: int) -> str:
    inner = f", {args.spo_num_inner_step} inner steps" if args.spo_num_inner_step else ""
    length = f"{args.max_train_steps} steps" if args.max_train_steps else f"{args.num_train_epochs} epochs"
    lines = {
        "method": f"spo, beta {args.spo_beta:g}, ratios clipped at 1 +- {args.spo_clip:g}",
        "base": f"{args.pretrained_model_name_or_path} ({'SDXL' if args.sdxl else 'SD1.5'}, {args.resolution} px)",
        "policy": f"LoRA rank {args.lora_rank}" if args.lora_rank else "whole UNet, float32 weights",
        "reference": "policy without adapter" if args.lora_rank else "frozen copy",
        "precision": f"{args.mixed_precision}, log-probabilities in float32",
        "sampling": f"{args.spo_num_steps} DDIM steps, eta {args.spo_eta:g}, guidance {args.spo_guidance:g}; pools of "
                    f"{args.spo_k} from step {args.spo_divert_start_step}{inner}, threshold {args.spo_threshold:g}",
        "judge": str(args.spm_checkpoint or args.spm_clip),
        "prompts": f"{num_prompts}, {world * args.spo_sample_batch_size} a round, {rounds} rounds an epoch",
        "batch": f"{world * args.train_batch_size * args.gradient_accumulation_steps} pairs a step = {world} device(s) x "
                 f"{args.train_batch_size} x {args.gradient_accumulation_steps} accumulated; {length}",
        "optimizer": f"{optimizer_name(args)}, learning rate {effective_learning_rate(args, world):.4g}, "
                     f"{args.lr_scheduler}",
        "seed": str(args.seed),
        "output": args.output_dir,
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in lines.items())
