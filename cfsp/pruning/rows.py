"""What the tables of scores, allocations and reconstructions are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

F = TypeVar("F")


@dataclass(frozen=True)
class Row(Generic[F]):
    """A row of SCORES, ALLOCATIONS or RECONSTRUCTIONS: a function, and which of the costlier things it reads.

    Attributes:
        function: What it does.
        needs_statistics: Of the dense model, where a plan is only applied.
        needs_gram: Gram matrices, which are a part of them.
        reads_stream: What the dense blocks give, where it was kept; it is computed again where not.
        needs_gradients: Of the loss.
        needs_loss: Predicted at every width of a block, from both.
        reads_strength: CFSP's a.
    """

    function: F
    needs_statistics: bool = False
    needs_gram: bool = False
    reads_stream: bool = False
    needs_gradients: bool = False
    needs_loss: bool = False
    reads_strength: bool = False
