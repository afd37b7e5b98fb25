"""SPO beside the offline methods at equal time on the shapes world: is it faster, and does the safeguard carry over?

    bash scripts/compare_spo.sh [--smoke] [options]

A step-aware preference model is trained on drawn pairs by `python -m spo.preference_model.train`. Then every method trains the same base
for the same processor time of one core (reading models and judging images apart), the whole UNet, with train.py's own
functions: the offline ones on pairs that the base drew and the oracle ranked, SPO on its own samples. Every few seconds
the images for fixed prompts, whose captions the base was never trained on, are judged by the oracle.

Variants of SPO: "spo" as published; "spo, oracle judge" scores the pools by the oracle itself, the most that a better
preference model could give; "spo, winners only" takes no gradient through the losers, the safeguard's extreme
(lambda 0). How far the safeguard would act on SPO's pairs at mu = 0.9 is measured on the way.

A method's rate is the one of the grid whose images have the highest mean score over the second half of the time, with
seed 0 and selection prompts; the table is of other seeds and other prompts.
OUTPUT/runs/NAME.json holds a run; a second call goes on where the first ended. OUTPUT/spo.md and spo.png are the report.
"""

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, HfArgumentParser

from losses import preference_loss
from losses.spo import clipped_ratio, ddim_gaussian, spo_loss
from shapes.base import sample_drawing
from shapes.drawing import caption
from shapes.oracle import judge
from shapes.pairs import write_pairs
from shapes.pipeline import GUIDANCE_SCALE, NOISE_OFFSET, base_pipeline, clip_tokenizer, draw_images, text_config
from shapes.preferences import write_preferences
from common.train_options import TrainArguments, parse_words
from data.pairs import PairDataset, choose_pairs, load_table, make_loader
from models.stable_diffusion import noisy_batch, predict, predict_reference
from data.draws import epoch_order
from common.errors import run_program
from models.guidance import condition_on_prompts, guided_prediction
from models.policy import load_frozen_encoders, load_policy_and_reference, load_tokenizers_and_scheduler
from training.optimizers import make_optimizer
from spo.resampler import ddim_scheduler, previous_timestep
from spo.task import Judge, Progress, deal_out, learn_from, load_judge, pair_log_probs, sample_pairs
from spo.options import SPOArguments

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend first)

OFFLINE = {  # the published settings
    "sft": dict(train_method="sft"),
    "diffusion-dpo": dict(train_method="diffusion-dpo", beta_dpo=5000.0, use_winner_preserving=True,
                          winner_preserving_mu=0.9),
    "dspo": dict(train_method="dspo", beta_dpo=0.001, use_winner_preserving=True, winner_preserving_mu=0.2),
    "dmpo": dict(train_method="dmpo", beta_dpo=2000.0, dmpo_alpha=0.01, use_winner_preserving=True,
                 winner_preserving_mu=0.9),
}
ONLINE = ("spo", "spo, oracle judge", "spo, winners only")
ORACLE_SCALE = 20.0  # turns the oracle's score in [0, 1] into a logit


@dataclass
class Settings:
    output: str = field(default="output/spo", metadata={"help": "folder for runs and report"})
    base: str | None = field(default=None, metadata={"help": "another pipeline than the shapes world's base"})
    smoke: bool = field(default=False, metadata={"help": "tiny budgets: does everything run?"})
    seconds: float = field(default=90.0, metadata={"help": "processor seconds of training of each run"})
    points: int = field(default=6, metadata={"help": "judgements of each run, evenly over its time"})
    seeds: int = field(default=2, metadata={"help": "final runs of each method"})
    offline_rates: list[float] = field(default_factory=lambda: [5e-6, 2e-5, 8e-5], metadata={"help": "the grid"})
    spo_rates: list[float] = field(default_factory=lambda: [5e-6, 2e-5, 8e-5], metadata={"help": "SPO's grid"})
    prompts: int = field(default=64, metadata={"help": "prompts judged, for selection and for the table each"})
    pairs: int = field(default=400, metadata={"help": "pairs for the offline methods"})
    spm_pairs: int = field(default=4000, metadata={"help": "pairs for the step-aware preference model"})
    spm_steps: int = field(default=1500, metadata={"help": "its optimizer steps"})
    spo_prompts: int = field(default=8, metadata={"help": "prompts that SPO samples at once"})
    inference_steps: int = field(default=20, metadata={"help": "DDIM steps of each judged image"})
    workers: int = field(default=2, metadata={"help": "runs at a time, one thread each"})

    def __post_init__(self):
        if self.smoke:
            self.seconds, self.points, self.seeds, self.prompts, self.pairs = 6.0, 2, 1, 4, 16
            self.spm_pairs, self.spm_steps, self.spo_prompts, self.inference_steps = 32, 2, 1, 4
            self.offline_rates, self.spo_rates = self.offline_rates[1:2], self.spo_rates[1:2]


