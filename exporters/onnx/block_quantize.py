"""Matrices in blocks of few bits: rounding to nearest, and GPTQ. Tensors in, tensors out.

A block is `block_size` neighbouring inputs of one output. Its numbers are stored as q in 0 .. 2^bits - 1 with

    w = (q - 2^(bits-1)) * scale

which is ONNX Runtime's symmetric MatMulNBits without stored zero points.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from exporters.onnx.variants import BlockFormat
from exporters.quantize.gptq import gptq_codes
from exporters.quantize.refine import refine_codes

_ROWS = 128
"""Rows whose scales are looked for at once: they stay in the cache."""
# 1 is among them: a block that lies on a grid already is kept.
_FACTORS = tuple(round(0.7 + 0.025 * i, 3) for i in range(15))


@dataclass(frozen=True)
class Rounded:
    """A matrix of few bits.

    Attributes:
        q: (rows, blocks, block_size) uint8.
        scales: (rows, blocks) float16; a graph casts them when it is loaded.
        columns: Inputs before padding.
        form: How it is stored.
    """

    q: torch.Tensor
    scales: torch.Tensor
    columns: int
    form: BlockFormat

    def dequantized(self) -> torch.Tensor:
        """The matrix that the runtime computes with, (rows, columns) float32."""
        return values_of(self.q, self.scales.float(), self.form).flatten(1)[:, : self.columns]

    def packed(self) -> torch.Tensor:
        """q as MatMulNBits reads it, (rows, blocks, block_size * bits / 8); of two 4-bit numbers the first is low."""
        return self.q if self.form.bits == 8 else self.q[..., 0::2] | (self.q[..., 1::2] << 4)

    @classmethod
    def from_packed(cls, data: torch.Tensor, scales: torch.Tensor, columns: int, bits: int) -> Rounded:
        """What `packed` has made of it."""
        q = data if bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(-2)
        return cls(q, scales, columns, BlockFormat(bits, q.shape[-1]))

    def codes(self) -> torch.Tensor:
        """Those of the grid, (columns, rows) float32."""
        return self.q.flatten(1)[:, : self.columns].T.float() - self.form.half

    def with_codes(self, codes: torch.Tensor) -> Rounded:
        """It with others, (columns, rows)."""
        q = self.q.flatten(1).clone()
        q[:, : self.columns] = (codes + self.form.half).to(torch.uint8).T
        return replace(self, q=q.view_as(self.q))

    def rows(self, rows: slice) -> Rounded:
        """Some of its rows."""
        return replace(self, q=self.q[rows], scales=self.scales[rows])

    def to(self, device: torch.device) -> Rounded:
        """It on a device."""
        return replace(self, q=self.q.to(device), scales=self.scales.to(device))

    def scaled(self, factors: torch.Tensor) -> Rounded:
        """It with its blocks times factors, (rows, blocks), or (rows, 1) for all blocks of a row."""
        return replace(self, scales=(self.scales.float() * factors).half())


def round_to_nearest(
    weight: torch.Tensor, form: BlockFormat, importance: torch.Tensor | None = None
) -> Rounded:
    """Every number to its nearest, with the scale of each block that loses least.

    Args:
        weight: (rows, columns) float32.
        form: How to store it.
        importance: (columns,) mean squared inputs, by which an input's error counts; equal unless given.
    """
    blocks = _in_blocks(weight, form.block_size)
    counts = weight.new_ones(weight.shape[1]) if importance is None else importance
    counts = _in_blocks(counts[None], form.block_size)[0]
    scales = torch.cat([_best_scales(rows, counts, form) for rows in torch.split(blocks, _ROWS)])
    return Rounded(levels(blocks, scales, form), scales.half(), weight.shape[1], form)


def round_nowhere(weight: torch.Tensor, form: BlockFormat) -> Rounded:
    """What `round_to_nearest` makes of a weight on torch's meta device: there, too, and without its arithmetic."""
    rows, columns = weight.shape
    row = _rounded_row(columns, form)
    q, scales = (part.to("meta").expand(rows, *part.shape[1:]) for part in (row.q, row.scales))
    return replace(row, q=q, scales=scales)


@functools.cache
def _rounded_row(columns: int, form: BlockFormat) -> Rounded:
    return round_to_nearest(torch.zeros(1, columns), form)


def gptq(weight: torch.Tensor, gram: torch.Tensor, form: BlockFormat) -> Rounded:
    """By `gptq_codes`, with the scales that suit the weights as they are.

    Args:
        weight: W, (rows, columns) float32.
        gram: H = X^T X / T of the layer's inputs, (columns, columns).
        form: How to store it.

    Raises:
        InputError: H is not finite or cannot be inverted.
    """
    nearest = round_to_nearest(weight, form, gram.diagonal())
    return nearest.with_codes(gptq_codes(weight, nearest.scales.float(), form.grid, gram))


def refine(weight: torch.Tensor, gram: torch.Tensor, rounded: Rounded) -> Rounded:
    """By `refine_codes`; arguments as for `gptq`, whose result it brings closer."""
    codes, scales = refine_codes(weight, rounded.codes(), rounded.scales.float(), rounded.form.grid, gram)
    return replace(rounded, scales=scales.half()).with_codes(codes)


def values_of(q: torch.Tensor, scales: torch.Tensor, form: BlockFormat) -> torch.Tensor:
    """What q (..., block_size) stands for, given scales (...)."""
    return (q.float() - form.half) * scales[..., None]


def levels(values: torch.Tensor, scales: torch.Tensor, form: BlockFormat) -> torch.Tensor:
    """Nearest q of values (..., block_size), given scales (...)."""
    return (values / scales[..., None]).round().add(form.half).clamp(0, 2 * form.half - 1).to(torch.uint8)


def joined(parts: Sequence[Rounded]) -> Rounded:
    """Matrices of one format and the same inputs as one, their rows after each other."""
    first = parts[0]
    return replace(first, q=torch.cat([p.q for p in parts]), scales=torch.cat([p.scales for p in parts]))


def _in_blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """(rows, columns) -> (rows, blocks, size), padded with zeros."""
    padding = -matrix.shape[1] % size
    return torch.nn.functional.pad(matrix.float(), (0, padding)).view(len(matrix), -1, size)


def _best_scales(blocks: torch.Tensor, counts: torch.Tensor, form: BlockFormat) -> torch.Tensor:
    """(rows, blocks) scales, exact in float16: a block's extreme over q's range, times the factor that loses least.

    The number that is largest in size gets the side of the range that reaches one step further (q = 0).
    """
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
