"""SPO's online training: sample pairs from the policy's own denoising steps, learn from them, sample again.

A round samples spo_sample_batch_size prompts a device, gathers the kept pairs, deals them out evenly and takes the
optimizer steps they are enough for. train.py hands over to train() with --train_method spo. What is random follows from
(seed, epoch, prompt), so the number of devices changes nothing but rounding, and resuming needs a round's number alone.
"""

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

from losses.spo import clipped_ratio, ddim_gaussian, gaussian_log_prob, spo_loss
from spm.model import StepAwarePreferenceModel, load_spm, load_spm_tokenizer
from training.arguments import TrainArguments, warn
from training.checkpoints import (find_checkpoint, load_checkpoint, register_hooks, save_checkpoint, save_result,
                                  write_run_file)
from training.data import tokenize
from training.draws import epoch_order, seeded_generator
from training.guidance import PromptConditioning, condition_on_prompts, decode_latents, guided_prediction
from training.hub import push
from training.launch import COMPUTE_DTYPES, gradient_norm, identify_run, tracker_config
from training.logs import StepScalars, peak_memory_gb
from training.models import (Models, adapters_off, cast_compute_weights, load_frozen_encoders,
                             load_policy_and_reference, load_tokenizers_and_scheduler)
from training.optimizers import effective_learning_rate, make_optimizer, make_schedule, optimizer_name
from training.resampler import (Comparison, Pairs, ddim_scheduler, previous_timestep, prompt_generator, resample)
from training.spo_arguments import SPOArguments, check_spo_arguments, load_prompts, resampler_config
from training.validation import validate


@dataclass
class Progress:
    """Where a run stands; accelerate keeps it in every checkpoint. `round` is the epoch's next one; the others count
    the epoch's comparisons, kept pairs, pairs learned from, and its largest difference of probabilities in a pool."""

    epoch: int = 0
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


