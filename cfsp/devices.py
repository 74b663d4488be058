"""Where torch computes: the names that users give, and what they mean on this machine.

A model is put on a device when it is loaded; what reads it takes its device from its weights, keeps sums there, and
brings to the CPU what goes into files and records. Sums that need float64 are made by `exact`, `exact_sum` and
`exact_zeros`, which know devices that have none.
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
OR_NARROW = "cpu, or 16 bits (--dtype)"
"""Instead of a GPU that does not hold a model as float32, where a command may keep its weights in fewer bytes."""
WITHOUT_FLOAT64 = frozenset({"mps"})
"""Kinds of devices that have none: float64 sums of what is there, and what is solved from them, are the CPU's."""


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where that is there, else the CPU.

    Raises:
        InputError: An unknown name, or a GPU that is not there.
    """
    DEVICE.checked(name)
    there = {"cuda": gpu_count(), "mps": int(has_mps()), "cpu": 1}
    if name == "auto":  # Apple's GPUs want to be named: that torch has every operator there was not seen
        return torch.device("cuda" if there["cuda"] else "cpu")
    kind, _, number = name.partition(":")
    if int(number or 0) >= there[kind]:  # before torch sees it: it takes 256 for 0
        known = ["cpu", *(f"cuda:{n}" for n in range(there["cuda"])), *(["mps"] if there["mps"] else [])]
        raise InputError(
            "is not there, or torch cannot use it", field="device", value=name, allowed=", ".join(known)
        )
    return torch.device(name)


def gpu_count() -> int:
    """GPUs that torch can use; a driver may know more."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_mps() -> bool:
    """Whether there is an Apple GPU that torch can use."""
    return bool(torch.backends.mps.is_available())


def placed(model: Any, device: torch.device | str, *, instead: str = CPU.type) -> Any:
    """A model of the CPU on a device.

    Args:
        instead: What the user can ask for where there is no room.

    Raises:
        InputError: The device's memory does not hold it.
    """
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
"""Kind of a device -> what a model may take of its memory; a CPU is asked before a model is loaded."""


def exact_device(device: torch.device) -> torch.device:
    """Where float64 sums of what is on a device are kept, and solved: there, or on the CPU where it has no float64."""
    return CPU if device.type in WITHOUT_FLOAT64 else device


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as float64, on its `exact_device`."""
    return tensor.to(exact_device(tensor.device)).double()


def exact_sum(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The sum of a tensor, or over one of its dimensions, in float64 and on its `exact_device`."""
    return tensor.to(exact_device(tensor.device)).sum(dim, dtype=torch.float64)


def exact_zeros(*shape: int, device: torch.device) -> torch.Tensor:
    """A float64 sum of what is on a device, of which nothing is summed yet."""
    return torch.zeros(*shape, dtype=torch.float64, device=exact_device(device))


@contextmanager
def forked_random(device: torch.device) -> Iterator[None]:
    """Leave the state of the CPU's random numbers, and of a device's, as it was."""
    own = [device.index or 0] if device.type in _FREE_BYTES else []
    with torch.random.fork_rng(devices=own, device_type=device.type if own else None):
        yield


@contextmanager
def moved(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have a model of the CPU on a device while the context is open; raises InputError as `placed`."""
    placed(model, device)
    try:
        yield
    finally:
        model.to(CPU)
