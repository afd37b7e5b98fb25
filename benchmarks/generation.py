"""Images a second: batched sampling as eval.generate does it, against one image at a time as the official program does.

    python -m benchmarks.generation --model sd15        # or sdxl; tiny: a CPU

Models at their published sizes with random weights; 50 Euler steps with guidance, VAE in float32.
"""

import sys
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers import (AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline,
                       StableDiffusionXLPipeline)
from transformers import CLIPTextConfig, HfArgumentParser

from benchmarks.models import RESOLUTIONS, TEXT_ENCODERS, UNETS, VAES, make_unet
from benchmarks.timing import Parts, check_positive
from eval.sampling import Sampler, SamplingSettings
from shapes.pipeline import clip_tokenizer
from common.train_options import parse_words
from models.compile import check_compiler, compile_blocks
from common.errors import UserError, run_program


@dataclass
class Arguments:
    model: str = field(default="tiny", metadata={"help": "tiny, sd15 or sdxl"})
    batch: int = field(default=8, metadata={"help": "images sampled together"})
    images: int = field(default=16, metadata={"help": "images of each measurement"})
    steps: int = field(default=50, metadata={"help": "denoising steps"})
    compile: bool = field(default=False, metadata={"help": "measure the compiled UNet too"})


def make_pipeline(model: str, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    with torch.device(device):
        encoders = [kind(CLIPTextConfig(**config, bos_token_id=49406, eos_token_id=49407)).to(dtype).eval()
                    for kind, config in TEXT_ENCODERS[model]]
        parts = {"vae": AutoencoderKL.from_config(VAES[model]).eval(), "unet": make_unet(model).to(dtype).eval(),
                 "scheduler": EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                                   steps_offset=1),
                 "text_encoder": encoders[0], "tokenizer": clip_tokenizer()}
    if model == "sdxl":
        pipeline = StableDiffusionXLPipeline(text_encoder_2=encoders[1], tokenizer_2=clip_tokenizer(),
                                             add_watermarker=False, **parts)
    else:
        pipeline = StableDiffusionPipeline(safety_checker=None, feature_extractor=None,
                                           requires_safety_checker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    [options] = parse_words(HfArgumentParser(Arguments, prog="python -m benchmarks.generation"))
    if options.model not in UNETS:
        raise UserError(f"--model must be one of {', '.join(UNETS)}, not {options.model}")
    check_positive(options, "batch", "images", "steps")
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    if not cuda:
        torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    pipeline, side = make_pipeline(options.model, dtype, device), RESOLUTIONS[options.model]
    settings = SamplingSettings(side, side, options.steps, 7.5, "official", "euler", torch.float32)
    sampler = Sampler(pipeline, settings)
    prompts = [f"picture number {number} of a small world" for number in range(options.images)]

    @torch.inference_mode()
    def one_by_one() -> None:
        for number, prompt in enumerate(prompts):
            with torch.autocast(device.type, dtype, enabled=cuda):
                pipeline(prompt, height=side, width=side, num_inference_steps=options.steps, guidance_scale=7.5,
                         negative_prompt="", generator=torch.Generator(device).manual_seed(number))

    def batched() -> None:
        for start in range(0, options.images, options.batch):
            part = prompts[start:start + options.batch]
            sampler.sample(part, list(range(start, start + len(part))))

    parts, rates = Parts(device), {}

    def measure(name: str, generate) -> None:
        if cuda or options.compile:
            generate()  # warm
        start = parts.mark()
        generate()
        rates[name] = options.images / parts.between(start, parts.mark()) * 1000
        print(f"measured {name}: {rates[name]:.3f} images/s", file=sys.stderr, flush=True)

    measure("one by one", one_by_one)
    measure(f"batches of {options.batch}", batched)
    if options.compile:
        check_compiler(device)
        compile_blocks(pipeline.unet)
        measure(f"batches of {options.batch}, compiled", batched)
    name = torch.cuda.get_device_name() if cuda else "CPU time of one thread"
    print(f"{options.model}, {side} px, {options.steps} steps, {dtype}; {name}; torch {torch.__version__}, "
          f"diffusers {diffusers.__version__}\n\n| sampling | images/s | against one by one |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.3f} | {rate / rates['one by one']:.2f}x |")


if __name__ == "__main__":
    run_program(main)
