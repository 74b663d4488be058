"""Matrices of few bits in ONNX graphs. Tensors in, tensors out.

*Blocks*: `block_size` neighbouring inputs of one output. A block's numbers are stored as q in 0 .. 2^bits - 1 with

    w = (q - 2^(bits-1)) * scale

which is ONNX Runtime's symmetric MatMulNBits without stored zero points. *Rows* of int8 are what MatMulInteger reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from exporters.onnx.variants import BlockFormat
from exporters.quantize import Grid

_ROWS = 128  # rows whose scales are looked for at once: they stay in the cache
# 1 is among them: a block that lies on a grid already is kept.
_FACTORS = tuple(round(0.7 + 0.025 * i, 3) for i in range(15))
_LARGEST, ZERO_OF_ROWS = 127, 128


@dataclass(frozen=True)
class Rounded:
    """A matrix of blocks: see `exporters.quantize.QuantizedMatrix`."""

    q: torch.Tensor  # (rows, blocks, block_size) uint8
    scales: torch.Tensor  # (rows, blocks) float16; a graph casts them when it is loaded
    columns: int  # inputs before padding
    form: BlockFormat

    @property
    def grid(self) -> Grid:
        return Grid(tuple(map(float, range(-self.form.half, self.form.half))), self.form.block_size)

    def dequantize(self) -> torch.Tensor:
        values = (self.q.float() - self.form.half) * self.scales.float()[..., None]
        return values.flatten(1)[:, : self.columns]

    def scales_and_offsets(self) -> tuple[torch.Tensor, None]:
        return self.scales.float(), None

    def with_codes(self, codes: torch.Tensor, scales: torch.Tensor | None = None) -> Rounded:
        q = self.q.flatten(1).clone()
        q[:, : self.columns] = (codes + self.form.half).to(torch.uint8).T
        scales = self.scales if scales is None else scales.half()
        return replace(self, q=q.view_as(self.q), scales=scales)

    def scaled(self, factors: torch.Tensor) -> Rounded:
        return replace(self, scales=(self.scales.float() * factors).half())

    def pack(self) -> dict[str, torch.Tensor]:
        return {".q": self.q, ".scales": self.scales}

    def packed(self) -> torch.Tensor:
        """q as MatMulNBits reads it, (rows, blocks, block_size * bits / 8); of two 4-bit numbers the first is low."""
        return self.q if self.form.bits == 8 else self.q[..., 0::2] | (self.q[..., 1::2] << 4)

    @classmethod
    def from_packed(cls, data: torch.Tensor, scales: torch.Tensor, columns: int, bits: int) -> Rounded:
        """What `packed` has made of it."""
        q = data if bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(-2)
        return cls(q, scales, columns, BlockFormat(bits, q.shape[-1]))

    @classmethod
    def unwritten(cls, shape: Sequence[int], form: BlockFormat) -> Rounded:
        """One without numbers, on torch's meta device."""
        (rows, columns), size = shape, form.block_size
        q = torch.empty(rows, -(-columns // size), size, dtype=torch.uint8, device="meta")
        return cls(q, torch.empty(q.shape[:2], dtype=torch.float16, device="meta"), columns, form)

    def rows(self, rows: slice) -> Rounded:
        """Some of its rows."""
        return replace(self, q=self.q[rows], scales=self.scales[rows])

    def to(self, device: torch.device) -> Rounded:
        """It on a device."""
        return replace(self, q=self.q.to(device), scales=self.scales.to(device))


def round_to_nearest(
    weight: torch.Tensor, form: BlockFormat, importance: torch.Tensor | None = None
) -> Rounded:
    """Numbers (rows, columns) to their nearest, with scales that lose least; by importance (columns,), if given."""

    def in_blocks(matrix: torch.Tensor) -> torch.Tensor:
        """(rows, columns) -> (rows, blocks, block_size), padded with zeros."""
        padding = -matrix.shape[1] % form.block_size
        return torch.nn.functional.pad(matrix.float(), (0, padding)).view(len(matrix), -1, form.block_size)

    blocks = in_blocks(weight)
    counts = in_blocks((weight.new_ones(weight.shape[1]) if importance is None else importance)[None])[0]
    scales = torch.cat([_best_scales(rows, counts, form) for rows in torch.split(blocks, _ROWS)])
    q = (blocks / scales[..., None]).round().add(form.half).clamp(0, 2 * form.half - 1).to(torch.uint8)
    return Rounded(q, scales.half(), weight.shape[1], form)


def joined(parts: Sequence[Rounded]) -> Rounded:
    """Matrices of one format and the same inputs as one, their rows after each other."""
    first = parts[0]
    return replace(first, q=torch.cat([p.q for p in parts]), scales=torch.cat([p.scales for p in parts]))


def _best_scales(blocks: torch.Tensor, counts: torch.Tensor, form: BlockFormat) -> torch.Tensor:
    """(rows, blocks) scales, exact in float16: a block's extreme, as q = 0, times the factor that loses least."""
    half = form.half
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    base = -largest / half
    base = torch.where(base == 0, torch.ones_like(base), base)
    best, lowest = base, torch.full_like(base, torch.inf)
    steps, numbers = torch.empty_like(blocks), torch.empty_like(blocks)
    for factor in _FACTORS:
        scale = base * factor
        torch.div(blocks, scale[..., None], out=steps)
        torch.round(steps, out=numbers).clamp_(-half, half - 1)
        loss = steps.sub_(numbers).square_().mul_(counts).sum(-1) * scale.square()
        best = torch.where(loss < lowest, scale, best)
        lowest = torch.minimum(loss, lowest)
    best = best.half().float()
    return torch.where(best == 0, torch.ones_like(best), best)  # less than float16 holds: zeros


class Int8Rows(NamedTuple):
    """A matrix in int8 with a scale for each row: w = (data - 128) * scale."""

    data: torch.Tensor  # (rows, columns) uint8
    scales: torch.Tensor  # (rows,) float32

    def dequantize(self) -> torch.Tensor:
        return (self.data.float() - ZERO_OF_ROWS) * self.scales[:, None]


def round_rows(weight: torch.Tensor) -> Int8Rows:
    """The nearest numbers; a row of zeros has the scale one."""
    largest = weight.detach().float().abs().amax(dim=1)
    scales = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    data = (weight.detach().float() / scales[:, None]).round().add(ZERO_OF_ROWS).to(torch.uint8)
    return Int8Rows(data, scales)
