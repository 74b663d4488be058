"""Numbers of few bits that a checkpoint's weights stand for, where training has gone through their rounding.

Beside the weights lies what a file of one format holds of them, tensor by tensor as that format stores it, so that an
export writes these very numbers. Whoever reads the weights alone reads what they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch

from cfsp.models.weights import read_safetensors
from cfsp.records import read_record, write_record

_RECORD, _TENSORS = "rounded.json", "rounded.safetensors"


@dataclass(frozen=True)
class RoundedFormat:
    """What the numbers are."""

    KIND: ClassVar[str] = "rounded"
    SCHEMA_VERSION: ClassVar[int] = 1

    format: str  # what export calls it
    types: dict[str, str]  # tensor of a GGUF file, or layer of an ONNX variant -> how it is stored
    # Nats a token that the types cost, as predicted when they were chosen; None where they were not.
    predicted_loss: float | None


@dataclass(frozen=True)
class RoundedNumbers:
    """A file's matrices."""

    format: RoundedFormat  # what they are
    # Name -> what is stored: of a GGUF file a matrix's bytes, (rows, bytes of a row) uint8; of an ONNX variant a
    # layer's numbers and scales, as `exporters.onnx.matrix.Rounded` has them.
    tensors: Mapping[str, torch.Tensor]

    def save(self, folder: Path) -> None:
        """Write them into a folder that appears in one piece."""
        safetensors.torch.save_file(dict(self.tensors), folder / _TENSORS)
        write_record(folder / _RECORD, self.format)


def read_rounded_format(folder: Path) -> RoundedFormat | None:
    """What a checkpoint's are; None where it has none. Raises InputError where the record is damaged."""
    file = folder / _RECORD
    return read_record(RoundedFormat, file) if file.is_file() else None


def read_rounded(folder: Path, name: str) -> RoundedNumbers | None:
    """A checkpoint's numbers of a format; None where it has none of it. Raises InputError where they are damaged."""
    found = read_rounded_format(folder)
    if found is None or found.format != name:
        return None
    return RoundedNumbers(found, read_safetensors(folder / _TENSORS))
