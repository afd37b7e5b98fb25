"""Preference optimisation of a text-to-image diffusion model: Diffusion-DPO, DSPO, DMPO, with or without the
winner-preserving safeguard (Diffusion-SDPO), supervised fine-tuning on winners, and SPO.

    accelerate launch train.py --config configs/train/sd15_diffusion_dpo.yaml [flags that win over the file]

It reads from top to bottom: arguments, data, models, optimizer, resume, loop, result. The mathematics is in losses/.
"""

import math
import sys
from pathlib import Path

import datasets
import diffusers
import transformers
from accelerate import Accelerator
from tqdm.auto import tqdm

import spo.task
from losses import preference_loss
from training.options import TrainArguments, names_given, parse_arguments
from common.errors import run_program, warn
from training.checkpoints import (find_checkpoint, load_checkpoint, register_hooks, save_checkpoint,
                                  read_progress, save_result, write_run_file)
from data.cached import CachedDataset, check_cache
from data.pairs import PairDataset, choose_pairs, load_rows, make_loader
from models.stable_diffusion import noisy_batch, predict, predict_reference
from training.guards import Guards
from training.hub import push
from training.run import (COMPUTE_DTYPES, gradient_norm, identify_run, start_accelerator, take_step,
                             tracker_config)
from training.records import MetricsFile, StepScalars, Throughput, bar_interval, peak_memory_gb
from models.policy import (is_refiner, is_turbo, load_frozen_encoders, load_policy_and_reference,
                             load_tokenizers_and_scheduler)
from training.optimizers import effective_learning_rate, make_optimizer, make_schedule, optimizer_name
from training.parameter_space import backward_in_parameter_space, check_whole_gradients
from data.labels import ai_feedback_labels
from common.signals import StopSignal
from spo.options import SPOArguments, warn_of_spo_flags
from training.validation import validate


def summary(args: TrainArguments, accelerator: Accelerator, pairs, lr: float, max_steps: int) -> str:
    per_step = accelerator.num_processes * args.train_batch_size * args.gradient_accumulation_steps
    safeguard = "off"
    if args.use_winner_preserving:
        safeguard = f"mu {args.winner_preserving_mu}, one lambda a {args.winner_preserving_granularity}, {args.winner_preserving_space} space"
    reference = "none" if not args.needs_reference else "policy without adapter" if args.lora_rank else "frozen copy"
    lines = {
        "method": f"{args.train_method}, beta {args.beta_dpo:g}, safeguard {safeguard}",
        "base": f"{args.pretrained_model_name_or_path} ({'SDXL' if args.sdxl else 'SD1.5'}, {args.resolution} px"
                f"{', turbo: four timesteps' * is_turbo(args)}{', refiner: low timesteps' * is_refiner(args)})",
        "policy": f"LoRA rank {args.lora_rank}" if args.lora_rank else "whole UNet, float32 weights",
        "reference": reference,
        "precision": f"{args.mixed_precision}, errors in float32",
        "pairs": "; ".join([f"{len(pairs)} of {args.data_source or args.cached_dataset}", *pairs.notes]
                           + [f"encoded in {args.cached_dataset}"] * bool(args.cached_dataset)),
        "batch": f"{per_step} pairs a step = {accelerator.num_processes} device(s) x {args.train_batch_size} x "
                 f"{args.gradient_accumulation_steps} accumulated",
        "steps": f"{max_steps}, {max_steps * per_step / len(pairs):.2f} passes over the pairs",
        "optimizer": f"{optimizer_name(args)}, learning rate {lr:.4g} after scaling, {args.lr_scheduler}, "
                     f"{args.lr_warmup_steps} warm-up steps",
        "seed": str(args.seed),
        "output": args.output_dir,
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in lines.items())


