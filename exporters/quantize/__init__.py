"""Few bits: which of a grid's numbers each weight becomes, whatever file they are stored in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The numbers that a block of a format can hold, its offset aside: scale * code.

    Attributes:
        codes: Ascending.
        block_size: Neighbouring inputs of one output that share a scale.
        free_scales: Whether any float16 number can be a scale; else they stay as they are.
    """

    codes: tuple[float, ...]
    block_size: int
    free_scales: bool = True
