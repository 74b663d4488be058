"""Closed-form reconstruction of down_proj after channels are gone (method 4)."""

from __future__ import annotations

import torch

from cfsp.errors import InputError

__all__ = ["reconstruct_down"]


def reconstruct_down(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Ridge least-squares weights of the kept channels.

    W' = W H[:, S] (H[S, S] + lambda mean(diag H[S, S]) I)^-1, the minimizer of ||X W^T - X_S W'^T||^2 plus the
    ridge, so that the block's output is matched as well as the kept channels allow.

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
    within = gram[kept][:, kept]
    damping = ridge * within.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    within.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(within)
    if int(info) != 0:
        raise InputError("the reconstruction cannot be solved; raise the ridge", field="ridge", value=ridge)
    target = gram[kept] @ weight.double().T
    return torch.cholesky_solve(target, factor).T.contiguous().to(weight.dtype)