def train(args: TrainArguments, accelerator: Accelerator, stop: StopSignal) -> None:
    # 1. This process, and the run it belongs to.
    device, main_process = accelerator.device, accelerator.is_main_process
    compute_dtype = COMPUTE_DTYPES[args.mixed_precision]
    identify_run(args, accelerator)
    if args.safeguards_parameters:
        check_whole_gradients(accelerator)

    # 2. Preference pairs, before any large model is read.
    models = load_tokenizers_and_scheduler(args)
    cache = CachedDataset(args.cached_dataset) if args.cached_dataset else None
    with accelerator.main_process_first():
        table, images = load_rows(args, cache)
    labels = ai_feedback_labels(images, args, accelerator) if args.choice_model else None
    pairs = choose_pairs(table, args, args.seed, labels)

    # 3. Models: frozen encoders, policy, and the reference it is compared with.
    if cache:
        check_cache(cache, models, args, pairs.image_columns, compute_dtype)
    else:
        load_frozen_encoders(models, args, compute_dtype, device)
    load_policy_and_reference(models, args, compute_dtype, device)
    dataset = PairDataset(pairs, models.tokenizers, args, args.seed, models.latent_shape, cache)

    # 4. Optimizer and schedule.
    pairs_per_step = accelerator.num_processes * args.train_batch_size * args.gradient_accumulation_steps
    if pairs_per_step > len(pairs):
        warn(f"a step takes {pairs_per_step} pairs, and there are {len(pairs)}: lower --gradient_accumulation_steps "
             "or --train_batch_size")
    max_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(pairs) / pairs_per_step)
    lr = effective_learning_rate(args, accelerator.num_processes)
    trainable = [parameter for parameter in models.policy.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trainable, args, lr)
    lr_scheduler = make_schedule(optimizer, args, max_steps)
    policy, optimizer = accelerator.prepare(models.policy, optimizer)
    unwrapped = accelerator.unwrap_model(policy)

    # 5. Continue where a checkpoint ended, or start.
    write_run_file(args, accelerator)
    register_hooks(accelerator, lora=args.lora_rank > 0)
    checkpoint = find_checkpoint(args, accelerator)
    first_step = load_checkpoint(accelerator, lr_scheduler, checkpoint, args) if checkpoint else 0
    record = read_progress(checkpoint)["record"] if checkpoint else {}
    guards = Guards(accelerator, args, dataset, stop, pairs_per_step, first_step, record)
    if main_process:
        accelerator.init_trackers(args.tracker_project_name, tracker_config(args))
        print(f"Training\n{summary(args, accelerator, pairs, lr, max_steps)}", flush=True)
        if checkpoint:
            print(f"  resuming   {checkpoint}, after step {first_step}", flush=True)
    loader = make_loader(dataset, args, accelerator.process_index, accelerator.num_processes, first_step, max_steps,
                         pin_memory=device.type == "cuda", pairs_seen=guards.pairs_seen)
    micro_batches = iter(loader)

    # 6. The loop: one optimizer step a turn.
    loss_config, metrics = args.loss_config(), MetricsFile(args.output_dir, first_step)
    scalars, throughput, saved_step = StepScalars(), Throughput(pairs_per_step), first_step if checkpoint else -1
    bar = tqdm(range(first_step, max_steps), initial=first_step, total=max_steps, desc=args.train_method, unit="step",
               disable=not accelerator.is_local_main_process, dynamic_ncols=True, mininterval=bar_interval())
    for step in bar:
        for _ in range(args.gradient_accumulation_steps):
            batch = guards.receive(next(micro_batches))
            with accelerator.accumulate(policy):
                inputs = noisy_batch(batch, models, args)
                with accelerator.autocast():
                    ref_pred = predict_reference(models, unwrapped, inputs) if args.needs_reference else None
                with accelerator.autocast():  # a context of its own: weights that the first one cast carry no gradient
                    model_pred = predict(policy, inputs)
                if args.safeguards_parameters:
                    result = backward_in_parameter_space(accelerator, trainable, model_pred, ref_pred, inputs.target,
                                                         loss_config)
                else:
                    result = preference_loss(model_pred, ref_pred, inputs.target, loss_config)
                    accelerator.backward(result.loss)
                scalars.add(result.logs)
                guards.note(inputs.timesteps, result)
        done = step + 1
        grad_norm = gradient_norm(accelerator, policy, args)
        logs = scalars.reduce(accelerator, grad_norm=grad_norm, **guards.flags())
        finite = guards.settle_together(done, logs)
        take_step(accelerator, optimizer, lr_scheduler, finite)

        logs |= {"lr": lr_scheduler.get_last_lr()[0], "pairs_per_second": throughput(),
                 "peak_memory_gb": peak_memory_gb(device)}
        accelerator.log(logs, step=done)
        if main_process:
            metrics.append(done, logs)
        bar.set_postfix(shown_in_bar(logs), refresh=False)

        if args.checkpointing_steps and done % args.checkpointing_steps == 0 and done < max_steps:
            save_checkpoint(accelerator, policy, lr_scheduler, done, args, record=guards.record())
            saved_step = done
            throughput.restart()
        stop_at = guards.stop_after(done)
        if stop_at is not None and (stop_at < max_steps or not finite):
            if saved_step != stop_at:
                save_checkpoint(accelerator, policy, lr_scheduler, stop_at, args, record=guards.record(done - stop_at))
            accelerator.end_training()
            return guards.end_run(Path(args.output_dir, f"checkpoint-{stop_at}"))
        if args.validation_prompts and (done % args.validation_steps == 0 or done == max_steps):
            if main_process:
                validate(models, unwrapped, args, accelerator, done)
            accelerator.wait_for_everyone()
            throughput.restart()

    # 7. The result: a last checkpoint, unet.pth, and a pipeline that diffusers opens.
    if saved_step < max_steps:
        save_checkpoint(accelerator, policy, lr_scheduler, max_steps, args, record=guards.record())
    save_result(accelerator, policy, args)
    accelerator.end_training()
    if main_process:
        print(f"Done: {Path(args.output_dir, 'unet.pth')} and a diffusers pipeline in {args.output_dir}", flush=True)
        if args.push_to_hub:
            print(f"Published at {push(args)}", flush=True)


def shown_in_bar(logs: dict[str, float]) -> dict[str, str]:
    names = {"train_loss": "loss", "implicit_acc_accumulated": "acc", "avg_lose_l_scale": "lambda",
             "pairs_per_second": "pairs/s"}
    return {short: f"{logs[name]:.4g}" for name, short in names.items() if name in logs}


def main() -> None:
    for library in (datasets, diffusers.utils.logging, transformers.utils.logging):
        (getattr(library, "disable_progress_bar", None) or library.disable_progress_bars)()  # ours is the run's
    args, spo = parse_arguments(None, SPOArguments)
    if args.train_method != "spo":
        warn_of_spo_flags(names_given(sys.argv))
    accelerator = start_accelerator(args, args.process_timeout)
    with StopSignal() as stop:
        if args.train_method == "spo":  # online: it samples its pairs itself, from prompts
            spo.task.train(args, spo, accelerator, stop)
        else:
            train(args, accelerator, stop)


if __name__ == "__main__":
    run_program(main)
