"""A tiny judge, and runs of SPO inside the test's own process."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tests.vocabulary import shorten

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "star")]


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """A folder with a random tiny CLIP, its tokenizer, prompts, a step-aware checkpoint and one of another size."""
    from shapes.pipeline import clip_tokenizer, text_config
    from spo.preference_model.model import StepAwarePreferenceModel
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(3)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=8)
    clip = CLIPModel(CLIPConfig(text_config=text_config(32, 1).to_dict(), vision_config=vision, projection_dim=16,
                                logit_scale_init_value=4.6))
    clip.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    spm = StepAwarePreferenceModel(clip)
    torch.save(spm.state_dict(), folder / "spm.bin")
    torch.save({key: value[:1] if value.dim() > 1 else value for key, value in spm.state_dict().items()},
               folder / "other_size.bin")
    return shorten(folder)


@pytest.fixture
def spo_flags(judge):
    """spo_flags(base, output, **options): the words of a small run."""
    def flags(base, output, **options):
        options = dict(
            pretrained_model_name_or_path=base, resolution=64, spo_prompts=judge / "prompts.txt", spm_clip=judge,
            spm_tokenizer=judge, spm_checkpoint=judge / "spm.bin", mixed_precision="no", seed=5, output_dir=output,
            spo_sample_batch_size=2, spo_threshold=0.005, train_batch_size=4, learning_rate=1e-3, report_to="none",
            max_train_steps=2) | options
        return [f"--{name}={value}" for name, value in options.items()]
    return flags


@pytest.fixture
def spo_options(spo_flags):
    """spo_options(base, output, **options): checked options with SD1.5's preset."""
    from common.train_checks import parse_options
    from spo.options import SPOOptions, check_spo_options

    def checked(base, output, **options):
        found = parse_options(["--config=configs/train/sd15_spo.yaml", *spo_flags(base, output, **options)], SPOOptions)
        check_spo_options(found)
        return found
    return checked


@pytest.fixture
def train_here(spo_options):
    """train_here(base, output, watch=None, **options) -> the run's outcome and its metrics.jsonl."""
    from common.locks import release
    from tests.conftest import reset_accelerate
    from train import train
    from training.records import read_metrics

    def run(base, output, watch=None, **options):
        reset_accelerate()
        try:
            return train(spo_options(base, output, **options), watch), read_metrics(output / "metrics.jsonl")
        finally:
            reset_accelerate()
            release(output)
    return run
