"""From nothing but prompts to a better model: the commands of the README's "Your own preferences", on the shapes base."""

import json
import random

import pytest

DRAW = ["--height", 32, "--width", 32, "--num_inference_steps", 20, "--cfg_convention", "diffusers", "--cfg", 1.5,
        "--mixed_precision", "no", "--no_zip"]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes of one core, more where cores are shared
def test_from_prompts_to_a_model_that_wins(tmp_path, run, python):
    from shapes.drawing import caption, random_drawing
    from shapes.pipeline import base_pipeline
    base, prompts, pairs = base_pipeline(tmp_path / "base"), tmp_path / "prompts.txt", tmp_path / "pairs"
    rng = random.Random(0)
    prompts.write_text("".join(f"{caption(random_drawing(rng))}\n" for _ in range(48)))
    draw = ["--pretrained_model_name_or_path", base, *DRAW]

    command = ["bash", "scripts/prepare/pairs.sh", prompts, "--output", pairs, "--models", "base", "--num_images_per_prompt", 6,
               "--batch_size", 48, *draw, "--metrics", "oracle", "--rule"]
    told = run([*command, "margin", "--min_gap", 0.03], timeout=900).stdout
    assert "of 48 prompts gave a pair" in told
    first = json.loads((pairs / "pairs.json").read_text())
    assert first["prompts_with_a_pair"] > 24 and first["pairs"] > 150

    output = tmp_path / "tuned"
    run(["bash", "scripts/train/sd15_diffusion_dpo.sh", "--pretrained_model_name_or_path", base, "--train_data_dir", pairs,
         "--output_dir", output, "--resolution", 32, "--no_hflip", "--mixed_precision", "no", "--train_batch_size", 16,
         "--gradient_accumulation_steps", 1, "--max_train_steps", 60, "--learning_rate", 2e-5, "--scale_lr", "false",
         "--lr_scheduler", "cosine", "--lr_warmup_steps", 8, "--beta_dpo", 1000, "--use_winner_preserving", "false",
         "--winner_preserving_mu", 0, "--noise_offset", 0.1, "--dataloader_num_workers", 0, "--seed", 0,
         "--checkpointing_steps", 0, "--report_to", "none"], timeout=600)

    manifests = {}
    for name, unet in (("base", "base"), ("tuned", output / "unet.pth")):
        run([python, "-m", "eval.generate", "--unet_path", unet, "--output_dir", tmp_path / name / "images", "--prompts", prompts,
             "--num_images_per_prompt", 2, "--batch_size", 32, "--seed", 900, *draw])
        [manifests[name]] = (tmp_path / name / "images").glob("*cfg.json")
    run(["bash", "scripts/eval/test_vs.sh", "--json_a", manifests["tuned"], "--json_b", manifests["base"], "--label_a", "tuned",
         "--label_b", "base", "--outdir", tmp_path / "compare", "--metrics", "oracle", "--no_report"])
    [summary] = (tmp_path / "compare").glob("*/summary.json")
    [oracle] = json.loads(summary.read_text())["metrics"]
    assert oracle["total_pairs"] == 96 and oracle["win_rate_a_over_b"] > 0.53 and oracle["mean_a"] > oracle["mean_b"], oracle

    told = run([*command, "best_worst"]).stdout  # paired anew: nothing is generated or scored
    assert "288 of 288 images are there" in told
    assert json.loads((pairs / "pairs.json").read_text())["rule"] == "best_worst"
