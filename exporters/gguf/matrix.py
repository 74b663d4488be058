"""Matrices in ggml's types: a code for each number, beside the scales of its block; and ggml's own quantizer.

Q8_0 has no row in `PACKINGS`: it loses nothing that choosing its codes with care could win back.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError
from exporters.gguf.runtime import FloatArray, library, log
from exporters.quantize import Grid
from exporters.quantize.rounding import fit, gptq_blocks

Bytes = npt.NDArray[np.uint8]
_FLOATS = ctypes.POINTER(ctypes.c_float)
_SMALL = 32


@dataclass(frozen=True)
class Plane:
    """Some bits of every code of a block.

    Codes come in runs. The first codes of a run have the lowest bits of its bytes, one each; the next ones the bits
    above these, from the first byte on.

    Attributes:
        offset: Its first byte in the block.
        bits: Of a code.
        run: Codes in a run.
    """

    offset: int
    bits: int
    run: int

    def write(self, blocks: Bytes, codes: Bytes) -> None:
        """Put the lowest bits of codes (blocks, elements) in their place."""
        low = codes & ((1 << self.bits) - 1)
        layers = low.reshape(len(blocks), -1, 8 // self.bits, self.run * self.bits // 8)
        packed = np.zeros_like(layers[:, :, 0])
        for place in range(8 // self.bits):
            packed |= layers[:, :, place] << (self.bits * place)
        flat = packed.reshape(len(blocks), -1)
        blocks[:, self.offset : self.offset + flat.shape[1]] = flat


@dataclass(frozen=True)
class Packing:
    """A type.

    Attributes:
        grid: What its blocks can hold; free scales are a float16 at the beginning of each block.
        planes: Where codes are, counted from the grid's first; lowest bits first.
    """

    grid: Grid
    planes: tuple[Plane, ...]


def _grid(least: int, bits: int, block_size: int, *, free_scales: bool = False) -> Grid:
    codes = tuple(float(least + code) for code in range(1 << bits))
    return Grid(codes, block_size, free_scales=free_scales)


_UNEVEN = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
# Places as in ggml-common.h and the dequantize_row_* functions of ggml-quants.c.
PACKINGS: Mapping[str, Packing] = MappingProxyType(
    {
        "Q4_0": Packing(_grid(-8, 4, _SMALL, free_scales=True), (Plane(2, 4, 32),)),
        "Q4_1": Packing(_grid(0, 4, _SMALL, free_scales=True), (Plane(4, 4, 32),)),
        "Q5_0": Packing(_grid(-16, 5, _SMALL, free_scales=True), (Plane(6, 4, 32), Plane(2, 1, 8))),
        "Q5_1": Packing(_grid(0, 5, _SMALL, free_scales=True), (Plane(8, 4, 32), Plane(4, 1, 8))),
        "IQ4_NL": Packing(Grid(_UNEVEN, _SMALL), (Plane(2, 4, 32),)),
        "IQ4_XS": Packing(Grid(_UNEVEN, _SMALL, free_scales=False), (Plane(8, 4, 32),)),
        "Q2_K": Packing(_grid(0, 2, 16), (Plane(16, 2, 128),)),
        "Q3_K": Packing(_grid(-4, 3, 16), (Plane(32, 2, 128), Plane(0, 1, 256))),
        "Q4_K": Packing(_grid(0, 4, 32), (Plane(16, 4, 64),)),
        "Q5_K": Packing(_grid(0, 5, 32), (Plane(48, 4, 64), Plane(16, 1, 256))),
        "Q6_K": Packing(_grid(-32, 6, 16), (Plane(0, 4, 128), Plane(128, 2, 128))),
    }
)
"""ggml's name -> how it is stored."""
WHOLE_BLOCKS = ("IQ3_S", "IQ3_XXS", "IQ2_S")
"""Types in which one code stands for four or eight numbers: only ggml can round a block of them, and its numbers are of
no use without an importance matrix."""
SCALES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("F16", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", *WHOLE_BLOCKS), (0,)),
        **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
    }
)
"""ggml's name -> where float16 numbers are to which everything in the block is proportional."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in one of ggml's types: see `exporters.quantize.QuantizedMatrix`.

    Attributes:
        kind: ggml's name of it.
        data: (rows, bytes of a row).
    """

    kind: str
    data: Bytes

    @classmethod
    def nearest(cls, values: FloatArray, kind: str, importance: FloatArray | None) -> StoredMatrix:
        """As ggml rounds it.

        Args:
            values: (rows, in_features) float32; rows divide into the type's blocks.
            kind: ggml's name of the type.
            importance: Mean squared inputs, (in_features,); ggml ends the process for a type that wants some.
        """
        elements, size = block_of(kind)
        rows, columns = values.shape
        values = np.ascontiguousarray(values, dtype=np.float32)
        weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
        data = np.empty((rows, columns // elements * size), dtype=np.uint8)
        address = None if weights is None else weights.ctypes.data_as(_FLOATS)
        number, source = int(gguf.GGMLQuantizationType[kind]), values.ctypes.data_as(_FLOATS)
        _quantize_chunk()(number, source, data.ctypes.data, 0, rows, columns, address)
        return cls(kind, data)

    @property
    def grid(self) -> Grid:
        """Of one of `PACKINGS`."""
        return PACKINGS[self.kind].grid

    def values(self) -> FloatArray:
        """What a runtime computes with, (rows, columns) float32."""
        return np.asarray(gguf.dequantize(self.data, gguf.GGMLQuantizationType[self.kind]), dtype=np.float32)

    def dequantize(self) -> torch.Tensor:
        """See `QuantizedMatrix`."""
        return torch.from_numpy(np.ascontiguousarray(self.values()))

    def scales_and_offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `QuantizedMatrix`: what the first and the last code stand for tells both."""
        codes = self.grid.codes
        elements, size = block_of(self.kind)
        columns = self.data.shape[1] // size * elements
        first, last = (
            self._with_places(np.full((len(self.data), columns), code, np.uint8)).dequantize()[
                :, :: self.grid.block_size
            ]
            for code in (0, len(codes) - 1)
        )
        scales = (last - first) / (codes[-1] - codes[0])
        return scales, first - codes[0] * scales

    def with_codes(self, codes: torch.Tensor, scales: torch.Tensor | None = None) -> StoredMatrix:
        """See `QuantizedMatrix`; scales are exact in float16."""
        places = torch.searchsorted(codes.new_tensor(self.grid.codes), codes.T.contiguous()).to(torch.uint8)
        return self._with_places(places.cpu().numpy(), None if scales is None else scales.cpu().numpy())

    def _with_places(self, places: Bytes, scales: FloatArray | None = None) -> StoredMatrix:
        """With codes (rows, columns), counted from the grid's first."""
        elements, size = block_of(self.kind)
        blocks, codes = self.data.reshape(-1, size).copy(), places.reshape(-1, elements)
        for plane in PACKINGS[self.kind].planes:
            plane.write(blocks, codes)
            codes = np.right_shift(codes, plane.bits, dtype=np.uint8)
        if scales is not None:
            blocks[:, :2] = scales.astype(np.float16).reshape(-1, 1).view(np.uint8)
        return StoredMatrix(self.kind, blocks.reshape(self.data.shape))

    def scaled(self, factors: torch.Tensor) -> StoredMatrix:
        """See `QuantizedMatrix`; of one of `SCALES`, but for what float16 rounds."""
        _, size = block_of(self.kind)
        blocks = self.data.reshape(len(factors), -1, size).copy()
        for offset in SCALES[self.kind]:
            place = blocks[:, :, offset : offset + 2]
            scales = np.ascontiguousarray(place).view(np.float16) * factors.numpy()[:, :, None]
            place[:] = scales.astype(np.float16).view(np.uint8)
        return StoredMatrix(self.kind, blocks.reshape(self.data.shape))

    def pack(self) -> dict[str, torch.Tensor]:
        """See `QuantizedMatrix`."""
        return {"": torch.from_numpy(np.array(self.data))}


def choose_numbers(weight: torch.Tensor, stored: StoredMatrix, gram: torch.Tensor) -> StoredMatrix:
    """A matrix of the same type, one of `PACKINGS` or `WHOLE_BLOCKS`, that is closer to a weight: see `fit`."""
    if stored.kind in PACKINGS:
        return fit(weight, stored, gram)
    elements, size = block_of(stored.kind)
    data = stored.data.reshape(len(weight), -1, size).copy()
    importance = floored(gram.diagonal().float().cpu().numpy()).reshape(-1, elements)

    def rounded(block: int, values: torch.Tensor) -> torch.Tensor:
        found = StoredMatrix.nearest(values.cpu().numpy(), stored.kind, importance[block])
        data[:, block] = found.data
        return found.dequantize().to(values.device)

    gptq_blocks(weight, gram, elements, rounded)
    return StoredMatrix(stored.kind, data.reshape(stored.data.shape))


def floored(moments: FloatArray) -> FloatArray:
    """Mean squared inputs as importances: one that never fired must still count, or its weights become arbitrary."""
    least = 1e-6 * float(moments.mean()) or 1.0
    return np.maximum(moments, least).astype(np.float32)


def block_of(kind: str) -> tuple[int, int]:
    """Elements and bytes of a block of a type."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(elements), int(size)


@functools.cache
def _quantize_chunk() -> Any:
    """ggml's own function, which the quantizer calls for a tensor's rows."""
    library()
    from llama_cpp._ggml import libggml

    function = libggml.ggml_quantize_chunk
    integer = ctypes.c_int64
    function.argtypes = [ctypes.c_int, _FLOATS, ctypes.c_void_p, integer, integer, integer, _FLOATS]
    function.restype = ctypes.c_size_t
    return function


def quantize(
    source: Path,
    destination: Path,
    ftype: int,
    *,
    n_threads: int = 1,
    imatrix: Mapping[str, FloatArray] | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Quantize a float32 or float16 GGUF file with llama.cpp's quantizer.

    Args:
        source: The file to read.
        destination: The file to write.
        ftype: llama.cpp's `llama_ftype`, see exporters.gguf.quants.
        n_threads: Threads.
        imatrix: Tensor name to the mean squared input of each of its input channels, (in_features,) float32.
        types: Tensor name to a ggml type, of tensors that get another than the `ftype` says.

    Raises:
        InputError: llama.cpp refuses; the message has its reason.
        MissingExtraError: llama-cpp-python is not installed.
    """
    lib, imatrix, types = library(), imatrix or {}, types or {}
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, n_threads
    # Each list ends with an entry without a name; what entries point to must live as long as they do.
    entries, keep_alive = (lib.llama_model_imatrix_data * (len(imatrix) + 1))(), []
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        data, raw = np.ascontiguousarray(values, dtype=np.float32), name.encode()
        entry.name, entry.size, entry.data = raw, data.size, data.ctypes.data_as(_FLOATS)
        keep_alive += [data, raw]
    if imatrix:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(lib.llama_model_imatrix_data))
    overrides = (lib.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(overrides, types.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), int(gguf.GGMLQuantizationType[kind])
    if types:
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(lib.llama_model_tensor_override))
    log.clear()
    status = lib.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(params))
    del keep_alive
    if status != 0:
        raise InputError(f"llama.cpp cannot quantize {source.name}: {log.last()}")
