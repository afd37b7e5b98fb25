"""Images a second: batched sampling as eval.generate does it, against one image at a time as the official program does.

    python -m benchmarks.generation --model sd15        # or sdxl; tiny: a CPU

Models at their published sizes with random weights; 50 Euler steps with guidance, VAE in float32.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common.errors import run_program
from common.options import option, parse

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from models.family import Family


@dataclass
class GenerationOptions:
    model: Literal["tiny", "sd15", "sdxl"] = option("tiny", "whose sizes")
    batch: int = option(8, "images sampled together", at_least=1)
    images: int = option(16, "images of each measurement", at_least=1)
    steps: int = option(50, "denoising steps", at_least=1)
    compile: bool = option(False, "measure the compiled UNet too")


def make_pipeline(family: "Family", unet: "nn.Module") -> "DiffusionPipeline":
    """diffusers' own, around the same parts."""
    parts = {name.replace("text_encoder", kind): part for kind, given in (("text_encoder", family.text_encoders),
                                                                          ("tokenizer", family.tokenizers.values()))
             for name, part in zip(family.encoder_names, given)}
    pipeline = family.pipeline(vae=family.vae, unet=unet, scheduler=family.sampler("euler", 1, unet.device), **parts,
                               **family.pipeline_parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    [options], _ = parse([GenerationOptions], program="python -m benchmarks.generation", description=__doc__)
    import diffusers
    import torch

    from benchmarks.models import make_family, make_unet
    from benchmarks.timing import Parts
    from models.guidance import encode_prompts
    from models.sampling import SamplingSettings, sample
    from models.speed import check_compiler, compile_blocks
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    if not cuda:
        torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    family = make_family(options.model)
    family.load_encoders(dtype, device, vae_dtype=torch.float32)
    with torch.device(device):
        unet = make_unet(options.model).to(dtype).eval()
    pipeline, side = make_pipeline(family, unet), family.resolution
    settings = SamplingSettings(side, side, options.steps, 7.5, "official", "euler", torch.float32)
    prompts = [f"picture number {number} of a small world" for number in range(options.images)]

    @torch.inference_mode()
    def one_by_one() -> None:
        for number, prompt in enumerate(prompts):
            with torch.autocast(device.type, dtype, enabled=cuda):
                pipeline(prompt, height=side, width=side, num_inference_steps=options.steps, guidance_scale=7.5,
                         negative_prompt="", generator=torch.Generator(device).manual_seed(number))

    def batched() -> None:
        empty = encode_prompts(family, [""], device)
        for start in range(0, options.images, options.batch):
            part = prompts[start:start + options.batch]
            sample(family, unet, encode_prompts(family, part, device), empty, list(range(start, start + len(part))), settings)

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
        compile_blocks(unet, family.compiled_blocks)
        measure(f"batches of {options.batch}, compiled", batched)
    name = torch.cuda.get_device_name() if cuda else "CPU time of one thread"
    print(f"{options.model}, {side} px, {options.steps} steps, {dtype}; {name}; torch {torch.__version__}, "
          f"diffusers {diffusers.__version__}\n\n| sampling | images/s | against one by one |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.3f} | {rate / rates['one by one']:.2f}x |")


if __name__ == "__main__":
    run_program(main)
