"""Where torch computes: the names that users give, and what they mean on this machine.

A model is put on a device when it is loaded; what reads it takes its device from its weights, keeps sums there, and
brings to the CPU what goes into files and records.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.settings import DEVICE
from cfsp.units import format_bytes

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        InputError: An unknown name, or a GPU that is not there.
    """
    DEVICE.checked(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    there = gpu_count() if kind == "cuda" else 1
    if int(number or 0) >= there:  # before torch sees it: it takes 256 for 0
        known = "cpu" if not there else f"cpu, cuda:0 to cuda:{there - 1}"
        raise InputError("is not there, or torch cannot use it", field="device", value=name, allowed=known)
    return torch.device(name)


def gpu_count() -> int:
    """GPUs that torch can use; a driver may know more."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def placed(model: Any, device: torch.device | str) -> Any:
    """A model of the CPU on a device.

    Raises:
        InputError: The device's memory does not hold it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if needed > free:
            sizes = f"{format_bytes(needed)} of the GPU's memory at least, and {format_bytes(free)} are free"
            raise InputError(f"the model takes {sizes}", field="device", value=str(device), allowed="cpu")
    return model.to(device)


@contextmanager
def moved(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have a model of the CPU on a device while the context is open; raises InputError as `placed`."""
    placed(model, device)
    try:
        yield
    finally:
        model.to(CPU)