def train(args: TrainArguments, spo: SPOArguments, accelerator: Accelerator) -> None:
    """Run SPO from start, or from a checkpoint, to the saved result. Raises UserError."""
    # 1. The run. One namespace of options, so that run.json and the checkpoints record SPO's too.
    check_spo_arguments(args, spo)
    vars(args).update(asdict(spo))
    device, main_process, world = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    dtype = COMPUTE_DTYPES[args.mixed_precision]
    accelerator.gradient_accumulation_steps = 1  # take_step() weights its micro-batches by their size itself
    identify_run(args, accelerator)
    config = resampler_config(spo)

    # 2. Prompts and models: frozen encoders, policy, reference, and the preference model.
    models = load_tokenizers_and_scheduler(args)
    with accelerator.main_process_first():
        prompts = load_prompts(args, spo, args.seed)
    spm_tokenizer = load_spm_tokenizer(args.spm_tokenizer, args.cache_dir)
    spm = cast_compute_weights(load_spm(args.spm_clip, args.spm_checkpoint, args.cache_dir), dtype)
    spm.requires_grad_(False).eval().to(device)
    load_frozen_encoders(models, args, dtype, device)
    load_policy_and_reference(models, args, dtype, device)
    scheduler = ddim_scheduler(models.scheduler, config.num_steps)
    scale = 2 ** (len(models.vae.config.block_out_channels) - 1)
    latent_shape = (models.vae.config.latent_channels, args.resolution // scale, args.resolution // scale)

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
        load_checkpoint(accelerator, lr_scheduler, checkpoint, args)
    saved = validated = progress.step
    round_size = world * args.spo_sample_batch_size
    rounds = math.ceil(len(prompts) / round_size)
    if main_process:
        accelerator.init_trackers(args.tracker_project_name, tracker_config(args))
        print(f"Training\n{summary(args, world, len(prompts), rounds)}", flush=True)
        if checkpoint:
            print(f"  resuming   {checkpoint}, after step {progress.step}", flush=True)

    # 5. The loop: one round a turn.
    def finished() -> bool:
        if args.max_train_steps:
            return progress.step >= args.max_train_steps
        return progress.epoch >= args.num_train_epochs

    bar = tqdm(initial=progress.step, total=args.max_train_steps or None, unit="step", dynamic_ncols=True,
               disable=not accelerator.is_local_main_process)
    while not finished():
        bar.set_description(f"spo epoch {progress.epoch + 1} round {progress.round + 1}/{rounds}")
        order = epoch_order(len(prompts), args.seed, progress.epoch, shuffle=True)
        chosen = order[progress.round * round_size:(progress.round + 1) * round_size]
        conditioning = condition_on_prompts(models, args, [prompts[i] for i in chosen], device)

        own = torch.tensor(np.array_split(np.arange(len(chosen)), world)[accelerator.process_index], device=device)
        generators = [prompt_generator(args.seed, progress.epoch, int(chosen[i])) for i in own.tolist()]
        with torch.no_grad(), accelerator.autocast():
            text = tokenize(spm_tokenizer, [prompts[chosen[i]] for i in own.tolist()] or [""]).to(device)
            text_features = spm.text_features(text)
        predict, score = sampling_functions(unwrapped, models.vae, spm, conditioning, own, text_features,
                                            args.spo_guidance, accelerator)
        if generators:
            pairs, comparisons = resample(predict, score, scheduler, config, generators, latent_shape, device)
            pairs.prompt = own[pairs.prompt]
        else:  # the last round of an epoch may have fewer prompts than devices
            pairs, comparisons = Pairs.none(latent_shape, config, device), []
        logs = round_statistics(comparisons, progress, config.num_steps, accelerator)
        pairs = deal_out(pairs, args.seed, progress, accelerator)
        progress.learned += len(pairs) * world
        accelerator.log(logs | {"spo/pairs": len(pairs) * world}, step=progress.step)

        scalars = StepScalars()
        group_size = args.train_batch_size * args.gradient_accumulation_steps
        for start in range(0, len(pairs), group_size):
            if args.max_train_steps and progress.step >= args.max_train_steps:
                break
            group = pairs[start:start + group_size]
            for micro_batch, weight, context in micro_batches(group, args.train_batch_size, policy, accelerator):
                with context:
                    loss, step_logs = pair_loss(policy, unwrapped, models, conditioning, micro_batch, scheduler, args,
                                                accelerator)
                    accelerator.backward(loss * weight)
                    scalars.add(step_logs)
            grad_norm = gradient_norm(accelerator, policy, trainable, args)
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            step_logs = scalars.reduce(accelerator, grad_norm=grad_norm)
            step_logs |= {"lr": lr_scheduler.get_last_lr()[0], "peak_memory_gb": peak_memory_gb(device)}
            accelerator.log(step_logs, step=progress.step)
            bar.update()
            bar.set_postfix(loss=f"{step_logs['train_loss']:.4g}", acc=f"{step_logs['implicit_acc_accumulated']:.3g}",
                            kept=f"{logs['spo/kept_share']:.2g}")

        progress.round += 1
        if progress.round == rounds:
            if progress.learned == 0:
                if main_process:
                    warn(no_pairs_message(args, progress, world))
                break
            progress.next_epoch()
        if args.checkpointing_steps and progress.step // args.checkpointing_steps > saved // args.checkpointing_steps:
            if not finished():
                save_checkpoint(accelerator, policy, lr_scheduler, progress.step, args)
                saved = progress.step
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
            save_checkpoint(accelerator, policy, lr_scheduler, progress.step, args)
        save_result(accelerator, policy, args)
    accelerator.end_training()
    if main_process:
        if progress.step == 0:
            print("Done: nothing was learned, so nothing was written", flush=True)
            return
        print(f"Done: {Path(args.output_dir, 'unet.pth')} and a diffusers pipeline in {args.output_dir}", flush=True)
        if args.push_to_hub:
            print(f"Published at {push(args)}", flush=True)


def sampling_functions(unet, vae, spm: StepAwarePreferenceModel, conditioning: PromptConditioning, own: Tensor,
                       text_features: Tensor, guidance: float, accelerator: Accelerator):
    """The resampler's predict and score. own: (b,) this device's rows of `conditioning`; text_features: (b, D)."""

    def predict(latents: Tensor, t: int, rows: Tensor) -> Tensor:
        times = torch.full((len(latents),), t, device=latents.device)
        with accelerator.autocast():
            return guided_prediction(unet, latents, times, conditioning, own[rows], guidance)

    def score(latents: Tensor, t: int, rows: Tensor) -> Tensor:
        times = torch.full((len(latents),), t, device=latents.device)
        pixels = decode_latents(vae, latents)
        with accelerator.autocast():
            return spm.score(pixels, times, text_features[rows])

    return predict, score


def deal_out(pairs: Pairs, seed: int, progress: Progress, accelerator: Accelerator) -> Pairs:
    """Gather every device's pairs, shuffle them with one permutation and give each device the same number.

    Every process must call this. Pairs beyond a multiple of the number of devices are dropped; with fewer pairs than
    devices all get none.
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


def micro_batches(group: Pairs, size: int, policy, accelerator: Accelerator):
    """(micro-batch, its share of the group's pairs, context); gradients are exchanged in the last context only."""
    starts = range(0, len(group), size)
    for start in starts:
        micro_batch = group[start:start + size]
        context = nullcontext() if start == starts[-1] else accelerator.no_sync(policy)
        yield micro_batch, len(micro_batch) / len(group), context


def pair_loss(policy, unwrapped, models: Models, conditioning: PromptConditioning, pairs: Pairs,
              scheduler: DDIMScheduler, args, accelerator: Accelerator) -> tuple[Tensor, dict[str, Tensor]]:
    """SPO's loss of N pairs and what is logged about it. Where winner and loser share x_t, so do they the prediction."""
    members = pairs.x_t.shape[1]
    timesteps = scheduler.timesteps.to(pairs.step.device)[pairs.step]

    def log_probs(unet) -> tuple[Tensor, Tensor]:
        times = timesteps.repeat_interleave(members)
        x_t = pairs.x_t.flatten(0, 1)
        with accelerator.autocast():
            prediction = guided_prediction(unet, x_t, times, conditioning, pairs.prompt.repeat_interleave(members),
                                           args.spo_guidance)
        mean, std, _ = ddim_gaussian(prediction, x_t, times, previous_timestep(scheduler, times),
                                     scheduler.alphas_cumprod, args.spo_eta, scheduler.config.prediction_type)
        mean, std = (tensor.unflatten(0, (len(pairs), members)) for tensor in (mean, std))
        return tuple(gaussian_log_prob(pairs.x_next[:, i], mean[:, i % members], std[:, 0]) for i in (0, 1))

    with torch.no_grad():
        if models.reference is not None:
            reference_w, reference_l = log_probs(models.reference)
        else:
            with adapters_off(unwrapped):
                reference_w, reference_l = log_probs(unwrapped)
    policy_w, policy_l = log_probs(policy)
    ratio_w = clipped_ratio(policy_w, reference_w, args.spo_clip)
    ratio_l = clipped_ratio(policy_l, reference_l, args.spo_clip)
    loss = spo_loss(ratio_w, ratio_l, args.spo_beta)

    ratios = torch.stack([ratio_w, ratio_l]).detach()
    margin = args.spo_beta * (ratios[0].log() - ratios[1].log())
    clipped = (ratios <= 1 - args.spo_clip) | (ratios >= 1 + args.spo_clip)
    return loss, {"train_loss": loss.detach(), "implicit_acc_accumulated": ((margin.sign() + 1) / 2).mean(),
                  "margin_mean": margin.mean(), "margin_square": margin.square().mean(),
                  "ratio_w": ratios[0].mean(), "ratio_l": ratios[1].mean(), "clipped_share": clipped.float().mean()}


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
