"""A GPU without a GPU: tensors that have a shape, a dtype and the device "cuda", but no content (torch's FakeTensor).

Inside pretended_gpu() an operation that mixes devices raises as on a GPU, and so does every read of a value by the host. There is
no autocast and no backward pass: torch asks the driver for those.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)


class BlockingCopies(TorchDispatchMode):
    """found: (operation, from, to) of each copy between devices that the host would wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            waits = not (args[2] if name == "aten::copy_" and len(args) > 2 else (kwargs or {}).get("non_blocking"))
            if waits and source.device != result.device:
                self.found.append((name, str(source.device), str(result.device)))
        return result


@contextmanager
def pretended_gpu():
    """Yields the list of copies that the host would wait for."""
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as copies:
        yield copies.found


def move(value: torch.Tensor | nn.Module | None):
    """The tensor's likeness on the GPU; of a module, the module itself with all its tensors there."""
    if value is None or isinstance(value, torch.Tensor):
        return value if value is None else torch.empty(value.shape, dtype=value.dtype, device=GPU)
    for module in value.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(move(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = move(buffer)
    return value
