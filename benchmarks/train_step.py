"""Speed and memory of a training step, by part, against the official program's way of doing it.

    python -m benchmarks.train_step --model sd15          # 512 px, batch 8; --model sdxl: 1024 px; --model tiny: a CPU

builds the models at their published sizes with random weights and measures, one after the other:

    baseline    as the official program does: encoders in the loop, reference cast to the compute dtype as a whole,
                errors in that dtype, eager, autocast's cache, seven gathers with .item() in every micro-step (xformers:
                torch's SDPA here); Diffusion-DPO without the safeguard, which the others have
    uncached    train.py's own step, encoders in the loop
    cached      with a cache of data.cache
    compact     cached, with --selective_checkpointing; SDXL, which recomputes everything, with --offload_reference
    compiled    cached, with --compile --channels_last and, but for SDXL, --selective_checkpointing

--variants chooses among them; --baseline is short for --variants baseline. Tensors, draws and batches are train.py's.
"""

from benchmarks.step_options import StepOptions
from common.errors import UserError, quiet_libraries, run_program
from common.files import make_room
from common.options import names_given, parse

COMPARED = {"train_batch_size", "gradient_accumulation_steps", "channels_last", "compile", "lora_rank", "sft", "train_method",
            "selective_checkpointing", "offload_reference", "cached_dataset", "resolution", "sdxl"}


def main() -> None:
    [options], _ = parse([StepOptions], program="python -m benchmarks.train_step", description=__doc__)
    refused = names_given(options.train_flags) & COMPARED
    if refused:
        raise UserError(f"--train_flags cannot change what is compared ({', '.join(sorted(refused))}): use --model, --batch, "
                        "--accumulation and --variants")
    if options.json:
        make_room(options.json, "--json")
    quiet_libraries()
    from benchmarks.step import measure_all
    measure_all(options)


if __name__ == "__main__":
    run_program(main)
