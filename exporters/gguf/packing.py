"""How ggml's types store numbers: a code for each, beside the scales of its block.

Q8_0 is not here: it loses nothing that choosing its codes with care could win back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from exporters.gguf.fallbacks import block_of
from exporters.gguf.llama_library import FloatArray, dequantized
from exporters.quantize.grid import Grid

Bytes = npt.NDArray[np.uint8]


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

    def write(self, blocks: Bytes, codes: Bytes) -> None:
        """Put codes (blocks, elements) into blocks (blocks, bytes)."""
        for plane in self.planes:
            plane.write(blocks, codes)
            codes = np.right_shift(codes, plane.bits, dtype=np.uint8)


def _grid(least: int, bits: int, block_size: int, *, free_scales: bool = False) -> Grid:
    codes = tuple(float(least + code) for code in range(1 << bits))
    return Grid(codes, block_size, free_scales=free_scales)


_SMALL = 32
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
"""Types in which one code stands for four or eight numbers: ggml alone can round a block of them."""
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
    """A matrix in one of ggml's types.

    Attributes:
        kind: ggml's name of it.
        data: (rows, bytes of a row).
    """

    kind: str
    data: Bytes

    @property
    def packing(self) -> Packing:
        """How it is stored, if it is one of `PACKINGS`."""
        return PACKINGS[self.kind]

    def values(self) -> FloatArray:
        """What a runtime computes with, (rows, columns) float32."""
        return dequantized(self.data, self.kind)

    def scales_and_offsets(self) -> tuple[FloatArray, FloatArray]:
        """Of every block of the grid, (rows, blocks) float32: what the first and the last code stand for tells both."""
        codes = self.packing.grid.codes
        first, last = (self._of_one_code(code) for code in (0, len(codes) - 1))
        scales = (last - first) / (codes[-1] - codes[0])
        return scales, first - codes[0] * scales

    def with_codes(self, codes: Bytes, scales: FloatArray | None = None) -> StoredMatrix:
        """The matrix of other numbers.

        Args:
            codes: (rows, columns), counted from the grid's first.
            scales: Of blocks, (rows, blocks), exact in float16; None leaves them as they are.
        """
        elements, size = block_of(self.kind)
        blocks = self.data.reshape(-1, size).copy()
        self.packing.write(blocks, codes.reshape(-1, elements))
        if scales is not None:
            blocks[:, :2] = scales.astype(np.float16).reshape(-1, 1).view(np.uint8)
        return StoredMatrix(self.kind, blocks.reshape(self.data.shape))

    def scaled(self, factors: FloatArray) -> StoredMatrix:
        """The matrix whose blocks are multiplied, but for what float16 rounds; one of `SCALES`.

        Args:
            factors: Of every block of ggml's, (rows, blocks), or (rows, 1) of all blocks of a row.
        """
        _, size = block_of(self.kind)
        blocks = self.data.reshape(len(factors), -1, size).copy()
        for offset in SCALES[self.kind]:
            place = blocks[:, :, offset : offset + 2]
            scales = np.ascontiguousarray(place).view(np.float16) * factors[:, :, None]
            place[:] = scales.astype(np.float16).view(np.uint8)
        return StoredMatrix(self.kind, blocks.reshape(self.data.shape))

    def _of_one_code(self, code: int) -> FloatArray:
        elements, size = block_of(self.kind)
        columns = self.data.shape[1] // size * elements
        values = self.with_codes(np.full((len(self.data), columns), code, np.uint8)).values()
        return values[:, :: self.packing.grid.block_size]
