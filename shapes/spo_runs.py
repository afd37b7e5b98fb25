"""The runs of shapes/spo_comparison.py and their report. Every training run is train.py's own."""

import json
import random
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from common.files import write_json, write_text
from common.locks import release
from models.family import Family
from models.guidance import guided, select
from shapes.experiment import (Enough, cache_pairs, do_all, draw_and_judge, keep_settings, mean_score, reset_accelerate,
                               run_options, table, train_here, worker_pool)
from shapes.mixture import sample_captions
from shapes.oracle import judge
from shapes.pairs import write_pairs
from shapes.pipeline import GUIDANCE_SCALE, base_pipeline, clip_tokenizer, text_config
from shapes.preferences import write_preferences
from spo.options import SPOOptions
from spo.preference_model.options import parse_spm_options
from spo.preference_model.train import train as train_preference_model
from spo.resampler import Pairs
from spo.sampling import Judge
from spo.task import Batch, SPOTask, make_task
from training.fit import StepLoss
from training.run import Run as TrainingRun

if TYPE_CHECKING:
    from shapes.spo_comparison import Settings

SAFEGUARD = {"use_winner_preserving": True}  # beta, alpha and mu are train.py's defaults, the published ones
OFFLINE = {"sft": {}, "diffusion-dpo": SAFEGUARD, "dspo": SAFEGUARD, "dmpo": SAFEGUARD}
ONLINE = ("spo", "spo, oracle judge", "spo, winners only")
ORACLE_SCALE = 20.0  # turns the oracle's score in [0, 1] into a logit
OVERLAP = ("cosine", "lambda", "lambda_below_one")


class Run(NamedTuple):
    method: str
    learning_rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.method}_lr{self.learning_rate:g}_seed{self.seed}".replace(", ", "-").replace(" ", "-")


def base_folder(settings: "Settings") -> str:
    return settings.base or str(base_pipeline())


# --- what all runs share -------------------------------------------------------------------------------------------------

def prepare(settings: "Settings") -> None:
    """Prompts, the offline pairs and the step-aware preference model; with the processor time that each took."""
    output, prompts = Path(settings.output), {}
    output.mkdir(parents=True, exist_ok=True)
    for split, count, unseen in (("train", 2000, False), ("selection", settings.prompts, True),
                                 ("test", settings.prompts, True)):
        prompts[split] = list(dict.fromkeys(sample_captions(random.Random(f"{split} prompts"), count, unseen)))
    write_text(output / "prompts.json", json.dumps(prompts, indent=1))
    write_text(output / "train_prompts.txt", "\n".join(prompts["train"]))

    start = time.process_time()
    if settings.base:
        write_pairs(output / "pairs", settings.pairs, seed=1, resolution=32)
    else:
        write_preferences(output / "pairs", settings.pairs, seed=1, num_inference_steps=settings.inference_steps)
    cache_pairs(run_options(pretrained_model_name_or_path=base_folder(settings), train_data_dir=output / "pairs",
                            cached_dataset=output / "cache"))
    drawn = time.process_time()
    make_preference_model(settings)
    write_json(output / "prepared.json", {"pairs": drawn - start, "spm": time.process_time() - drawn})


