"""The numbers that a format can hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """What a block can hold, its offset aside: scale * code.

    Attributes:
        codes: Ascending.
        block_size: Neighbouring inputs of one output that share a scale.
        free_scales: Whether any float16 number can be a scale; else they stay as they are.
    """

    codes: tuple[float, ...]
    block_size: int
    free_scales: bool = True
