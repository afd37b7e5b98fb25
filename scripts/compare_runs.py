"""Short runs of this tree beside those of another one, compared bit for bit; scripts/compare_with.sh makes that one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

ROOT = Path(__file__).parents[1]
COMMON = ["--resolution=64", "--mixed_precision=no", "--lr_warmup_steps=0", "--max_train_steps=4", "--train_batch_size=2",
          "--gradient_accumulation_steps=2", "--seed=7", "--checkpointing_steps=0", "--report_to=none", "--learning_rate=1e-4",
          "--lr_scheduler=constant_with_warmup", "--beta_dpo=100", "--optimizer=adamw"]
SPO = ["--train_method=spo", "--spo_num_steps=6", "--spo_divert_start_step=2", "--spo_threshold=0", "--spo_sample_batch_size=2",
       "--caption_column=caption", "--lr_scheduler=constant"]
OFFLINE = {
    "sd15-dpo-safeguarded": ("sd15", ["--use_winner_preserving", "--winner_preserving_mu=0.9"]),
    "sd15-dmpo-perturbed-crops": ("sd15", ["--train_method=dmpo", "--dmpo_alpha=0.01", "--input_perturbation=0.1",
                                           "--random_crop", "--noise_offset=0.1"]),
    "sd15-dspo-per-pair": ("sd15", ["--train_method=dspo", "--use_winner_preserving", "--winner_preserving_mu=0.5",
                                    "--winner_preserving_granularity=sample"]),
    "sd15-dpo-parameter-space": ("sd15", ["--use_winner_preserving", "--winner_preserving_mu=0.5",
                                          "--winner_preserving_space=parameter"]),
    "sd15-sft": ("sd15", ["--train_method=sft"]),
    "sd15-dpo-bf16": ("sd15", ["--mixed_precision=bf16", "--use_winner_preserving", "--winner_preserving_mu=0.9"]),
    "sdxl-lora-dpo": ("sdxl", ["--sdxl", "--lora_rank=4"]),
    "sdxl-dspo": ("sdxl", ["--sdxl", "--train_method=dspo", "--optimizer=adafactor"]),
}
SPO_CASES = {
    "sd15-spo": ("sd15", [*SPO, "--lora_rank=4"]),
    "sdxl-spo": ("sdxl", [*SPO, "--sdxl", "--spo_k=2", "--spo_num_inner_step=1"]),
}
SPM = {"sd15-spm": ("sd15", []), "sdxl-spm": ("sdxl", ["--sdxl", "--relabel_threshold=0.01"])}
CASES = OFFLINE | SPO_CASES | SPM
GROUPS = {"offline": OFFLINE, "spo": SPO_CASES, "spm": SPM}


def make_inputs(folder: Path) -> dict[str, Path]:
    """Tiny pipelines, pairs and a tiny CLIP, made once by this tree and read by both."""
    sys.path.insert(0, str(ROOT))
    from shapes.pairs import write_pairs
    from shapes.pipeline import build_pipeline, clip_tokenizer, text_config

    paths = {name: folder / name for name in ("sd15", "sdxl", "pairs", "clip")}
    if not paths["clip"].is_dir():
        for kind in ("sd15", "sdxl"):
            build_pipeline(paths[kind], kind)
        write_pairs(paths["pairs"], 64, seed=0)
        torch.manual_seed(0)
        vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
        CLIPModel(CLIPConfig(text_config=text_config(32, 1).to_dict(), vision_config=vision, projection_dim=32)
                  ).save_pretrained(paths["clip"])
        clip_tokenizer().save_pretrained(paths["clip"])
    return paths


def command(tree: Path, case: str, paths: dict[str, Path], output: Path) -> list[str]:
    base, flags = CASES[case]
    words = [f"--pretrained_model_name_or_path={paths[base]}", f"--train_data_dir={paths['pairs']}", f"--output_dir={output}"]
    clip = [f"--spm_clip={paths['clip']}", f"--spm_tokenizer={paths['clip']}"]
    if case in SPM:
        module = "spo.preference_model.train" if (tree / "spo").is_dir() else "spm" ".train"  # before the move
        allowed = ("--resolution", "--mixed", "--max_train", "--train_batch", "--gradient_acc", "--seed", "--checkpointing",
                   "--report", "--learning_rate", "--lr_warmup")
        return [sys.executable, "-m", module, *words, *clip, *[word for word in COMMON if word.startswith(allowed)],
                "--validation_split=none", *flags]
    return [sys.executable, "train.py", *words, *COMMON, *(clip if case in SPO_CASES else []), *flags]


def run(tree: Path, case: str, paths: dict[str, Path], output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command(tree, case, paths, output), cwd=tree, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{case} in {tree} failed:\n{result.stdout[-1500:]}\n{result.stderr[-3000:]}")


def weights(output: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(output.glob("checkpoint-*/*")):
        if path.suffix in (".pth", ".bin") and "optimizer" not in path.name:
            found |= torch.load(path, weights_only=True)
        elif path.name == "pytorch_lora_weights.safetensors":
            found |= load_file(path)
    return found


def scalars(output: Path) -> list[dict[str, float]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


SKIPPED = {"pairs_per_second", "peak_memory_gb", "time"}  # of the machine, not of the method


def differences(before: Path, after: Path) -> list[str]:
    old, new, problems = weights(before), weights(after), []
    if not old or old.keys() != new.keys():
        problems.append(f"weights: {len(old)} tensors before, {len(new)} after")
    changed = [key for key in old.keys() & new.keys() if not torch.equal(old[key], new[key])]
    problems += [f"weights: {len(changed)} of {len(old)} tensors differ, such as {changed[0]}"] if changed else []
    for step, (a, b) in enumerate(zip(scalars(before), scalars(after), strict=False), start=1):
        problems += [f"step {step}: {name} was {a[name]!r}, is {b[name]!r}" for name in sorted(a.keys() & b.keys() - SKIPPED)
                     if a[name] != b[name]]
    return problems


def main() -> int:
    output, wanted = Path(sys.argv[1]), sys.argv[2:] or ["offline"]
    cases = [case for name in wanted for case in GROUPS.get(name, [name])]
    if unknown := [case for case in cases if case not in CASES]:
        sys.exit(f"error: there is no case {unknown[0]}: choose from {', '.join([*GROUPS, *CASES])}")
    paths, failed = make_inputs(output / "inputs"), 0
    for case in cases:
        before, after = output / "before" / case, output / "after" / case
        run(output / "tree", case, paths, before)
        run(ROOT, case, paths, after)
        problems = differences(before, after)
        failed += bool(problems)
        compared = sorted(scalars(before)[0].keys() & scalars(after)[0].keys() - SKIPPED) if scalars(before) else []
        print(f"{case:<28} " + ("equal to the bit: " f"{len(weights(before))} tensors; {len(scalars(before))} steps of "
                                f"{', '.join(compared)}" if not problems else "DIFFERS: " + "; ".join(problems[:4])), flush=True)
    print(f"{len(cases) - failed} of {len(cases)} equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