@dataclass(frozen=True)
class Run:
    method: str
    learning_rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.method}_lr{self.learning_rate:g}_seed{self.seed}".replace(", ", "-").replace(" ", "-")


def base_folder(settings: Settings) -> str:
    return settings.base or str(base_pipeline())


# --- what all runs share -------------------------------------------------------------------------------------------------

def prepare(settings: Settings) -> None:
    """Prompts, the offline pairs and the step-aware preference model; with the time that each took."""
    output, times = Path(settings.output), {}
    output.mkdir(parents=True, exist_ok=True)
    prompts = {}
    for split, count, unseen in (("train", 2000, False), ("selection", settings.prompts, True),
                                 ("test", settings.prompts, True)):
        rng = random.Random(f"{split} prompts")
        prompts[split] = list(dict.fromkeys(caption(sample_drawing(rng, unseen)) for _ in range(count)))
    (output / "prompts.json").write_text(json.dumps(prompts, indent=1))

    start = time.process_time()
    if settings.base:
        write_pairs(output / "pairs", settings.pairs, seed=1, resolution=32)
    else:
        write_preferences(output / "pairs", settings.pairs, seed=1, num_inference_steps=settings.inference_steps)
    times["pairs"] = time.process_time() - start

    judge_folder = output / "clip"
    make_clip(judge_folder)
    drawn = write_pairs(output / "spm_pairs", settings.spm_pairs, seed=2, resolution=32)
    held_out = write_pairs(output / "spm_held_out", max(16, settings.spm_pairs // 10), seed=3, resolution=32)
    for file in held_out.glob("train-*.parquet"):
        file.rename(drawn / file.name.replace("train", "validation"))
    start = os.times()
    subprocess.run(
        [sys.executable, "-m", "spo.preference_model.train", "--pretrained_model_name_or_path", base_folder(settings), "--train_data_dir",
         str(drawn), "--validation_split", "validation", "--resolution", "32", "--spm_clip", str(judge_folder),
         "--spm_tokenizer", str(judge_folder), "--guidance", str(GUIDANCE_SCALE), "--learning_rate", "5e-4",
         "--adam_weight_decay", "0.01", "--lr_warmup_steps", str(settings.spm_steps // 10), "--max_train_steps",
         str(settings.spm_steps), "--train_batch_size", "16", "--validation_steps", str(settings.spm_steps),
         "--checkpointing_steps", "0", "--mixed_precision", "no", "--report_to", "none", "--seed", "0", "--output_dir",
         str(output / "spm")], check=True)
    end = os.times()
    times["spm"] = end.children_user + end.children_system - start.children_user - start.children_system
    write_json(output / "prepared.json", times)


def make_clip(folder: Path) -> None:
    """A small CLIP that knows nothing yet, in PickScore's place: 32x32 images in patches of 4."""
    torch.manual_seed(0)
    vision = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=32,
                  patch_size=4)
    CLIPModel(CLIPConfig(text_config=text_config(64, 2).to_dict(), vision_config=vision, projection_dim=64,
                         logit_scale_init_value=2.3)).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)


class OracleModel:
    """The oracle in the step-aware preference model's place: it reads the prompt back from its tokens."""

    image_size = 32  # of the world's images: they are not resized

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def text_features(self, input_ids: Tensor) -> Tensor:
        self.prompts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return torch.arange(len(input_ids))

    def score(self, pixels: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        images = StableDiffusionPipeline.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())
        return torch.tensor([ORACLE_SCALE * judge(image, self.prompts[row].strip()).score
                             for image, row in zip(images, rows.tolist())])


# --- one run -------------------------------------------------------------------------------------------------------------

class Clock:
    """Processor seconds of this process since the clock was made, without those excluded."""

    def __init__(self):
        self.start = time.process_time()

    def __call__(self) -> float:
        return time.process_time() - self.start

    def exclude(self, seconds: float) -> None:
        self.start += seconds


def judge_policy(unet, pipeline: StableDiffusionPipeline, prompts: list[str], settings: Settings) -> float:
    """Mean oracle score of one image for each prompt."""
    pipeline.unet = unet
    images = draw_images(pipeline, prompts, 0, settings.inference_steps)
    return float(np.mean([judge(image, prompt).score for image, prompt in zip(images, prompts)]))


def train_run(run: Run, settings: Settings) -> dict:
    """Train for settings.seconds; returns the curve [(seconds, steps, score)] and, for SPO, what was seen of its pairs."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    accelerator = Accelerator(cpu=True)
    args = make_arguments(run, settings)
    models = load_tokenizers_and_scheduler(args)
    load_frozen_encoders(models, args, torch.float32, accelerator.device)
    load_policy_and_reference(models, args, torch.float32, accelerator.device)
    optimizer = make_optimizer(list(models.policy.parameters()), args, run.learning_rate)
    steps = spo_steps if run.method in ONLINE else offline_steps
    prompts = json.loads(Path(settings.output, "prompts.json").read_text())[run.split]
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder(settings))

    curve, seen = [(0.0, 0, judge_policy(models.policy, pipeline, prompts, settings))], []
    clock, count = Clock(), 0
    for about_pairs in steps(run, models, args, settings, accelerator):
        if about_pairs is not None:
            torch.nn.utils.clip_grad_norm_(models.policy.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            count += 1
            seen.append(about_pairs)
        if clock() >= settings.seconds * len(curve) / settings.points:
            seconds, before = clock(), time.process_time()
            curve.append((seconds, count, judge_policy(models.policy, pipeline, prompts, settings)))
            clock.exclude(time.process_time() - before)
            if len(curve) > settings.points:
                break
    summary = {name: float(np.mean([about[name] for about in seen])) for name in seen[0]} if seen else {}
    return asdict(run) | {"curve": curve, "pairs": summary}


def make_arguments(run: Run, settings: Settings):
    args = TrainArguments(pretrained_model_name_or_path=base_folder(settings), resolution=32, mixed_precision="no",
                          train_data_dir=str(Path(settings.output, "pairs")), train_batch_size=8, seed=run.seed,
                          noise_offset=NOISE_OFFSET,
                          max_train_steps=10**6, **(OFFLINE.get(run.method) or {"train_method": "spo"}))
    if run.method in ONLINE:
        clip = str(Path(settings.output, "clip"))
        checkpoint = str(Path(settings.output, "spm", "step-aware_preference_model.bin"))
        vars(args).update(asdict(SPOArguments(
            spo_guidance=GUIDANCE_SCALE, spo_sample_batch_size=settings.spo_prompts, spm_clip=clip, spm_tokenizer=clip,
            spm_checkpoint=checkpoint)))
    return args


def offline_steps(run, models, args, settings, accelerator):
    """Leaves the gradient of one batch of pairs at each turn; yields what is told about the pairs."""
    pairs = choose_pairs(load_table(args), args, run.seed)
    dataset = PairDataset(pairs, models.tokenizers, args, run.seed, models.latent_shape)
    loader = make_loader(dataset, args, 0, 1, 0, args.max_train_steps, pin_memory=False)
    for batch in loader:
        inputs = noisy_batch({name: value for name, value in batch.items()}, models, args)
        reference = predict_reference(models, models.policy, inputs) if args.needs_reference else None
        preference_loss(predict(models.policy, inputs), reference, inputs.target, args.loss_config()).loss.backward()
        yield {}


def spo_steps(run, models, args, settings, accelerator):
    """Samples rounds, and leaves the gradient of one group of pairs at each turn; None for a round without pairs."""
    prompts = json.loads(Path(settings.output, "prompts.json").read_text())["train"]
    scheduler, progress = ddim_scheduler(models.scheduler, args.spo_num_steps), Progress()
    judge_model = load_judge(args, accelerator.device)
    if run.method == "spo, oracle judge":
        judge_model = Judge(OracleModel(judge_model.tokenizer), judge_model.tokenizer)
    while True:
        order = epoch_order(len(prompts), run.seed, progress.epoch, shuffle=True)
        chosen = order[progress.round * settings.spo_prompts:(progress.round + 1) * settings.spo_prompts]
        conditioning = condition_on_prompts(models, args, [prompts[i] for i in chosen], accelerator.device)
        pairs, comparisons = sample_pairs(models.policy, models, judge_model, scheduler, conditioning, prompts, chosen,
                                          progress, args, accelerator)
        pairs = deal_out(pairs, run.seed, progress, accelerator)
        kept = float(np.mean([comparison.kept.float().mean() for comparison in comparisons]))
        for start in range(0, len(pairs), args.train_batch_size):
            group = pairs[start:start + args.train_batch_size]
            about = {"kept_share": kept} | overlap(models.policy, group, conditioning, scheduler, args)
            if run.method == "spo, winners only":
                winners_only_gradient(models, group, conditioning, scheduler, args, accelerator)
            else:
                learn_from(group, models.policy, models.policy, models, conditioning, scheduler, args, accelerator)
            yield about
        if len(pairs) == 0:
            yield None
        progress.round += 1
        if progress.round * settings.spo_prompts >= len(prompts):
            progress.next_epoch()


def winners_only_gradient(models, pairs, conditioning, scheduler, args, accelerator) -> None:
    """SPO's gradient with lambda = 0: the loser weighs the pair, but nothing flows through it."""
    setting = pairs, conditioning, scheduler, args, accelerator
    with torch.no_grad():
        reference_w, reference_l = pair_log_probs(models.reference, *setting)
    policy_w, policy_l = pair_log_probs(models.policy, *setting)
    spo_loss(clipped_ratio(policy_w, reference_w, args.spo_clip),
             clipped_ratio(policy_l.detach(), reference_l, args.spo_clip), args.spo_beta).backward()


@torch.no_grad()
def overlap(policy, pairs, conditioning, scheduler, args, mu: float = 0.9) -> dict[str, float]:
    """What the safeguard would do to these pairs, winner and loser sharing x_t.

    The gradients of -log p with respect to the shared prediction are proportional to the residuals m - x_w and m - x_l, so
    that a pair's lambda is (1 - mu) |r_w|^2 / <r_w, r_l>, where that is positive, clamped to [0, 1].
    """
    times = scheduler.timesteps[pairs.step]
    x_t = pairs.x_t[:, 0]
    prediction = guided_prediction(policy, x_t, times, conditioning, pairs.prompt, args.spo_guidance)
    mean, _, _ = ddim_gaussian(prediction, x_t, times, previous_timestep(scheduler, times), scheduler.alphas_cumprod,
                               args.spo_eta, scheduler.config.prediction_type)
    winner, loser = ((mean - pairs.x_next[:, i]).flatten(1) for i in (0, 1))
    inner = (winner * loser).sum(1)
    scale = torch.where(inner > 0, (1 - mu) * winner.square().sum(1) / inner, 1.0).clamp(0, 1)
    return {"cosine": float((inner / (winner.norm(dim=1) * loser.norm(dim=1))).mean()), "lambda": float(scale.mean()),
            "lambda_below_one": float((scale < 1).float().mean())}


# --- the experiment --------------------------------------------------------------------------------------------------------

def write_json(path: Path, record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(record, indent=1))
    os.replace(aside, path)


def do(run: Run, settings: Settings) -> None:
    write_json(Path(settings.output, "runs", f"{run.name}.json"), train_run(run, settings))


def do_all(runs: list[Run], settings: Settings, pool: ProcessPoolExecutor) -> list[dict]:
    """Do the runs that are not done yet; returns all their records."""
    paths = [Path(settings.output, "runs", f"{run.name}.json") for run in runs]
    for future in [pool.submit(do, run, settings) for run, path in zip(runs, paths) if not path.is_file()]:
        future.result()
    return [json.loads(path.read_text()) for path in paths]


def late_score(record: dict) -> float:
    """Mean score over the second half of the time: less noisy than the last judgement."""
    scores = [score for _, _, score in record["curve"][1:]]
    return float(np.mean(scores[len(scores) // 2:]))


def rates(method: str, settings: Settings) -> list[float]:
    return settings.spo_rates if method in ONLINE else settings.offline_rates


def report(settings: Settings, chosen: dict[str, float], records: list[dict], minutes: float) -> str:
    """Table and plot of the final runs; returns the text of spo.md."""
    output = Path(settings.output)
    prepared = json.loads((output / "prepared.json").read_text())
    accuracies = json.loads((output / "spm" / "accuracy.json").read_text())
    base = float(np.mean([record["curve"][0][2] for record in records]))
    lines = ["| method | learning rate | steps | oracle score at the end | best | seconds to Diffusion-DPO's end score |",
             "|---|---|---|---|---|---|"]
    curves = {}
    for method in chosen:
        own = [record for record in records if record["method"] == method]
        curves[method] = np.mean([[point[2] for point in record["curve"]] for record in own], axis=0)
    goal = late_score({"curve": [(0, 0, score) for score in curves["diffusion-dpo"]]})
    times = np.linspace(0, settings.seconds, settings.points + 1)
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for method, curve in curves.items():
        own = [record for record in records if record["method"] == method]
        ends = [late_score(record) for record in own]
        reached = next((f"{t:.0f}" for t, score in zip(times, curve) if score >= goal and t > 0), "not reached")
        spread = f" +- {np.std(ends, ddof=1):.3f}" if len(ends) > 1 else ""
        lines.append(f"| {method} | {chosen[method]:g} | {np.mean([r['curve'][-1][1] for r in own]):.0f} | "
                     f"{np.mean(ends):.3f}{spread} | {curve.max():.3f} | {reached} |")
        axes.plot(times, curve, marker="o", label=method, linestyle="-" if method in ONLINE else "--")
    axes.axhline(base, color="grey", linewidth=0.8, label="base")
    axes.set(xlabel="processor seconds of training", ylabel="mean oracle score", title="Shapes world: quality over time")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output / "spo.png", dpi=150)

    shared = [record["pairs"] for record in records if record["method"] == "spo" and record["pairs"]]
    safeguard = ({name: float(np.mean([pairs[name] for pairs in shared])) for name in shared[0]} if shared else {})
    text = "\n".join([
        "# SPO beside the offline methods on the shapes world", "",
        f"Base: {base:.3f}. {settings.seconds:.0f} processor seconds a run, {settings.seeds} seed(s), {settings.prompts} "
        f"prompts of held-out captions; \"at the end\" is the mean over the second half of the time. "
        f"{minutes:.0f} minutes in all.", "", *lines, "",
        f"Not in these times: the step-aware preference model took {prepared['spm']:.0f} processor seconds, drawing and "
        f"ranking the offline pairs {prepared['pairs']:.0f}.", "",
        "The step-aware preference model's accuracy on held-out pairs, before and after its training: "
        + "; ".join(f"t={key.removeprefix('accuracy_t')} {accuracies[0][key]:.2f} -> {accuracies[-1][key]:.2f}"
                    for key in accuracies[-1] if key != "step") + ".", ""]
        + ([f"The safeguard on SPO's pairs (mu 0.9): mean cosine of winner's and loser's gradient {safeguard['cosine']:.4f}, "
            f"mean lambda {safeguard['lambda']:.4f}, lambda below 1 in {safeguard['lambda_below_one']:.2%} of the pairs; "
            f"{safeguard['kept_share']:.0%} of the pools gave a pair.", ""] if safeguard else []))
    (output / "spo.md").write_text(text)
    return text


def main() -> None:
    [settings] = parse_words(HfArgumentParser(Settings, prog="python -m shapes.spo_comparison"))
    start = time.time()
    if not Path(settings.output, "prepared.json").is_file():
        prepare(settings)
    methods = [*OFFLINE, *ONLINE]
    with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
        grid = [Run(method, rate, 0, "selection") for method in methods for rate in rates(method, settings)]
        found = do_all(grid, settings, pool)
        chosen = {method: max((record for record in found if record["method"] == method), key=late_score)["learning_rate"]
                  for method in methods}
        final = [Run(method, chosen[method], seed, "test") for seed in range(1, settings.seeds + 1) for method in methods]
        records = do_all(final, settings, pool)
    print(report(settings, chosen, records, (time.time() - start) / 60))


if __name__ == "__main__":
    run_program(main)
