"""Few bits: which of a grid's numbers each weight becomes, whatever file they are stored in.

A family's grid is one file that has a `QuantizedMatrix`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch

_TOLERANCE = 2.0**-7
"""Of a row's largest number: weights of 16 bits are not quite what their numbers stand for."""


class Grid(NamedTuple):
    """The numbers that a block of a format can hold, its offset aside: scale * code."""

    codes: tuple[float, ...]  # ascending
    block_size: int  # neighbouring inputs of one output that share a scale
    free_scales: bool = True  # whether any float16 number can be a scale; else they stay as they are


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


class Placed(NamedTuple):
    """A matrix of a file, and where its numbers are in a model."""

    matrix: QuantizedMatrix
    hold: Callable[[Any, torch.Tensor], None]  # (model, its values) -> these are the model's weights
    stack: Callable[
        [list[torch.Tensor]], torch.Tensor
    ]  # modules' factors, (rows, blocks) each -> the matrix's
    modules: tuple[str, ...]  # those whose blocks' scales can be trained
    block_size: int  # columns of a block that has a scale of its own


def stands_for(values: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether numbers of few bits, as a runtime computes with them, are a checkpoint's weight; both (rows, columns)."""
    bound = _TOLERANCE * weight.abs().amax(1) + torch.finfo(torch.float32).tiny
    return bool(((values - weight).abs().amax(1) <= bound).all())
