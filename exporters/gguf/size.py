"""The size of a GGUF file of another shape, computed from one file of the same model: nothing is exported.

llama.cpp chooses a tensor's type by its name, its block and the quantization, not by its width, unless a row does not
divide into the type's blocks. So one written file says what every other one of its architecture will weigh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import gguf

from cfsp.errors import InputError
from cfsp.models.gguf_file import read_gguf
from cfsp.models.shape import ModelShape
from exporters.checkpoint_reader import CheckpointTensors, ModelConfig, read_config
from exporters.gguf.architecture import ChosenLayout, choose_layout, tensor_specs
from exporters.gguf.quantize import FALLBACKS_ASKED, asked_type
from exporters.gguf.quants import find_quant

_ALIGNMENT = 32
_FALLBACKS = {asked: stored for stored, asked in FALLBACKS_ASKED.items()}


@dataclass(frozen=True)
class SizeTemplate:
    """What a written file says of others of its model, quantization and architecture.

    Attributes:
        quant: The quantization.
        architecture: llama.cpp's.
        overhead_bytes: All that is not a tensor: metadata, vocabulary, names. A name of another length moves it by
            at most one step of the alignment, 32 bytes.
        types: Tensor -> the type that the quantization asks for, before any fallback.
    """

    quant: str
    architecture: str
    overhead_bytes: int
    types: dict[str, str]


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
class FileShape:
    """A model, as far as the sizes of its files depend on it.

    Attributes:
        config: The model; its shape is replaced.
        stored: Names of the checkpoint's tensors.
    """

    config: ModelConfig
    stored: frozenset[str]

    def architecture(self, shape: ModelShape) -> str:
        """llama.cpp's architecture for a shape."""
        return self._chosen(shape)[1].layout.architecture

    def tensors(self, template: SizeTemplate, shape: ModelShape) -> list[PredictedTensor]:
        """The tensors of a file of this shape, in file order.

        Raises:
            InputError: The template is of another architecture than this shape needs.
        """
        config, chosen = self._chosen(shape)
        if chosen.layout.architecture != template.architecture:
            raise InputError(
                "the size template is of another architecture",
                field="architecture",
                value=template.architecture,
                allowed=chosen.layout.architecture,
            )
        specs = tensor_specs(config, chosen, set(self.stored))
        return [_tensor(spec.name, spec.shape, template.types[spec.name]) for spec in specs]

    def file_bytes(self, template: SizeTemplate, shape: ModelShape) -> int:
        """Bytes of a file of this shape."""
        return template.overhead_bytes + sum(_padded(t.n_bytes) for t in self.tensors(template, shape))

    def _chosen(self, shape: ModelShape) -> tuple[ModelConfig, ChosenLayout]:
        config = replace(self.config, shape=self.config.shape.with_ffn_widths(shape.ffn_widths))
        return config, choose_layout(config, set(self.stored))


def read_shape(checkpoint: Path) -> FileShape:
    """The shape of a checkpoint's files; its FFN widths do not matter.

    Raises:
        InputError: No usable checkpoint.
    """
    with CheckpointTensors(checkpoint) as tensors:
        return FileShape(read_config(checkpoint), frozenset(tensors.names()))


def size_template(path: Path, quant: str) -> SizeTemplate:
    """Read a written file.

    Raises:
        InputError: No GGUF file, or an unknown quantization.
    """
    row, file = find_quant(quant), read_gguf(path)
    # The tensor that is made of the config counts as overhead: no width changes it.
    tensors = [tensor for tensor in file.tensors if tensor.name != "rope_freqs.weight"]
    types = {t.name: asked_type(str(t.kind.name), t.shape, row) for t in tensors}
    data = sum(_padded(int(tensor.data.nbytes)) for tensor in tensors)
    return SizeTemplate(row.name, file.architecture, path.stat().st_size - data, types)


def _tensor(name: str, shape: tuple[int, ...], asked: str) -> PredictedTensor:
    kind = asked
    while shape[-1] % _block(kind)[0]:
        kind = _FALLBACKS.get(kind, "F16")
    block, size = _block(kind)
    return PredictedTensor(name, shape, kind, math.prod(shape) // block * size)


def _block(kind: str) -> tuple[int, int]:
    """Elements and bytes of a block."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(elements), int(size)


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
