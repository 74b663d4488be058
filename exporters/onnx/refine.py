"""Bringing a quantized matrix closer to what it stands for: its scales and its numbers, in turns."""

from __future__ import annotations

from dataclasses import replace

import torch

from exporters.onnx.block_quantize import RIDGE, Rounded, joined, levels, values_of

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
    h = gram.float().clone()
    h.diagonal().add_((RIDGE * h.diagonal().mean()).clamp_min(_TINY))
    parts, n_rows = [], max(1, min(_ROWS, _PRODUCTS // rounded.q.shape[1] ** 2))
    for start in range(0, len(weight), n_rows):
        rows = slice(start, start + n_rows)
        part = rounded.rows(rows)
        for _ in range(_ROUNDS):
            part = _best_numbers(weight[rows], h, _best_scales(weight[rows], h, part))
        parts.append(part)
    return joined(parts)


def _best_scales(weight: torch.Tensor, h: torch.Tensor, rounded: Rounded) -> Rounded:
    """Scales s of least squares: A s = r with A_bc = q_b^T H_bc q_c and r_b = q_b^T (H w)_b, for every row.

    Solved for what changes, so that the scale of a block of zeros stays.
    """
    rows, count, size = rounded.q.shape
    numbers = rounded.q.float() - rounded.form.half
    padding = count * size - rounded.columns
    h = torch.nn.functional.pad(h, (0, padding, 0, padding))
    lost = torch.nn.functional.pad(weight - rounded.dequantized(), (0, padding))
    products = torch.empty(rows, count, count)
    for b in range(count):
        reached = (numbers[:, b] @ h[b * size : (b + 1) * size]).view_as(numbers)
        products[:, b] = (reached * numbers).sum(-1)
    residual = ((lost @ h).view_as(numbers) * numbers).sum(-1)
    diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal += (_SCALE_RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(_TINY)
    return replace(rounded, scales=(rounded.scales + torch.linalg.solve(products, residual)).half())


def _best_numbers(weight: torch.Tensor, h: torch.Tensor, rounded: Rounded) -> Rounded:
    """Column j, beside the others as they are by then: the nearest to Q_j + E H_j / H_jj, E = W - Q being lost."""
    form, columns = rounded.form, rounded.columns
    scales, q = rounded.scales.float(), rounded.q.flatten(1).clone()
    lost = weight - rounded.dequantized()
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        slopes = lost @ h[:, start:stop]
        for j in range(start, stop):
            scale = scales[:, j // form.block_size]
            before = values_of(q[:, j], scale, form)
            q[:, j] = levels(before + slopes[:, j - start] / h[j, j], scale, form)
            change = values_of(q[:, j], scale, form) - before
            lost[:, j] -= change
            slopes -= change[:, None] * h[j, start:stop]
    return replace(rounded, q=q.view_as(rounded.q))
