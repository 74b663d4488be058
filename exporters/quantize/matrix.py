"""What every family's matrices of few bits have in common. A family's grid is one file that has such a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch

from exporters.quantize import Grid
from exporters.quantize.gptq import gptq_codes
from exporters.quantize.refine import refine_codes

_NOTHING, _LEAST = 1e-30, 2.0**-24
"""A scale for which every code stands for nothing, and the least that float16 holds."""
_TOLERANCE = 2.0**-7
"""Of a row's largest number: weights of 16 bits are not quite what their numbers stand for."""


class QuantizedMatrix(Protocol):
    """A matrix (rows, columns) as a file stores it: a code for each number, and a scale for each block of a row."""

    @property
    def grid(self) -> Grid:
        """What a block can hold."""

    def dequantize(self) -> torch.Tensor:
        """What a runtime computes with, (rows, columns) float32."""

    def scales_and_offsets(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of every block of the grid, (rows, blocks) float32: a number is offset + scale * code."""

    def with_codes(self, codes: torch.Tensor, scales: torch.Tensor | None = None) -> Self:
        """The matrix with other codes (columns, rows), and scales (rows, blocks) unless these stay."""

    def scaled(self, factors: torch.Tensor) -> Self:
        """The matrix with its blocks multiplied: (rows, blocks), or (rows, 1) for all blocks of a row."""

    def pack(self) -> dict[str, torch.Tensor]:
        """What is stored of it, by the end of its name."""


M = TypeVar("M", bound=QuantizedMatrix)


def fit(weight: torch.Tensor, stored: M, gram: torch.Tensor) -> M:
    """A matrix of the same kind that is closer to a weight for its inputs, by GPTQ and coordinate descent.

    Args:
        weight: (rows, columns) float32.
        stored: Rounded to the nearest.
        gram: X^T X / T of its inputs, (columns, columns).

    Raises:
        InputError: That is not finite.
    """
    grid = stored.grid
    scales, offsets = stored.scales_and_offsets()
    scales = scales.to(weight.device)
    # A block of zeros: not every grid has a code for 0.
    scales = torch.where(scales == 0, _LEAST if grid.free_scales else _NOTHING, scales)
    if offsets is not None:
        weight = weight - offsets.to(weight.device).repeat_interleave(grid.block_size, 1)
    codes = gptq_codes(weight, scales, grid, gram)
    codes, scales = refine_codes(weight, codes, scales, grid, gram)
    return stored.with_codes(codes, scales if grid.free_scales else None)


def stands_for(values: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether numbers of few bits, as a runtime computes with them, are a checkpoint's weight; both (rows, columns)."""
    bound = _TOLERANCE * weight.abs().amax(1) + torch.finfo(torch.float32).tiny
    return bool(((values - weight).abs().amax(1) <= bound).all())


@dataclass(frozen=True)
class Placed:
    """A matrix of a file, and where its numbers are in a model.

    Attributes:
        matrix: It.
        hold: (model, its values) -> these are the model's weights.
        stack: The modules' factors, (rows, blocks) each -> those of the matrix.
        modules: Those whose blocks' scales can be trained.
        block_size: Columns of a block that has a scale of its own.
    """

    matrix: QuantizedMatrix
    hold: Callable[[Any, torch.Tensor], None]
    stack: Callable[[list[torch.Tensor]], torch.Tensor]
    modules: tuple[str, ...]
    block_size: int
