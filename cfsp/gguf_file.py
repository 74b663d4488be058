"""Reading GGUF files: metadata as plain values, tensors dequantized; damage becomes one clear line."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from cfsp.errors import InputError

__all__ = ["GGUFFile", "GGUFTensor", "read_gguf"]

_MAGIC = b"GGUF"


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor as it is stored.

    Attributes:
        name: llama.cpp's name, such as "blk.0.ffn_up.weight".
        shape: Outermost dimension first, as torch has it.
        tensor: The gguf package's view of the data.
    """

    name: str
    shape: tuple[int, ...]
    tensor: Any

    def dequantize(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The values, (shape) float32, in memory of their own."""
        try:
            values = gguf.dequantize(self.tensor.data, self.tensor.tensor_type)
        except NotImplementedError as error:
            raise InputError(
                f"tensor {self.name} is stored in a type that cannot be dequantized",
                field="tensor type",
                value=self.tensor.tensor_type.name,
            ) from error
        return np.array(values, dtype=np.float32).reshape(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensors of a GGUF file; the tensors stay on disk until they are dequantized."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's architecture name."""
        return str(self.require("general.architecture"))

    def require(self, key: str) -> Any:
        """A metadata value; raises InputError where it is missing."""
        if key not in self.metadata:
            raise InputError(f"{self.path} lacks the GGUF metadata key {key}")
        return self.metadata[key]

    def hyperparameter(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def __iter__(self) -> Iterator[GGUFTensor]:
        """Over the tensors, in file order."""
        return iter(self.tensors)


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file.

    Raises:
        InputError: Not there, not GGUF, damaged, or cut short.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if magic != _MAGIC:
        raise InputError(f"{path} is not a GGUF file (it does not start with {_MAGIC.decode()})")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
        }
        tensors = tuple(
            GGUFTensor(t.name, tuple(int(n) for n in reversed(t.shape.tolist())), t) for t in reader.tensors
        )
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise InputError(
            f"{path} is damaged or cut short and cannot be read as GGUF: {_one_line(error)}"
        ) from error
    return GGUFFile(path, metadata, tensors)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
