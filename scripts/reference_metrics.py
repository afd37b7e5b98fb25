"""The steps of check_reference_metrics.sh, which run in two environments and meet in a folder.

    prepare METRIC FOLDER      (this project's)  random full-size weights and images of 224 and 512 pixels
    reference METRIC FOLDER    (the reference's) scores by the package hpsv2 or image-reward
    ours METRIC FOLDER         (this project's)  scores by eval/metrics
    compare all FOLDER         (this project's)  the largest differences; exit code 1 above the bar
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

BAR = 1e-4
SIZES = (224, 512)
PROMPTS = [
    "a red circle on a blue background",
    "Two dogs, a cat & one \"very\" small elephant; photograph",
    "naïve café in 東京, an oil painting",
    "a castle " * 60,  # more than 77 tokens
    "[ENC] x",
    "a",
]


def prepare(metric: str, folder: Path) -> None:
    import numpy as np
    import open_clip
    import torch
    from PIL import Image

    from shapes.tiny_models import write_bert_tokenizer, write_imagereward

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for size in SIZES:
        for index in range(len(PROMPTS)):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            fine = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
            noisy = np.clip(fine + rng.integers(-20, 21, fine.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{size}_{index}.png")
    torch.manual_seed(0)
    if metric == "hpsv2":
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2_compressed.pt")
    else:
        write_imagereward(
            folder,
            vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                        image_size=224, patch_size=16),
            text=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
        write_bert_tokenizer(folder / "tokenizer")
        (folder / "bert-base-uncased").mkdir(exist_ok=True)  # the name that image-reward asks for
        (folder / "bert-base-uncased" / "vocab.txt").write_bytes((folder / "tokenizer" / "vocab.txt").read_bytes())


def images(folder: Path, size: int) -> list:
    from PIL import Image
    return [Image.open(folder / f"{size}_{index}.png").convert("RGB") for index in range(len(PROMPTS))]


def reference(metric: str, folder: Path) -> None:
    import torch

    if metric == "hpsv2":
        from hpsv2 import img_score
        from hpsv2.src.open_clip import create_model_and_transforms

        # as img_score.initialize_model, without downloading the weights that the checkpoint replaces
        model, _, preprocess = create_model_and_transforms("ViT-H-14", None, precision="amp", device="cpu",
                                                           light_augmentation=True, aug_cfg={}, output_dict=True)
        img_score.model_dict.update(model=model, preprocess_val=preprocess)

        def score(image, prompt):
            return float(img_score.score(image, prompt, cp=str(folder / "HPS_v2_compressed.pt"))[0])
    else:
        import ImageReward

        model = ImageReward.load(str(folder / "ImageReward.pt"), device="cpu", med_config=str(folder / "med_config.json"))
        fit = model.load_state_dict(torch.load(folder / "ImageReward.pt", weights_only=True), strict=False)
        print(f"image-reward's own keys that the file lacks: {fit.missing_keys}, and that it has besides: "
              f"{fit.unexpected_keys}")

        def score(image, prompt):
            return float(model.score(prompt, image))

    with torch.no_grad():
        scores = {size: [score(image, prompt) for image, prompt in zip(images(folder, size), PROMPTS)]
                  for size in SIZES}
    (folder / "reference.json").write_text(json.dumps(scores))


def ours(metric: str, folder: Path) -> None:
    from eval.metrics import load_metric

    settings = ({"checkpoint": str(folder)} if metric == "hpsv2"
                else {"model": str(folder), "tokenizer": str(folder / "tokenizer")})
    model = load_metric(metric, config={metric: settings})
    scores = {size: model.score(images(folder, size), PROMPTS).tolist() for size in SIZES}
    (folder / "ours.json").write_text(json.dumps(scores))


def compare(_: str, folder: Path) -> int:
    failed = 0
    for metric in ("hpsv2", "imagereward"):
        ours, theirs = (json.loads((folder / metric / f"{side}.json").read_text()) for side in ("ours", "reference"))
        for size in map(str, SIZES):
            largest = max(abs(a - b) for a, b in zip(ours[size], theirs[size]))
            spread = max(theirs[size]) - min(theirs[size])
            verdict = ("" if size != "224" else "  ok" if largest < BAR else f"  ABOVE THE BAR {BAR}")
            print(f"{metric:12} {size}x{size}: largest difference {largest:.2e} (scores spread over {spread:.3f}){verdict}")
            failed += size == "224" and not largest < BAR
    print("at 512x512 hpsv2 resizes a float tensor, eval/metrics the PIL image as the official evaluation does: no bar")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit({"prepare": prepare, "reference": reference, "ours": ours, "compare": compare}[sys.argv[1]](
        sys.argv[2], Path(sys.argv[3])))
