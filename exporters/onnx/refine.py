"""Bringing a quantized matrix closer to what it stands for: its scales and its numbers, in turns."""

from __future__ import annotations

from dataclasses import replace

import torch

from exporters.onnx.block_quantize import RIDGE, Rounded, joined

_ROUNDS = 4
"""On SmolLM2-135M, one takes a tenth of GPTQ's loss away, four an eighth, and more hardly anything."""
_COLUMNS, _ROWS, _PRODUCTS = 64, 4096, 2**24
"""What is multiplied at once, and how many products of blocks are held: rows do not depend on each other."""
_SCALE_RIDGE = 1e-4
_TINY = torch.finfo(torch.float32).tiny


def refine(weight: torch.Tensor, gram: torch.Tensor, rounded: Rounded) -> Rounded:
    """Lower tr((W - Q) (H + RIDGE mean(diag H) I) (W - Q)^T), which GPTQ lowers in one pass, by coordinate descent.

    In turns, all scales of a row become those of least squares, and each number, one column after another, the one
    that is best beside all the others (QuantEase, Behdin et al., arXiv 2309.01885).

    Args:
        weight: W, (rows, columns) float32.
        gram: H = X^T X / T of its inputs, (columns, columns).
        rounded: Q to start from, as `gptq` gives it.
    """
    padding = rounded.q.shape[1] * rounded.form.block_size - rounded.columns
    h = gram.float().clone()
    h.diagonal().add_((RIDGE * h.diagonal().mean()).clamp_min(_TINY))
    h = torch.nn.functional.pad(h, (0, padding, 0, padding))
    parts, n_rows = [], max(1, min(_ROWS, _PRODUCTS // rounded.q.shape[1] ** 2))
    for start in range(0, len(weight), n_rows):
        part = rounded.rows(slice(start, start + n_rows))
        wanted = torch.nn.functional.pad(weight[start : start + n_rows].float(), (0, padding))
        state = _Columns(h, wanted.T.contiguous(), part)
        for _ in range(_ROUNDS):
            state.solve_scales()
            state.choose_numbers()
        parts.append(state.rounded())
    return joined(parts)


class _Columns:
    """Some rows of a matrix, column after column: what belongs to one lies side by side.

    Attributes:
        weight: W^T, (columns with padding, rows).
        numbers: Those of Q, of the same shape.
        scales: (blocks, rows), exact in float16.
    """

    def __init__(self, h: torch.Tensor, weight: torch.Tensor, start: Rounded) -> None:
        self._h, self._start, self._form = h, start, start.form
        self.weight = weight
        self.numbers = start.q.flatten(1).T.float() - start.form.half
        self.scales = start.scales.float().T.contiguous()

    def rounded(self) -> Rounded:
        """As it is stored."""
        q = (self.numbers + self._form.half).to(torch.uint8).T
        return replace(self._start, q=q.reshape(self._start.q.shape), scales=self.scales.T.half())

    def solve_scales(self) -> None:
        """Scales s of least squares: A s = r with A_bc = q_b^T H_bc q_c and r_b = q_b^T (H w)_b, for every row.

        Solved for what changes, so that the scale of a block of zeros stays.
        """
        (count, rows), size, numbers = self.scales.shape, self._form.block_size, self.numbers
        products = torch.empty(count, count, rows)
        for b in range(count):
            begin = b * size
            reached = self._h[begin:, begin : begin + size] @ numbers[begin : begin + size]
            products[b, b:] = _sum_blocks(reached.mul_(numbers[begin:]), size)
            products[b + 1 :, b] = products[b, b + 1 :]
        residual = _sum_blocks((self._h @ self._lost()).mul_(numbers), size)
        systems = products.permute(2, 0, 1).contiguous()
        diagonal = systems.diagonal(dim1=1, dim2=2)
        diagonal += (_SCALE_RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(_TINY)
        solved = (self.scales + torch.linalg.solve(systems, residual.T).T).half().float()
        self.scales = torch.where(solved == 0, self.scales, solved)

    def choose_numbers(self) -> None:
        """Column j, beside the others as they are by then: the nearest to Q_j + E H_j / H_jj, E = W - Q being lost."""
        half, size, h = self._form.half, self._form.block_size, self._h
        lost, diagonal = self._lost(), h.diagonal().tolist()
        for start in range(0, self._start.columns, _COLUMNS):
            stop = min(start + _COLUMNS, self._start.columns)
            slopes = h[start:stop] @ lost
            for j in range(start, stop):
                scale, before = self.scales[j // size], self.numbers[j]
                after = torch.add(before, slopes[j - start] / scale, alpha=1 / diagonal[j])
                after.round_().clamp_(-half, half - 1)
                change = (after - before).mul_(scale)
                before.copy_(after)
                lost[j] -= change
                slopes[j + 1 - start :].addr_(h[j, j + 1 : stop], change, alpha=-1)

    def _lost(self) -> torch.Tensor:
        """E^T, (columns with padding, rows)."""
        size = self._form.block_size
        numbers = self.numbers.view(-1, size, self.numbers.shape[1])
        found = torch.addcmul(self.weight.view_as(numbers), numbers, self.scales[:, None], value=-1)
        return found.view_as(self.numbers)


def _sum_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks * size, rows) -> (blocks, rows)."""
    return values.view(-1, size, values.shape[1]).sum(1)
