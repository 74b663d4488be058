"""Bringing a rounded matrix closer to what it stands for: its scales and its codes, in turns."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from exporters.rounding.gptq import RIDGE, round_to_codes_
from exporters.rounding.grid import Grid

_ROUNDS = 4
"""On SmolLM2-135M, one takes a tenth of GPTQ's loss away, four an eighth, and more hardly anything."""
_COLUMNS, _ROWS, _PRODUCTS = 64, 4096, 2**24
"""What is multiplied at once, and how many products of blocks are held: rows do not depend on each other."""
_SCALE_RIDGE = 1e-4
_TINY = torch.finfo(torch.float32).tiny


def refine_codes(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, grid: Grid, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower tr((W - Q) (H + RIDGE mean(diag H) I) (W - Q)^T), which GPTQ lowers in one pass, by coordinate descent.

    In turns, all scales of a row become those of least squares, where the grid lets them, and each code, one column
    after another, the one that is best beside all the others (QuantEase, Behdin et al., arXiv 2309.01885).

    Args:
        weight: W, (rows, columns) float32, without the offsets of its blocks.
        codes: To start from, (columns, rows), as `gptq_codes` gives them.
        scales: To start from, (rows, blocks) float32, exact in float16 where the grid leaves them free.
        grid: What a block can hold.
        gram: H = X^T X / T of its inputs, (columns, columns).

    Returns:
        Codes (columns, rows) and scales (rows, blocks), float32.
    """
    padding = scales.shape[1] * grid.block_size - weight.shape[1]
    h = gram.float().clone()
    h.diagonal().add_((RIDGE * h.diagonal().mean()).clamp_min(_TINY))
    h = F.pad(h, (0, padding, 0, padding))
    done, n_rows = [], max(1, min(_ROWS, _PRODUCTS // scales.shape[1] ** 2))
    for start in range(0, len(weight), n_rows):
        rows = slice(start, start + n_rows)
        state = _Columns(
            h,
            F.pad(weight[rows].float(), (0, padding)).T.contiguous(),
            F.pad(codes[:, rows], (0, 0, 0, padding)),
            scales[rows].T.contiguous(),
            grid,
            weight.shape[1],
        )
        for _ in range(_ROUNDS):
            if grid.free_scales:
                state.solve_scales()
            state.choose_codes()
        done.append((state.codes[: weight.shape[1]], state.scales.T))
    return torch.cat([found for found, _ in done], 1), torch.cat([found for _, found in done])


class _Columns:
    """Some rows of a matrix, column after column: what belongs to one lies side by side.

    Attributes:
        codes: (columns with padding, rows).
        scales: (blocks, rows), exact in float16 where they are free.
    """

    def __init__(
        self,
        h: torch.Tensor,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        grid: Grid,
        columns: int,
    ) -> None:
        self._h, self._weight, self._grid, self._columns = h, weight, grid, columns
        self.codes, self.scales = codes, scales

    def solve_scales(self) -> None:
        """Scales s of least squares: A s = r with A_bc = q_b^T H_bc q_c and r_b = q_b^T (H w)_b, for every row.

        Solved for what changes, so that the scale of a block of zeros stays.
        """
        (count, rows), size, codes = self.scales.shape, self._grid.block_size, self.codes
        products = torch.empty(count, count, rows)
        for b in range(count):
            begin = b * size
            reached = self._h[begin:, begin : begin + size] @ codes[begin : begin + size]
            products[b, b:] = _sum_blocks(reached.mul_(codes[begin:]), size)
            products[b + 1 :, b] = products[b, b + 1 :]
        residual = _sum_blocks((self._h @ self._lost()).mul_(codes), size)
        systems = products.permute(2, 0, 1).contiguous()
        diagonal = systems.diagonal(dim1=1, dim2=2)
        diagonal += (_SCALE_RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(_TINY)
        solved = (self.scales + torch.linalg.solve(systems, residual.T).T).half().float()
        self.scales = torch.where(solved == 0, self.scales, solved)

    def choose_codes(self) -> None:
        """Column j, beside the others as they are by then: the nearest to Q_j + E H_j / H_jj, E = W - Q being lost."""
        size, h = self._grid.block_size, self._h
        lost, diagonal = self._lost(), h.diagonal().tolist()
        for start in range(0, self._columns, _COLUMNS):
            stop = min(start + _COLUMNS, self._columns)
            slopes = h[start:stop] @ lost
            for j in range(start, stop):
                scale, before = self.scales[j // size], self.codes[j]
                after = torch.add(before, slopes[j - start] / scale, alpha=1 / diagonal[j])
                round_to_codes_(after, self._grid)
                change = (after - before).mul_(scale)
                before.copy_(after)
                lost[j] -= change
                slopes[j + 1 - start :].addr_(h[j, j + 1 : stop], change, alpha=-1)

    def _lost(self) -> torch.Tensor:
        """E^T, (columns with padding, rows)."""
        codes = self.codes.view(-1, self._grid.block_size, self.codes.shape[1])
        found = torch.addcmul(self._weight.view_as(codes), codes, self.scales[:, None], value=-1)
        return found.view_as(self.codes)


def _sum_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks * size, rows) -> (blocks, rows)."""
    return values.view(-1, size, values.shape[1]).sum(1)
