"""What the experiments share: train.py's runs in this process, and pieces of work that are done once, several at a time."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from torch import nn

from common.errors import UserError
from common.files import make_folder, read_json, write_json
from common.locks import release
from common.progress import progress_bar
from common.train_checks import parse_options
from common.train_options import TrainOptions
from data.cache import CacheOptions, cache
from shapes.oracle import Judgement, judge
from shapes.pipeline import BASE_OPTIONS, draw_images
from train import train
from training.fit import Watch

# Equal in all runs: the base's resolution, and no file but what the watch takes.
COMMON = {"resolution": 32, "no_hflip": True, "mixed_precision": "no", "report_to": "none", "checkpointing_steps": 0}


def run_options(*more: type, base: str = "sd15", **options: Any) -> TrainOptions:
    """train.py's options by name, over COMMON and what the base needs; more: further groups."""
    named = COMMON | BASE_OPTIONS[base] | options
    return parse_options([f"--{name}={value}" for name, value in named.items()], *more)


def reset_accelerate() -> None:
    """accelerate keeps one state a process, in which the run before is still set up."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Enough(Exception):
    """Raised by a watch that has seen all it wanted: the run ends there, and saves nothing."""


def train_here(options: TrainOptions, watch: Watch, make_task: Callable | None = None) -> None:
    """train.py's run in this process, to its end or until the watch has enough. Its folder goes with it: what counts, the
    watch has taken."""
    reset_accelerate()
    with tempfile.TemporaryDirectory() as folder:
        options.run.output_dir = folder
        try:
            finished = train(options, watch, make_task).finished
        except Enough:
            finished = True
        finally:
            release(folder)
    if not finished:  # stopped by a signal, which was this program's too
        raise KeyboardInterrupt


def cache_pairs(options: TrainOptions) -> None:
    """Encode the pairs that the options name, once, for all runs."""
    reset_accelerate()
    cache(options, CacheOptions())


def draw_and_judge(network: nn.Module | None, pipeline: DiffusionPipeline, prompts: list[str], first_seed: int,
                   steps: int) -> tuple[np.ndarray, list[Judgement]]:
    """One image a prompt, drawn by another network in the pipeline, in evaluation mode (None: by its own), and what the
    oracle says of each."""
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    own = getattr(pipeline, name)
    network = own if network is None else network
    training = network.training
    setattr(pipeline, name, network.eval())
    try:
        images = draw_images(pipeline, prompts, first_seed, steps)
    finally:
        setattr(pipeline, name, own)
        network.train(training)
    judgements = [judge(image, prompt) for image, prompt in zip(images, prompts)]
    return np.stack([np.asarray(image) for image in images]), judgements


def mean_score(judgements: list[Judgement]) -> float:
    return float(np.mean([judgement.score for judgement in judgements]))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    header = list(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


# --- pieces of work ------------------------------------------------------------------------------------------------------

Work = tuple[Path, Callable[..., Any], tuple]  # where its record goes, what makes it, and of what


def keep_settings(settings: Any, *free: str) -> None:
    """Write into the output's settings.json what every record there follows from: all settings but output, workers and those
    `free` to differ. Raises UserError where it holds records of other settings: they would be taken for these."""
    path = Path(settings.output, "settings.json")
    now = {name: value for name, value in vars(settings).items() if name not in ("output", "workers", *free)}
    before = read_json(path) or now
    changed = [f"--{name} was {before[name]}, now {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        raise UserError(f"{settings.output} holds runs of other settings ({'; '.join(changed)}): name another --output")
    make_folder(path.parent, "--output")
    write_json(path, now)


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor | None]:
    """Processes for do_all; None where this one is enough."""
    if workers == 1:
        yield None
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield pool


def do_all(pool: Executor | None, work: list[Work], description: str) -> None:
    """Do what has no record yet."""
    left = [piece for piece in work if not piece[0].is_file()]
    with progress_bar(total=len(left), desc=description, unit="run") as bar:
        if pool is None:
            for piece in left:
                do(*piece)
                bar.update()
        else:
            for future in as_completed([pool.submit(do, *piece) for piece in left]):
                future.result()
                bar.update()


def do(path: Path, function: Callable[..., Any], arguments: tuple) -> None:
    """One piece: its record as JSON in `path`, what it prints in a .log beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with open(path.with_suffix(".log"), "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        record = function(*arguments)
    write_json(path, record)
