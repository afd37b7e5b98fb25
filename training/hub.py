"""Publishing a trained pipeline with a card that says how it was made."""

from pathlib import Path

from common.train_options import TrainOptions
from common.errors import UserError, first_line

CARD = """---
{base_model}library_name: diffusers
license: {license}
tags: [text-to-image, diffusers, preference-optimization, {method}]
---
# {name}

{base} trained with {method}{safeguard}{data}.

| setting | value |
|---|---|
{settings}

{left}
"""

SHOWN = ("beta_dpo", "winner_preserving_mu", "dmpo_alpha", "learning_rate", "scale_lr", "train_batch_size",
         "gradient_accumulation_steps", "max_train_steps", "lr_warmup_steps", "resolution", "lora_rank", "seed",
         "mixed_precision")
LEFT = {  # by the file that says so
    "model_index.json": "The folder opens with `DiffusionPipeline.from_pretrained`.",
    "unet.pth": "`unet.pth` is the float32 state dict of the UNet.",
    "pytorch_lora_weights.safetensors": "`pipeline.load_lora_weights` of a pipeline of the base puts "
                                        "`pytorch_lora_weights.safetensors` in.",
}


def model_card(options: TrainOptions, name: str, license: str) -> str:
    values, objective = options.flat(), options.objective
    rows = "\n".join(f"| {setting} | {values[setting]} |" for setting in SHOWN)
    safeguard = (f" and the winner-preserving safeguard (mu {objective.winner_preserving_mu:g})"
                 if objective.safeguarded else "")
    folder, base = Path(options.run.output_dir), options.model.pretrained_model_name_or_path
    local = Path(base).exists()  # the hub refuses a card whose base_model is none of its own
    left = [text for file, text in LEFT.items() if (folder / file).is_file()]
    return CARD.format(base=f"`{Path(base).name}`" if local else f"[{base}](https://huggingface.co/{base})",
                       base_model="" if local else f"base_model: {base}\n", method=objective.train_method, name=name,
                       settings=rows, left=" ".join(left), safeguard=safeguard, license=license,
                       data=f" on the preference pairs of `{options.data.source}`" if options.data.source else "")


def push(options: TrainOptions, license: str) -> str:
    """Upload output_dir without its checkpoints and what earlier runs left there; returns the address. Raises UserError;
    nothing local is lost.

    license: the base's, which the trained weights inherit.
    """
    from huggingface_hub import HfApi

    folder = Path(options.run.output_dir)
    name = options.run.hub_model_id or folder.resolve().name
    (folder / "README.md").write_text(model_card(options, name.split("/")[-1], license), encoding="utf-8")
    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder,
                          commit_message=f"{options.objective.train_method} training",
                          ignore_patterns=["checkpoint-*", "replaced-*", ".*", f"{options.run.logging_dir}/*"])
    except Exception as error:  # the network's and the hub's failures are of many kinds
        raise UserError(f"the run is complete in {folder}, but could not be pushed to {name}: {first_line(error, 200)}"
                        " (log in with `hf auth login`)") from None
    return f"https://huggingface.co/{repository}"
