"""What train.py's defaults do: every method, the whole network and LoRA, on the shapes base with nothing but model and data named.

    python -m shapes.defaults [--output output/defaults]

Each run is `train.py --pretrained_model_name_or_path BASE --train_data_dir PAIRS --max_train_steps 100 --train_method METHOD
--use_winner_preserving --mixed_precision no [--lora_rank 16]` with seed 0 (half precision needs a GPU). A second call makes
what is missing, and the table: defaults.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from common.errors import quiet_libraries, run_program
from common.files import write_text
from common.options import option, parse
from common.train_checks import parse_options
from common.train_options import OFFLINE, PAIRWISE, WITH_BETA

LAST = 25  # steps that a figure is the mean of


@dataclass
class Settings:
    title = "the runs"

    output: str = option("output/defaults", "folder for the pairs and the table")
    steps: int = option(100, "optimizer steps of each run", at_least=1)
    methods: list[str] = option(list(OFFLINE), "of the objectives", default_text="all")


def run(method: str, lora: bool, settings: Settings) -> dict:
    """One run's settled defaults, its scalars by step, and how far the network moved."""
    import torch

    from shapes.experiment import train_here
    from shapes.pipeline import base_pipeline

    options = parse_options([
        f"--pretrained_model_name_or_path={base_pipeline()}", f"--train_data_dir={settings.output}/pairs", f"--train_method={method}",
        f"--max_train_steps={settings.steps}", "--mixed_precision=no", "--seed=0", "--report_to=none", "--checkpointing_steps=0",
        *["--use_winner_preserving"] * (method in PAIRWISE), *["--lora_rank=16"] * lora])
    logs, start, moved = [], {}, 0.0

    def watch(step: int, network: torch.nn.Module, scalars: dict[str, float]) -> None:
        nonlocal moved
        if not start:
            start.update({name: weight.detach().clone() for name, weight in network.named_parameters()})
        logs.append(scalars)
        if step == settings.steps:
            moved = change(network, start)

    train_here(options, watch)
    optimizer, objective = options.optimizer, options.objective
    return {"logs": logs[1:], "moved": moved, "rate": optimizer.learning_rate, "beta": objective.beta_dpo, "mu": objective.winner_preserving_mu}


def change(network, start: dict) -> float:
    """Norm of what was added to the trained layers' weights, over the norm of those weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    pairs = ([(layer.get_delta_weight("default"), layer.base_layer.weight) for layer in layers] if layers else
             [(weight - start[name], start[name]) for name, weight in network.named_parameters()])
    added, whole = (sum(float(pair[place].detach().square().sum()) for pair in pairs) for place in (0, 1))
    return (added / whole) ** 0.5


def row(method: str, lora: bool, record: dict) -> list[str]:
    logs = record["logs"]

    def mean(name: str, form: str) -> str:
        values = [step[name] for step in logs[-LAST:] if name in step]
        return f"{sum(values) / len(values):{form}}" if values else "-"

    lambdas = [step["avg_lose_l_scale"] for step in logs if "avg_lose_l_scale" in step] if method in PAIRWISE else []
    acted = f"{mean('avg_lose_l_scale', '.2f')}, below 1 in {sum(value < 1 for value in lambdas)}" if lambdas else "-"
    beta = f"{record['beta']:g}" if method in WITH_BETA else "-"
    mu = f"{record['mu']:g}" if method in PAIRWISE else "-"
    return [method, "LoRA 16" if lora else "whole", f"{record['rate']:.1e}", beta, mu, f"{record['moved']:.1e}",
            mean("train_loss", ".3g"), f"{max(step['grad_norm'] for step in logs):.2g}", mean("implicit_acc_accumulated", ".2f"),
            mean("avg_win_diff_loss", "+.1e"), acted]


def main() -> None:
    [settings], _ = parse([Settings], program="python -m shapes.defaults", description=__doc__)
    quiet_libraries()
    from shapes.experiment import do_all, keep_settings, table
    from shapes.pairs import write_pairs

    output = Path(settings.output)
    keep_settings(settings, "methods")
    if not (output / "pairs").is_dir():
        write_pairs(output / "pairs", 200, seed=1, resolution=32)
    runs = [(method, lora) for method in settings.methods for lora in (False, True)]
    files = [output / "runs" / f"{method}{'_lora' * lora}.json" for method, lora in runs]
    do_all(None, [(file, run, (*one, settings)) for file, one in zip(files, runs)], "defaults")
    text = table(["method", "trained", "rate", "beta", "mu", "weights moved by", "loss", "largest gradient", "accuracy",
                  "winner's error", "lambda"], [row(*one, json.loads(file.read_text())) for one, file in zip(runs, files)])
    write_text(output / "defaults.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_program(main)
