"""What tests ask of a training run: its options for small models, its weights, its logged scalars."""

import shutil

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = ["--resolution", 64, "--lr_warmup_steps", 0, "--mixed_precision", "no", "--dataloader_num_workers", 0]


def launch(python, processes=1):
    """accelerate's launcher with one process, or several CPU processes over gloo."""
    several = ["--multi_gpu", "--num_machines", 1] if processes > 1 else ["--cpu"]
    return [python, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", processes, *several,
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0, "train.py"]


def continue_from(run, copy, *lost):
    """Copy a finished run as if it had been stopped: without its result, its logs and the checkpoints named `lost`."""
    shutil.copytree(run, copy)
    for path in [*map(copy.joinpath, lost), *copy.glob("unet*"), *copy.glob("logs")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def weights(folder):
    return torch.load(folder / "unet.pth", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def scalars(output_dir):
    events = EventAccumulator(str(output_dir / "logs" / "tuning")).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
