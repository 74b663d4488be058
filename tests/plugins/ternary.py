"""A quantization of one file: -1, 0 or 1 times a float16 scale for each 16 neighbouring inputs of an output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from exporters.quantize import Grid


@dataclass(frozen=True)
class Ternary:
    """A `QuantizedMatrix`.

    Attributes:
        codes: (rows, columns) int8.
        scales: (rows, blocks) float16.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    grid = Grid((-1.0, 0.0, 1.0), 16)

    @classmethod
    def nearest(cls, weight: torch.Tensor) -> Ternary:
        """Of a weight (rows, columns) whose columns divide into blocks."""
        blocks = weight.view(len(weight), -1, cls.grid.block_size)
        scales = blocks.abs().mean(-1).half()
        codes = (blocks / scales.float()[..., None]).round().clamp(-1, 1)
        return cls(codes.flatten(1).to(torch.int8), scales)

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * self.scales.float().repeat_interleave(self.grid.block_size, 1)

    def scales_and_offsets(self) -> tuple[torch.Tensor, None]:
        return self.scales.float(), None

    def with_codes(self, codes: torch.Tensor, scales: torch.Tensor | None = None) -> Ternary:
        return Ternary(codes.T.to(torch.int8), self.scales if scales is None else scales.half())

    def scaled(self, factors: torch.Tensor) -> Ternary:
        return replace(self, scales=(self.scales.float() * factors).half())

    def pack(self) -> dict[str, torch.Tensor]:
        return {".codes": self.codes, ".scales": self.scales}
