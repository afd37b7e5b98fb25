"""Publishing a trained pipeline with a card that says how it was made."""

from pathlib import Path

from training.options import TrainArguments
from common.errors import UserError, first_line

CARD = """---
base_model: {base}
library_name: diffusers
license: {license}
tags: [text-to-image, diffusers, preference-optimization, {method}]
---
# {name}

[{base}](https://huggingface.co/{base}) trained with {method}{safeguard}{data}.

| setting | value |
|---|---|
{settings}

`unet.pth` is the float32 state dict of the UNet; the folder opens with `DiffusionPipeline.from_pretrained`.
"""

SHOWN = ("beta_dpo", "winner_preserving_mu", "dmpo_alpha", "learning_rate", "scale_lr", "train_batch_size",
         "gradient_accumulation_steps", "max_train_steps", "lr_warmup_steps", "resolution", "lora_rank", "seed",
         "mixed_precision")


def model_card(args: TrainArguments, name: str) -> str:
    rows = "\n".join(f"| {setting} | {getattr(args, setting)} |" for setting in SHOWN)
    safeguard = (f" and the winner-preserving safeguard (mu {args.winner_preserving_mu})"
                 if args.use_winner_preserving else "")
    return CARD.format(base=args.pretrained_model_name_or_path, method=args.train_method, name=name, settings=rows,
                       data=f" on the preference pairs of `{args.data_source}`" if args.data_source else "",
                       safeguard=safeguard,
                       license="openrail++" if args.sdxl else "creativeml-openrail-m")


def push(args: TrainArguments) -> str:
    """Upload output_dir without its checkpoints; returns the address. Raises UserError; nothing local is lost."""
    from huggingface_hub import HfApi

    folder = Path(args.output_dir)
    name = args.hub_model_id or folder.resolve().name
    (folder / "README.md").write_text(model_card(args, name.split("/")[-1]), encoding="utf-8")
    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"{args.train_method} training",
                          ignore_patterns=["checkpoint-*", ".*", f"{args.logging_dir}/*"])
    except Exception as error:  # the network's and the hub's failures are of many kinds
        raise UserError(f"the run is complete in {folder}, but could not be pushed to {name}: {first_line(error)[:200]}"
                        " (log in with `hf auth login`)") from None
    return f"https://huggingface.co/{repository}"
