"""The size of a GGUF file of another shape, computed from one file of the same model: nothing is exported.

llama.cpp chooses a tensor's type by its name, its block and the quantization, not by its width, unless a row does not
divide into the type's blocks. So one written file says what every other one of its architecture will weigh.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.models.gguf_file import UNQUANTIZED, GGUFTensor, read_gguf
from exporters.export_record import TensorFallback
from exporters.gguf.architecture import ChosenLayout
from exporters.gguf.matrix import block_of
from exporters.gguf.quants import Quant, find_quant
from exporters.gguf.rope import ROPE_TENSORS
from exporters.gguf.tensors import tensor_specs

_ALIGNMENT = 32
# Where a row does not divide into blocks of 256, llama.cpp stores the right-hand type instead; where it does not even
# divide into blocks of 32, float16.
_FALLBACKS = MappingProxyType(
    {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}
    | dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S"), "IQ4_NL")
)
_SMALL_BLOCK, _LARGE_BLOCK = 32, 256


@dataclass(frozen=True)
class PredictedTensor:
    """A tensor of a file that is not written.

    Attributes:
        name: llama.cpp's name.
        shape: Outermost dimension first.
        kind: Stored type.
        n_bytes: Size without padding.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    n_bytes: int


@dataclass(frozen=True)
class SizeTemplate:
    """What a written file says of others of its model, quantization and architecture.

    Attributes:
        architecture: llama.cpp's.
        overhead_bytes: All that is not a tensor: metadata, vocabulary, names. A name of another length moves it by
            at most one step of the alignment, 32 bytes.
        types: Tensor -> the type that the quantization asks for, before any fallback.
    """

    architecture: str
    overhead_bytes: int
    types: dict[str, str]

    def tensors(self, chosen: ChosenLayout) -> list[PredictedTensor]:
        """The tensors of a model's file, in file order.

        Raises:
            InputError: The template is of another architecture than the model needs.
        """
        if chosen.layout.architecture != self.architecture:
            raise InputError(
                "the size template is of another architecture",
                field="architecture",
                value=self.architecture,
                allowed=chosen.layout.architecture,
            )
        found = []
        for spec in tensor_specs(chosen):
            kind, row_length = self.types[spec.name], spec.shape[-1]
            while row_length % block_of(kind)[0]:
                kind = _FALLBACKS.get(kind, "F16")
            elements, size = block_of(kind)
            found.append(
                PredictedTensor(spec.name, spec.shape, kind, math.prod(spec.shape) // elements * size)
            )
        return found

    def file_bytes(self, chosen: ChosenLayout) -> int:
        """Bytes of a model's file."""
        return self.overhead_bytes + sum(padded(tensor.n_bytes) for tensor in self.tensors(chosen))


def size_template(path: Path, quant: str) -> SizeTemplate:
    """Read a written file.

    Raises:
        InputError: No GGUF file, or an unknown quantization.
    """
    row, file = find_quant(quant), read_gguf(path)
    # Tensors that are made of the config count as overhead: no width changes them.
    tensors = [tensor for tensor in file.tensors if tensor.name not in ROPE_TENSORS]
    types = {t.name: asked_type(str(t.kind.name), t.shape, row, t.name) for t in tensors}
    data = sum(padded(int(tensor.data.nbytes)) for tensor in tensors)
    return SizeTemplate(file.architecture, path.stat().st_size - data, types)


def padded(count: int) -> int:
    """Bytes of a tensor with what fills up to the next."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


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