def make_preference_model(settings: "Settings") -> None:
    """Train it on drawn pairs into OUTPUT/spm, from a CLIP that knows nothing."""
    output, clip = Path(settings.output), Path(settings.output, "clip")
    make_clip(clip)
    drawn = write_pairs(output / "spm_pairs", settings.spm_pairs, seed=2, resolution=32)
    held_out = write_pairs(output / "spm_held_out", max(16, settings.spm_pairs // 10), seed=3, resolution=32)
    for file in held_out.glob("train-*.parquet"):
        file.rename(drawn / file.name.replace("train", "validation"))
    options = {"pretrained_model_name_or_path": base_folder(settings), "train_data_dir": drawn,
               "validation_split": "validation", "resolution": 32, "spm_clip": clip, "spm_tokenizer": clip,
               "guidance": GUIDANCE_SCALE, "learning_rate": 5e-4, "adam_weight_decay": 0.01,
               "lr_warmup_steps": settings.spm_steps // 10, "max_train_steps": settings.spm_steps,
               "train_batch_size": 16, "validation_steps": settings.spm_steps, "checkpointing_steps": 0,
               "mixed_precision": "no", "report_to": "none", "seed": 0, "output_dir": output / "spm"}
    reset_accelerate()
    train_preference_model(parse_spm_options([f"--{name}={value}" for name, value in options.items()]))
    release(output / "spm")


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


# --- SPO's variants ------------------------------------------------------------------------------------------------------

class MeasuredSPO(SPOTask):
    """Logs what the safeguard would do to the pairs."""

    def loss(self, model: nn.Module, batch: Batch) -> StepLoss:
        overlap = self.overlap(batch[0])
        result = super().loss(model, batch)
        result.logs |= overlap
        return result

    @torch.no_grad()
    def overlap(self, pairs: Pairs, mu: float = 0.9) -> dict[str, Tensor]:
        """Winner and loser share x_t. The gradients of -log p with respect to the shared prediction are proportional to the
        residuals m - x_w and m - x_l, so that a pair's lambda is (1 - mu) |r_w|^2 / <r_w, r_l>, where that is positive,
        clamped to [0, 1]."""
        sampler, round_, x_t = self.sampler, self.round, pairs.x_t[:, 0]
        prediction = guided(self.family, self.trained, x_t, sampler.times[pairs.step], select(round_.text, pairs.prompt),
                            round_.empty, sampler.size, sampler.guidance)
        mean, _, _ = sampler.transition(prediction, x_t, pairs.step)
        winner, loser = ((mean - pairs.x_next[:, i]).flatten(1) for i in (0, 1))
        inner = (winner * loser).sum(1)
        scale = torch.where(inner > 0, (1 - mu) * winner.square().sum(1) / inner, 1.0).clamp(0, 1)
        return {"cosine": (inner / (winner.norm(dim=1) * loser.norm(dim=1))).mean(), "lambda": scale.mean(),
                "lambda_below_one": (scale < 1).float().mean()}


class WinnersOnlySPO(MeasuredSPO):
    """SPO's gradient with lambda = 0: the loser weighs the pair, but nothing flows through it."""

    def log_probs(self, network: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
        winners, losers = super().log_probs(network, pairs)
        return winners, losers.detach()


def make_variant(run: TrainingRun, family: Family, method: str) -> SPOTask:
    task = make_task(run, family, WinnersOnlySPO if method == "spo, winners only" else MeasuredSPO)
    if method == "spo, oracle judge":
        tokenizer = task.sampler.judge.tokenizer
        task.sampler.judge = Judge(OracleModel(tokenizer), tokenizer)
    return task


# --- one run -------------------------------------------------------------------------------------------------------------

def train_run(run: Run, settings: "Settings") -> dict:
    """Train for settings.seconds of processor time, judging apart; returns the curve [(seconds, steps, score)] and, for SPO,
    what was seen of its pairs."""
    prompts = json.loads(Path(settings.output, "prompts.json").read_text())[run.split]
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder(settings))
    curve, seen = [], []
    spent, since = 0.0, None

    def watch(step: int, network: nn.Module, scalars: dict[str, float]) -> None:
        nonlocal spent, since
        if since is not None:
            spent += time.process_time() - since
        if "cosine" in scalars:
            seen.append({name: scalars[name] for name in OVERLAP} | {"kept_share": scalars["spo/kept_share"]})
        if spent >= settings.seconds * len(curve) / settings.points:
            _, judgements = draw_and_judge(network, pipeline, prompts, 0, settings.inference_steps)
            curve.append((spent, step, mean_score(judgements)))
        if len(curve) > settings.points:
            raise Enough
        since = time.process_time()

    make = partial(make_variant, method=run.method) if run.method in ONLINE else None
    train_here(training_options(run, settings), watch, make)
    summary = {name: float(np.mean([about[name] for about in seen])) for name in seen[0]} if seen else {}
    return run._asdict() | {"curve": curve, "pairs": summary}


def training_options(run: Run, settings: "Settings"):
    """train.py's; the run ends by its watch."""
    output = Path(settings.output)
    common: dict[str, Any] = {
        "pretrained_model_name_or_path": base_folder(settings), "train_batch_size": 8, "seed": run.seed,
        "learning_rate": run.learning_rate, "lr_scheduler": "constant", "max_train_steps": 10**6}
    if run.method in OFFLINE:
        return run_options(cached_dataset=output / "cache", train_method=run.method, **common, **OFFLINE[run.method])
    return run_options(SPOOptions, train_method="spo", spo_prompts=output / "train_prompts.txt",
                       spo_guidance=GUIDANCE_SCALE, spo_sample_batch_size=settings.spo_prompts,
                       spm_clip=output / "clip", spm_tokenizer=output / "clip",
                       spm_checkpoint=output / "spm" / "step-aware_preference_model.bin", **common)


# --- the experiment --------------------------------------------------------------------------------------------------------

def scores_of(record: dict) -> list[float]:
    return [score for _, _, score in record["curve"]]


def late_score(scores: list[float]) -> float:
    """Mean of a curve's scores over the second half of the time: less noisy than the last judgement."""
    trained = scores[1:]  # the first is the base's
    return float(np.mean(trained[len(trained) // 2:]))


def report(settings: "Settings", chosen: dict[str, float], records: list[dict], minutes: float) -> str:
    """Table and plot of the final runs; returns the text of spo.md."""
    output = Path(settings.output)
    prepared = json.loads((output / "prepared.json").read_text())
    accuracies = json.loads((output / "spm" / "accuracy.json").read_text())
    base = float(np.mean([scores_of(record)[0] for record in records]))
    runs = {method: [record for record in records if record["method"] == method] for method in chosen}
    curves = {method: np.mean([scores_of(record) for record in own], axis=0) for method, own in runs.items()}
    goal = late_score(curves["diffusion-dpo"])
    times = np.linspace(0, settings.seconds, settings.points + 1)
    figure, rows = Figure(figsize=(7, 4.2), layout="tight"), []
    axes = figure.subplots()
    for method, curve in curves.items():
        ends = [late_score(scores_of(record)) for record in runs[method]]
        steps = np.mean([record["curve"][-1][1] for record in runs[method]])
        reached = next((f"{t:.0f}" for t, score in zip(times, curve) if score >= goal and t > 0), "not reached")
        spread = f" +- {np.std(ends, ddof=1):.3f}" if len(ends) > 1 else ""
        rows.append([method, f"{chosen[method]:g}", f"{steps:.0f}", f"{np.mean(ends):.3f}{spread}", f"{curve.max():.3f}",
                     reached])
        axes.plot(times, curve, marker="o", label=method, linestyle="-" if method in ONLINE else "--")
    axes.axhline(base, color="grey", linewidth=0.8, label="base")
    axes.set(xlabel="processor seconds of training", ylabel="mean oracle score", title="Shapes world: quality over time")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(output / "spo.png", dpi=150)

    accuracy = "; ".join(f"t={key.removeprefix('accuracy_t')} {accuracies[0][key]:.2f} -> {accuracies[-1][key]:.2f}"
                         for key in accuracies[-1] if key != "step")
    text = "\n\n".join([
        "# SPO beside the offline methods on the shapes world",
        f"Base: {base:.3f}. {settings.seconds:.0f} processor seconds a run, {settings.seeds} seed(s), {settings.prompts} "
        f"prompts of held-out captions; \"at the end\" is the mean over the second half of the time. "
        f"{minutes:.0f} minutes in all.",
        table(["method", "learning rate", "steps", "oracle score at the end", "best",
               "seconds to Diffusion-DPO's end score"], rows),
        f"Not in these times: the step-aware preference model took {prepared['spm']:.0f} processor seconds, drawing and "
        f"ranking the offline pairs {prepared['pairs']:.0f}.",
        f"The step-aware preference model's accuracy on held-out pairs, before and after its training: {accuracy}.\n"])
    if seen := [record["pairs"] for record in runs["spo"] if record["pairs"]]:
        mean = {name: np.mean([pairs[name] for pairs in seen]) for name in seen[0]}
        text += ("\nThe safeguard on SPO's pairs (mu 0.9): mean cosine of winner's and loser's gradient "
                 f"{mean['cosine']:.4f}, mean lambda {mean['lambda']:.4f}, lambda below 1 in "
                 f"{mean['lambda_below_one']:.2%} of the pairs; {mean['kept_share']:.0%} of the pools gave a pair.\n")
    write_text(output / "spo.md", text)
    return text


def experiment(settings: "Settings") -> None:
    """Do what is left to do, and write the report."""
    start, runs = time.time(), Path(settings.output, "runs")
    keep_settings(settings, "smoke", "seeds", "offline_rates", "spo_rates")
    if not Path(settings.output, "prepared.json").is_file():
        prepare(settings)
    grids = {method: settings.offline_rates for method in OFFLINE} | {method: settings.spo_rates for method in ONLINE}
    with worker_pool(settings.workers) as pool:
        def train_all(wanted: list[Run], description: str) -> list[dict]:
            do_all(pool, [(runs / f"{run.name}.json", train_run, (run, settings)) for run in wanted], description)
            return [json.loads((runs / f"{run.name}.json").read_text()) for run in wanted]

        found = train_all([Run(method, rate, 0, "selection") for method, grid in grids.items()
                           if len(grid) > 1 for rate in grid], "learning rates")  # a grid of one rate needs no search
        late = {(record["method"], record["learning_rate"]): late_score(scores_of(record)) for record in found}
        chosen = {method: max(grid, key=lambda rate: late.get((method, rate), 0.0)) for method, grid in grids.items()}
        records = train_all([Run(method, chosen[method], seed, "test") for seed in range(1, settings.seeds + 1)
                             for method in grids], "final runs")
    print(report(settings, chosen, records, (time.time() - start) / 60))
