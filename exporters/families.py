"""The table of families of exports: a new one is a folder with a row, and its name here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from cfsp.errors import InputError
from exporters.export_record import ExportFormat
from exporters.family import ExportFamily
from exporters.gguf.family import GGUF
from exporters.onnx.family import ONNX

FAMILIES: Mapping[str, ExportFamily] = MappingProxyType({family.name: family for family in (GGUF, ONNX)})
BASE = GGUF
"""The family of which a release always has files."""
DEFAULT_FORMAT = "Q4_0"
"""What is made where nothing is asked for."""


def family_of(name: str) -> ExportFamily:
    """The family that has a format, in whatever case it is written.

    Raises:
        InputError: None has; the message names the known ones.
    """
    for family in FAMILIES.values():
        if family.has(name):
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.names)
    raise InputError("unknown quantization or variant", field="files", value=name, allowed=known)


def find_format(name: str) -> ExportFormat:
    """The row of a format; raises InputError as `family_of`."""
    return family_of(name).find(name)


def makes_gguf(names: Iterable[str]) -> bool:
    """Whether some of the formats are GGUF; where none is named, one is made."""
    return any(map(GGUF.has, tuple(names) or (DEFAULT_FORMAT,)))


def required_multiple(names: Iterable[str]) -> int:
    """Smallest width unit with which no FFN matrix in these formats falls back to a larger type."""
    return math.lcm(*(find_format(name).width_multiple for name in names))
