"""Bringing a rounded matrix closer to what it stands for: its scales, and its codes block after block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cfsp.precision import bulk_dtype
from exporters.quantize import Grid
from exporters.quantize.gptq import RIDGE, round_to_codes_

_ROUNDS = 4
"""On SmolLM2-135M, one takes a tenth of GPTQ's loss away, four an eighth, and more hardly anything."""
_ROWS, _PRODUCTS = 4096, 2**24
"""How many rows, and products of their blocks, are held at once: rows do not depend on each other."""
_SCALE_RIDGE = 1e-4
"""Relative to the mean of the diagonal of a row's system of scales."""
_WIDE = 4096
"""Columns beyond which H and H's products with errors and codes are in bfloat16, where a processor multiplies that
faster. The errors that come of what is chosen stay exact: of 4096 x 14336 numbers (benchmarks/rounding.py) float32
and bfloat16 lose 0.000862 of the output's mean square."""
_TOGETHER = 8
"""Blocks whose products in bfloat16 are made at once: each product copies all errors into another order first."""
_TINY = torch.finfo(torch.float32).tiny


def refine_codes(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, grid: Grid, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower tr((W - Q) (H + RIDGE mean(diag H) I) (W - Q)^T), which GPTQ lowers in one pass, by coordinate descent.

    All scales of a row become those of least squares first, if the grid lets them. Then one block after another,
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
    h = _Damped.of(gram, padding, grid.block_size)
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
            state.refine(columns)
        done.append((state.codes[:columns], state.scales.T))
    return torch.cat([part for part, _ in done], 1), torch.cat([part for _, part in done])


@dataclass(frozen=True)
class _Damped:
    """H + RIDGE mean(diag H) I, padded to whole blocks.

    Attributes:
        whole: All of it, in the dtype of products.
        inside: Of every block's own columns, (blocks, block_size, block_size) float32.
    """

    whole: torch.Tensor
    inside: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, padding: int, block_size: int) -> _Damped:
        """Of H (columns, columns)."""
        columns = len(gram)
        dtype = bulk_dtype(gram.device.type) if columns > _WIDE else torch.float32
        whole = gram.new_zeros(columns + padding, columns + padding, dtype=dtype)
        whole[:columns, :columns] = gram
        diagonal = gram.diagonal().float()
        diagonal = diagonal + (RIDGE * diagonal.mean()).clamp_min(_TINY)
        whole.diagonal()[:columns] = diagonal
        inside = gram.new_zeros(len(whole) // block_size, block_size, block_size, dtype=torch.float32)
        for block, start in zip(inside, range(0, columns, block_size), strict=True):
            own = slice(start, min(start + block_size, columns))
            block[: own.stop - start, : own.stop - start] = gram[own, own]
            block.diagonal()[: own.stop - start] = diagonal[own]
        return cls(whole, inside)

    @property
    def together(self) -> int:
        """Blocks whose products with errors are made at once; what the first ones change is added to the others'."""
        return 1 if self.whole.dtype == torch.float32 else _TOGETHER

    def times(self, rows: slice, columns: slice, values: torch.Tensor) -> torch.Tensor:
        """A part of it times values (columns, n), float32."""
        return (self.whole[rows, columns] @ values.to(self.whole.dtype)).float()


class _Columns:
    """Some rows of a matrix, column after column: what belongs to one lies side by side.

    Attributes:
        codes: (columns with padding, rows).
        scales: (blocks, rows), exact in float16 if they are free.
    """

    def __init__(
        self, h: _Damped, weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, grid: Grid
    ) -> None:
        self._h, self._weight, self._grid = h, weight, grid
        self.codes, self.scales = codes, scales
        self._lost = self._find_lost()

    def _find_lost(self) -> torch.Tensor:
        """E^T, (columns with padding, rows), in the dtype of products."""
        lost = self._weight - self.codes * self.scales.repeat_interleave(self._grid.block_size, 0)
        return lost.to(self._h.whole.dtype)

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
        """d (blocks, rows) of A d = r, with A_bc = q_b^T H_bc q_c and r_b = q_b^T (H E)_b; 0 if it cannot be had."""
        # Side by side, or every product would read from as many places as there are columns.
        codes, lost = self.codes[:, rows].contiguous(), self._lost[:, rows].contiguous()
        size, count = self._grid.block_size, len(self.scales)
        systems = codes.new_empty(codes.shape[1], count, count)
        for b in range(count):
            begin = b * size
            reached = self._h.times(
                slice(begin, None), slice(begin, begin + size), codes[begin : begin + size]
            )
            systems[:, b:, b] = _sum_blocks(reached.mul_(codes[begin:]), size).T
        residual = _sum_blocks(self._h.times(slice(None), slice(None), lost).mul_(codes), size)
        diagonal = systems.diagonal(dim1=1, dim2=2)
        diagonal += (_SCALE_RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(_TINY)
        factors, failed = torch.linalg.cholesky_ex(systems)  # reads the lower half
        steps = torch.cholesky_solve(residual.T[..., None], factors)[..., 0]
        return torch.where(failed[:, None] == 0, steps, 0.0).T

    def refine(self, columns: int) -> None:
        """One round over all blocks of so many columns."""
        size = self._grid.block_size
        step = size * self._h.together
        for begin in range(0, columns, step):
            end = min(begin + step, columns)
            slopes = self._h.times(slice(begin, end), slice(None), self._lost)
            for start in range(begin, end, size):
                block = slice(start, min(start + size, end))
                lost, is_last = self._lost[block], block.stop == end
                before = lost if is_last else lost.clone()
                self._refine_block(block, slopes[start - begin : block.stop - begin])
                if not is_last:
                    slopes[block.stop - begin :] += self._h.times(
                        slice(block.stop, end), block, lost - before
                    )

    def _refine_block(self, block: slice, slopes: torch.Tensor) -> None:
        """Choose the scale and the codes of a block's columns anew, beside what the other blocks lose by now.

        Args:
            block: Its columns.
            slopes: H E of them, (columns, rows); they are changed.
        """
        scale, codes = self.scales[block.start // self._grid.block_size], self.codes[block]
        size = block.stop - block.start
        inside = self._h.inside[block.start // self._grid.block_size, :size, :size]
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
        self._lost[block] = torch.addcmul(self._weight[block], codes, scale, value=-1)


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
