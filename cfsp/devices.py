"""Where torch computes: the names that users give, and what they mean on this machine.

A model is put on a device when it is loaded; what reads it takes the device from its weights, and brings what goes into
files and records to the CPU. float64 sums are `exact`, `exact_sum` and `exact_zeros`: some devices have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.settings import DEVICE
from cfsp.units import format_bytes

CPU = torch.device("cpu")
OR_NARROW = (
    "cpu, or 16 bits (--set dtype)"  # what to use in place of a GPU that does not hold a model as float32
)
WITHOUT_FLOAT64 = frozenset({"mps"})  # kinds of devices whose float64 sums are made on the CPU


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA if it is there, else the CPU. Raises InputError."""
    DEVICE.checked(name)
    there = {"cuda": gpu_count(), "mps": int(has_mps()), "cpu": 1}
    if name == "auto":  # Apple's GPUs have to be named: that torch has every operator there was not seen
        return torch.device("cuda" if there["cuda"] else "cpu")
    kind, _, number = name.partition(":")
    if int(number or 0) >= there[kind]:  # before torch sees it: it takes 256 for 0
        known = ["cpu", *(f"cuda:{n}" for n in range(there["cuda"])), *(["mps"] if there["mps"] else [])]
        problem = "is not there, or torch cannot use it"
        raise InputError(problem, field="device", value=name, allowed=", ".join(known))
    return torch.device(name)


def gpu_count() -> int:
    """CUDA GPUs that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_mps() -> bool:
    """Whether there is an Apple GPU that torch can use."""
    return bool(torch.backends.mps.is_available())


def placed(model: Any, device: torch.device | str, *, instead: str = CPU.type) -> Any:
    """Move a model from the CPU to a device; raises InputError, which names `instead`, if that cannot hold it."""
    device = torch.device(device)
    if device.type in _FREE_BYTES:
        needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        free = _FREE_BYTES[device.type](device)
        if needed > free:
            sizes = f"{format_bytes(needed)} of the GPU's memory at least, and {format_bytes(free)} are free"
            raise InputError(f"the model takes {sizes}", field="device", value=str(device), allowed=instead)
    return model.to(device)


_FREE_BYTES: Mapping[str, Callable[[torch.device], int]] = MappingProxyType(
    {
        "cuda": lambda device: int(
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        ),
        "mps": lambda device: int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()),
    }
)
"""Kind of a device -> bytes that a model may take of its memory; a CPU's is checked before a model is loaded."""


def exact_device(device: torch.device) -> torch.device:
    """Where float64 sums of what is on a device are kept and solved: there, or on the CPU."""
    return CPU if device.type in WITHOUT_FLOAT64 else device


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as float64, on its `exact_device`."""
    return tensor.to(exact_device(tensor.device)).double()


def exact_sum(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The sum of a tensor, or over a dimension, as float64 on its `exact_device`."""
    return tensor.to(exact_device(tensor.device)).sum(dim, dtype=torch.float64)


def exact_zeros(*shape: int, device: torch.device) -> torch.Tensor:
    """An empty float64 sum of what is on a device."""
    return torch.zeros(*shape, dtype=torch.float64, device=exact_device(device))


@contextmanager
def forked_random(device: torch.device) -> Iterator[None]:
    """Restore the state of the CPU's and a device's random numbers afterwards."""
    own = [device.index or 0] if device.type in _FREE_BYTES else []
    with torch.random.fork_rng(devices=own, device_type=device.type if own else None):
        yield


@contextmanager
def moved(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have a model of the CPU on a device inside the context; raises InputError as `placed`."""
    placed(model, device)
    try:
        yield
    finally:
        model.to(CPU)
