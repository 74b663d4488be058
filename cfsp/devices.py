"""Where torch computes: the names that users give, and what they mean on this machine.

A model is put on a device when it is loaded; what reads it takes its device from its weights, keeps sums there, and
brings to the CPU what goes into files and records.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.settings import DEVICES

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        InputError: An unknown name, or a GPU that is not there. Apple's MPS has no float64, which sums need.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(DEVICES, name) is None:
        raise InputError("unknown", field="device", value=name, allowed="auto, cpu, cuda or cuda:N")
    kind, _, number = name.partition(":")
    there = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) >= there:  # before torch sees it: it takes 256 for 0
        known = "cpu" if not there else f"cpu, cuda:0 to cuda:{there - 1}"
        raise InputError(
            "is not there, or torch was built without it", field="device", value=name, allowed=known
        )
    return torch.device(name)


@contextmanager
def moved(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have a model of the CPU on a device while the context is open."""
    model.to(device)
    try:
        yield
    finally:
        model.to(CPU)
