"""Generate the images of prompt groups with the network of a base, of a checkpoint or of LoRA weights.

    accelerate launch -m eval.generate --unet_path RUN/checkpoint-2000/unet.pth --prompts papv2 hpsv2 partiprompts

Images, manifest and STEM.zip lie beside the weights (or in --output_dir). An interrupted run goes on where it stopped.
Settings are the published ones by default.
"""

from common.errors import UserError, quiet_libraries, run_program
from common.options import parse
from common.train_options import ModelOptions
from eval.options import SD15, SDXL, GenerateOptions, check_generate_options
from models.family import Family, find_family, unpacked
from prompts import read_group


def open_base(options: GenerateOptions) -> Family:
    """The family of the base pipeline, with the published VAE where the options name none. Raises UserError, which names the
    base of a LoRA file where no base was given; a wrong path is refused before diffusers is imported."""
    model = ModelOptions(options.pretrained_model_name_or_path or (SDXL if options.sdxl else SD15), sdxl=options.sdxl,
                         max_sequence_length=options.max_sequence_length)
    try:
        model = unpacked(model)
        kind, index = find_family(model)
        vae = options.pretrained_vae_model_name_or_path
        model.pretrained_vae_model_name_or_path = kind.evaluation_vae if vae is None else None if vae == "base" else vae
        return kind(model, index)
    except UserError as error:
        from models.lora import lora_file, read_facts
        file = None if options.pretrained_model_name_or_path else lora_file(options.unet_path)
        base = read_facts(file).get("base") if file else None
        if base in (None, SD15, SDXL):
            raise
        raise UserError(f"this LoRA was trained on {base}: add --pretrained_model_name_or_path {base} ({error})") from None


def main(argv: list[str] | None = None) -> None:
    [options], _ = parse([GenerateOptions], argv, program="python -m eval.generate", description=__doc__)
    check_generate_options(options)
    prompts = {name: read_group(name)[:options.limit] for name in options.prompts}
    quiet_libraries()
    family = open_base(options)
    from eval.generation import generate
    generate(options, family, prompts)


if __name__ == "__main__":
    run_program(main)
