"""Bringing a rounded matrix closer to what it stands for: its scales, and its codes block after block."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from exporters.rounding.gptq import RIDGE, round_to_codes_
from exporters.rounding.grid import Grid

_ROUNDS = 4
"""On SmolLM2-135M, one takes a tenth of GPTQ's loss away, four an eighth, and more hardly anything."""
_ROWS, _PRODUCTS = 4096, 2**24
"""How many rows, and products of their blocks, are held at once: rows do not depend on each other."""
_SCALE_RIDGE = 1e-4
"""Relative to the mean of the diagonal of a row's system of scales."""
_TINY = torch.finfo(torch.float32).tiny


def refine_codes(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, grid: Grid, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower tr((W - Q) (H + RIDGE mean(diag H) I) (W - Q)^T), which GPTQ lowers in one pass, by coordinate descent.

    All scales of a row become those of least squares first, where the grid lets them. Then one block after another,
    several times: its scale alone becomes the best one, and after it each of its codes, in turn, the one that is best
    beside all the others (QuantEase, Behdin et al., arXiv 2309.01885).

    Args:
        weight: W, (rows, columns) float32, without the offsets of its blocks.
        codes: To start from, (columns, rows), as `gptq_codes` gives them.
        scales: To start from, (rows, blocks) float32, none of them 0, exact in float16 where the grid leaves them free.
        grid: What a block can hold.
        gram: H = X^T X / T of its inputs, (columns, columns).

    Returns:
        Codes (columns, rows) and scales (rows, blocks), float32.
    """
    columns = weight.shape[1]
    padding = scales.shape[1] * grid.block_size - columns
    h = gram.float().clone()
    h.diagonal().add_((RIDGE * h.diagonal().mean()).clamp_min(_TINY))
    h = F.pad(h, (0, padding, 0, padding))
    done = []
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        state = _Columns(
            h,
            F.pad(weight[rows].float(), (0, padding)).T.contiguous(),
            F.pad(codes[:, rows], (0, 0, 0, padding)),
            scales[rows].T.contiguous(),
            grid,
        )
        if grid.free_scales:
            state.solve_scales()
        for _ in range(_ROUNDS):
            for begin in range(0, columns, grid.block_size):
                state.refine(slice(begin, min(begin + grid.block_size, columns)))
        done.append((state.codes[:columns], state.scales.T))
    return torch.cat([part for part, _ in done], 1), torch.cat([part for _, part in done])


class _Columns:
    """Some rows of a matrix, column after column: what belongs to one lies side by side.

    Attributes:
        codes: (columns with padding, rows).
        scales: (blocks, rows), exact in float16 where they are free.
    """

    def __init__(
        self, h: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, grid: Grid
    ) -> None:
        self._h, self._weight, self._grid = h, weight, grid
        self.codes, self.scales = codes, scales
        self._lost = self._find_lost()

    def _find_lost(self) -> torch.Tensor:
        """E^T, (columns with padding, rows)."""
        return self._weight - self.codes * self.scales.repeat_interleave(self._grid.block_size, 0)

    def solve_scales(self) -> None:
        """Move every row's scales to those of least squares beside each other.

        The scale of a block of zeros stays, and so does one that would become 0.
        """
        count, rows = self.scales.shape
        step = max(1, _PRODUCTS // count**2)
        for start in range(0, rows, step):
            some = slice(start, start + step)
            moved = self.scales[:, some] + self._best_steps(some)
            self.scales[:, some] = _exact(moved, self.scales[:, some])
        self._lost = self._find_lost()

    def _best_steps(self, rows: slice) -> torch.Tensor:
        """d (blocks, rows) of A d = r, with A_bc = q_b^T H_bc q_c and r_b = q_b^T (H E)_b; 0 where it cannot be had."""
        codes, size, count = self.codes[:, rows], self._grid.block_size, len(self.scales)
        systems = codes.new_empty(codes.shape[1], count, count)
        for b in range(count):
            begin = b * size
            reached = self._h[begin:, begin : begin + size] @ codes[begin : begin + size]
            systems[:, b:, b] = _sum_blocks(reached.mul_(codes[begin:]), size).T
        residual = _sum_blocks((self._h @ self._lost[:, rows]).mul_(codes), size)
        diagonal = systems.diagonal(dim1=1, dim2=2)
        diagonal += (_SCALE_RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(_TINY)
        factors, failed = torch.linalg.cholesky_ex(systems)  # reads the lower half
        steps = torch.cholesky_solve(residual.T[..., None], factors)[..., 0]
        return torch.where(failed[:, None] == 0, steps, 0.0).T

    def refine(self, block: slice) -> None:
        """Choose the scale and the codes of a block's columns anew, beside what the other blocks lose by now."""
        scale, codes = self.scales[block.start // self._grid.block_size], self.codes[block]
        inside, slopes = self._h[block, block], self._h[block] @ self._lost
        if self._grid.free_scales:
            _improve_scale_(scale, codes, slopes, inside)
        diagonal = inside.diagonal()[:, None]
        relative = inside / diagonal
        # Column j's best number, in units of the scale, is q_j + ((H E)_j / s) / H_jj, E = W - Q being lost. What the
        # columns before it hold by then counts: first all columns are as if those before held 0.
        wanted = torch.addmm(slopes.div_(diagonal).div_(scale), relative.tril(-1), codes).add_(codes)
        for j, effects in enumerate(relative.T):
            chosen = round_to_codes_(wanted[j], self._grid)
            wanted[j + 1 :].addr_(effects[j + 1 :], chosen, alpha=-1)
        codes.copy_(wanted)
        torch.addcmul(self._weight[block], codes, scale, value=-1, out=self._lost[block])


def _improve_scale_(
    scale: torch.Tensor, codes: torch.Tensor, slopes: torch.Tensor, inside: torch.Tensor
) -> None:
    """Move each row's scale of a block to s + q^T (H E) / q^T H q, in float16, and H E along with it.

    Args:
        scale: s, (rows,); one that would become 0 stays.
        codes: q, (columns, rows).
        slopes: H E of these columns, (columns, rows).
        inside: H of these columns.
    """
    effects = inside @ codes
    step = (codes * slopes).sum(0) / (codes * effects).sum(0).clamp_min(_TINY)
    better = _exact(scale + step, scale)
    slopes.addcmul_(effects, better - scale, value=-1)
    scale.copy_(better)


def _exact(scales: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Scales as float16 holds them, and those of before where it holds 0."""
    rounded = scales.half().float()
    return torch.where(rounded == 0, before, rounded)


def _sum_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks * size, rows) -> (blocks, rows)."""
    return values.view(-1, size, values.shape[1]).sum(1)
