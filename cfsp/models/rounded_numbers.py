"""Numbers of few bits that a checkpoint's weights stand for after training through their rounding (QAT).

Beside the weights lies what a file of one format holds, tensor by tensor as that format stores it, so that an export
writes these very numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from cfsp.models.weights import read_safetensors
from cfsp.records import Record, read_record

_RECORD, _TENSORS = "rounded.json", "rounded.safetensors"


@dataclass(frozen=True)
class RoundedFormat:
    """What the numbers are."""

    KIND: ClassVar[str] = "rounded"
    SCHEMA_VERSION: ClassVar[int] = 1

    format: str  # what export calls it
    types: dict[str, str]  # tensor of a GGUF file, or layer of an ONNX variant -> how it is stored
    predicted_loss: float | None  # nats a token that the types cost, if they were chosen by that


@dataclass(frozen=True)
class RoundedNumbers:
    """A file's matrices."""

    format: RoundedFormat
    # Name -> a GGUF matrix's bytes, (rows, bytes of a row) uint8; or an ONNX layer's numbers and scales.
    tensors: Mapping[str, torch.Tensor]

    @property
    def files(self) -> dict[str, Record | Mapping[str, torch.Tensor]]:
        """For `save_checkpoint`, beside the weights."""
        return {_RECORD: self.format, _TENSORS: self.tensors}


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
