"""Which type llama.cpp's quantizer stores where a tensor's rows do not divide into the blocks of the one asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from types import MappingProxyType

import gguf

from cfsp.models.gguf_file import UNQUANTIZED, GGUFTensor
from exporters.export_record import TensorFallback
from exporters.gguf.quants import Quant

# Where a row does not divide into blocks of 256, llama.cpp stores the right-hand type instead; where it does not even
# divide into blocks of 32, float16.
_FALLBACKS = MappingProxyType(
    {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}
    | dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S"), "IQ4_NL")
)
_SMALL_BLOCK, _LARGE_BLOCK = 32, 256


def find_fallbacks(tensors: Iterable[GGUFTensor], quant: Quant) -> tuple[TensorFallback, ...]:
    """Where a file's stored types are not the ones asked for."""
    groups: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for tensor in tensors:
        actual = tensor.kind.name
        asked = asked_type(actual, tensor.shape, quant, tensor.name)
        if asked != actual:
            groups[asked, actual, tensor.shape[-1]].append(tensor.name)
    return tuple(TensorFallback(*key, tuple(names)) for key, names in sorted(groups.items()))


def asked_type(actual: str, shape: tuple[int, ...], quant: Quant, name: str) -> str:
    """The type that a tensor would have been given, had its rows divided into blocks.

    Of several that are stored alike it is the quantization's own, of which most tensors are.
    """
    if len(shape) < 2 or name.endswith(UNQUANTIZED) or quant.is_plain or actual == quant.base_type:
        return actual
    if shape[-1] % _SMALL_BLOCK and actual in ("F16", "F32"):
        return quant.base_type
    if shape[-1] % _LARGE_BLOCK:
        asked = [kind for kind, stored in _FALLBACKS.items() if stored == actual]
        return quant.base_type if quant.base_type in asked else next(iter(asked), actual)
    return actual


def stored_type(asked: str, row_length: int) -> str:
    """The type that rows of this length are stored in."""
    while row_length % block_of(asked)[0]:
        asked = _FALLBACKS.get(asked, "F16")
    return asked


def block_of(kind: str) -> tuple[int, int]:
    """Elements and bytes of a block of a type."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(elements), int(size)
