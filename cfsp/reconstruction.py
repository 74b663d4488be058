"""Closed-form reconstruction of down_proj after channels are gone (method 4)."""

from __future__ import annotations

import torch

from cfsp.errors import InputError

__all__ = ["reconstruct_down"]


def reconstruct_down(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Ridge least-squares weights of the kept channels, drawn towards the weights they had.

    With S the kept and R the removed channels, W' = W_S + W_R H[R, S] (H[S, S] + lambda mean(diag H[S, S]) I)^-1
    minimizes ||X W^T - X_S W'^T||^2 / T plus the ridge times ||W' - W_S||^2. At lambda = 0 it is ordinary least
    squares; a large lambda leaves the kept columns alone, where shrinking W' itself would fade channels that are
    rarely active.

    Args:
        weight: W, (hidden_size, intermediate_size) of down_proj.
        gram: H = X^T X / T, (intermediate_size, intermediate_size), float64.
        kept: S, (n_kept,) int64 channel indices.
        ridge: lambda > 0, relative to the mean of the diagonal.

    Returns:
        (hidden_size, n_kept), in the dtype of `weight`.

    Raises:
        InputError: `ridge` is not positive, or the system cannot be solved.
    """
    if not ridge > 0:
        raise InputError("out of range", field="ridge", value=ridge, allowed="above 0")
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool)
    is_removed[kept] = False
    removed = is_removed.nonzero()[:, 0]
    rows = gram[kept]
    within = rows[:, kept]
    damping = ridge * within.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    within.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(within)
    if int(info) != 0:
        raise InputError("the reconstruction cannot be solved; raise the ridge", field="ridge", value=ridge)
    change = torch.cholesky_solve(rows[:, removed] @ weight[:, removed].double().T, factor).T
    return (weight[:, kept].double() + change).contiguous().to(weight.dtype)
