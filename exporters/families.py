"""The table of families of exports: a new one is a folder with a row, and its name here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cfsp.errors import InputError
from cfsp.progress import Progress
from exporters.export_record import ExportFormat
from exporters.family import ExportFamily
from exporters.gguf.family import GGUF
from exporters.onnx.family import ONNX

if TYPE_CHECKING:
    import torch  # not in the memory of a process that only runs a file

    from cfsp.recovery.rounding import RoundedModel, Rounding

FAMILIES: Mapping[str, ExportFamily] = MappingProxyType({family.name: family for family in (GGUF, ONNX)})
BASE = GGUF
"""The family of which a release always has files."""
DEFAULT_FORMAT = "Q4_0"
"""What is made if nothing is asked for."""


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


class _Rounding:
    """See `cfsp.recovery.rounding.Rounding`: of every family whose rounding can be trained through."""

    def check(self, name: str) -> None:
        """See `Rounding`."""
        self._of(name).check(name)

    def start(
        self, checkpoint: Path, name: str, input_ids: torch.Tensor, device: str, progress: Progress
    ) -> RoundedModel:
        """See `Rounding`."""
        return self._of(name).start(checkpoint, name, input_ids, device, progress)

    def _of(self, name: str) -> Rounding:
        family = family_of(name)
        if family.through is None:
            known = ", ".join(each.title for each in FAMILIES.values() if each.through)
            raise InputError(
                f"{family.title} cannot be trained through", field="for_quant", value=name, allowed=known
            )
        family.require()
        return family.through()


ROUNDING = _Rounding()
"""What recovery asks for formats."""


def makes_gguf(names: Iterable[str]) -> bool:
    """Whether some of the formats are GGUF; if none is named, one is made."""
    return any(map(GGUF.has, tuple(names) or (DEFAULT_FORMAT,)))


def required_multiple(names: Iterable[str]) -> int:
    """Smallest width unit with which no FFN matrix in these formats falls back to a larger type."""
    return math.lcm(*(find_format(name).width_multiple for name in names))
