import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from shapes.pipeline import build_pipeline, clip_tokenizer

CLASSES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_built_pipeline_opens_and_draws(kind, tmp_path):
    folder = build_pipeline(tmp_path / "a", kind, seed=0)
    pipeline = CLASSES[kind].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a red circle on a blue background"] * 2, num_inference_steps=2).images
    assert [image.size for image in images] == [(64, 64)] * 2
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 25e6
    if kind == "sdxl":
        assert pipeline.unet.config.addition_embed_type == "text_time"
        assert pipeline.config.force_zeros_for_empty_prompt
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert ddim.config.prediction_type == "epsilon" and ddim.config.beta_schedule == "scaled_linear"
    if kind == "sd15":
        assert not ddim.config.clip_sample and ddim.config.steps_offset == 1


def test_the_seed_decides_the_weights_and_leaves_the_callers_generator(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    unets = [(build_pipeline(tmp_path / str(index), seed=seed) / "unet/diffusion_pytorch_model.safetensors").read_bytes()
             for index, seed in enumerate((0, 0, 1))]
    assert unets[0] == unets[1] != unets[2]
    assert torch.equal(torch.rand(1), expected)


def test_v_prediction_and_unknown_kinds(tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(build_pipeline(tmp_path, prediction_type="v_prediction"))
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="sd15, sdxl"):
        build_pipeline(tmp_path, "sd3")


def test_the_tokenizer_is_clips(tmp_path):
    from open_clip.tokenizer import SimpleTokenizer

    clip_tokenizer().save_pretrained(tmp_path)
    tokenizer = type(clip_tokenizer()).from_pretrained(tmp_path)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    text = "A photo of an astronaut, riding 42 horses! café - isn't it?"
    assert tokenizer(text).input_ids == [49406, *SimpleTokenizer().encode(text), 49407]
    assert tokenizer("<|startoftext|> <|endoftext|>").input_ids == [49406, 49406, 49407, 49407]
