"""Importing this lets FSDP2 run on CPU processes: accelerate offers it on accelerators alone, so it is told there is one."""

import torch
from accelerate.state import DistributedType, PartialState

import models.devices

started = models.devices.Accelerator
models.devices.Accelerator = lambda **options: started(**options | {"cpu": False})
PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
