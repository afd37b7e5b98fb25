"""train.py with FSDP2 on CPU processes, for tests: accelerate offers FSDP on accelerators alone, so it is told there is one."""

import torch
from accelerate.state import DistributedType, PartialState

import training.launch
from train import main
from training.errors import run_program

started = training.launch.Accelerator
training.launch.Accelerator = lambda **options: started(**options | {"cpu": False})
PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))

if __name__ == "__main__":
    run_program(main)
