"""Quantize a GGUF file with llama.cpp and say which types really came out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cfsp.models.gguf_file import read_gguf
from exporters.export_record import TensorFallback
from exporters.gguf import llama_library
from exporters.gguf.quants import Quant

# Where a row does not divide into blocks of 256, llama.cpp stores the right-hand type instead; where it does not even
# divide into blocks of 32, float16.
FALLBACKS_ASKED = MappingProxyType({"Q5_0": "Q4_K", "Q5_1": "Q5_K", "Q8_0": "Q6_K"})
_SMALL_BLOCK, _LARGE_BLOCK = 32, 256


@dataclass(frozen=True)
class TypesReport:
    """Stored types of a file.

    Attributes:
        counts: Type -> number of tensors, most frequent first.
        fallbacks: Where the stored type is not the one asked for.
        n_params: Elements of all tensors.
    """

    counts: dict[str, int]
    fallbacks: tuple[TensorFallback, ...]
    n_params: int


def quantize_file(
    source: Path,
    destination: Path,
    quant: Quant,
    *,
    imatrix: Mapping[str, npt.NDArray[np.float32]] | None = None,
    n_threads: int = 1,
) -> None:
    """Quantize a float32 file; raises InputError where llama.cpp refuses."""
    llama_library.quantize(source, destination, quant.ftype, n_threads=n_threads, imatrix=imatrix)


def report_types(path: Path, quant: Quant) -> TypesReport:
    """Read a file's tensor types back.

    Raises:
        InputError: The file is not readable as GGUF.
    """
    counts: dict[str, int] = defaultdict(int)
    groups: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    n_params = 0
    for tensor in read_gguf(path):
        actual = str(tensor.kind.name)
        counts[actual] += 1
        n_params += int(np.prod(tensor.shape))
        asked = asked_type(actual, tensor.shape, quant)
        if asked != actual:
            groups[asked, actual, tensor.shape[-1]].append(tensor.name)
    fallbacks = tuple(
        TensorFallback(asked, actual, row, tuple(names))
        for (asked, actual, row), names in sorted(groups.items())
    )
    return TypesReport(
        dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), fallbacks, n_params
    )


def asked_type(actual: str, shape: tuple[int, ...], quant: Quant) -> str:
    """The type that a tensor would have been given, had its rows divided into blocks."""
    if len(shape) < 2 or quant.base_type in ("F32", "F16") or actual == quant.base_type:
        return actual
    if shape[-1] % _SMALL_BLOCK and actual in ("F16", "F32"):
        return quant.base_type
    if shape[-1] % _LARGE_BLOCK:
        return FALLBACKS_ASKED.get(actual, actual)
    return actual
