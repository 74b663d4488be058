"""Inverting a triangular matrix by products, in its place."""

from __future__ import annotations

import torch

_SMALL = 128
"""So few rows are solved for at once."""
_WIDTH = 512
"""Of a product with a triangular matrix, columns or rows that are made at once: what is zero for all is left out."""


def invert_lower_(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix (n, n), in its place.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]: two halves, and two products with triangular matrices.
    Solving for the columns of I takes two to three times as long, and a second matrix.
    """
    size = len(matrix)
    if size <= _SMALL:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
    half = size // 2
    first, second = invert_lower_(matrix[:half, :half]), invert_lower_(matrix[half:, half:])
    below = matrix[half:, :half]
    reached = torch.empty_like(below)  # B A^-1
    for start in range(0, half, _WIDTH):
        columns = slice(start, start + _WIDTH)
        reached[:, columns] = below[:, start:] @ first[start:, columns]
    for start in range(0, size - half, _WIDTH):
        rows = slice(start, start + _WIDTH)
        stop = min(rows.stop, size - half)
        below[rows] = second[rows, :stop] @ reached[:stop]
    below.neg_()
    return matrix
