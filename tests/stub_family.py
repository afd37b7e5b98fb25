"""What defaults ask of a family, without its files."""

from types import SimpleNamespace

FAMILIES = {"sd15": 512, "sdxl": 1024}


def stub_family(family: str) -> SimpleNamespace:
    flow, side = family not in FAMILIES, FAMILIES.get(family, 1024)
    return SimpleNamespace(name=family, label=family, flow=flow, resolution=side, training_resolution=512 if flow else side,
                           ignored_options=() if flow else ("timestep_shift",), sequence_length=256 if flow else None,
                           overflows_in_fp16=family == "flux", guidance=3.5, steps=28, always_checkpoints=family == "sdxl")
