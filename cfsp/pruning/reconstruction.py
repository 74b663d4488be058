"""Closed-form solutions for down_proj after channels are gone (method 4): tensors in, one tensor out.

S are the kept and R the removed channels, X (T x m) down_proj's input, H = X^T X / T, W (d, m) its weight.
"""

from __future__ import annotations

import torch

from cfsp.devices import exact
from cfsp.errors import InputError


def damped_cholesky(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Lower Cholesky factor of H + ridge mean(diag H) I, for H (n, n) float64, in its place.

    Raises:
        InputError: `ridge` is not positive, or the matrix is not finite or still singular.
    """
    if not ridge > 0:
        raise InputError("out of range", field="ridge", value=ridge, allowed="above 0")
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    # LAPACK's order of columns: of the other one it would make a copy, as large as H.
    torch.linalg.cholesky_ex(gram.mT, upper=True, out=(gram.mT, info))
    if int(info) != 0:
        raise InputError("the reconstruction cannot be solved; raise the ridge", field="ridge", value=ridge)
    return gram


def solve_change(gram: torch.Tensor, missing: torch.Tensor, ridge: float) -> torch.Tensor:
    """The change of the kept weights that best makes up for what is missing.

    Delta = M^T (H_SS + lambda mean(diag H_SS) I)^-1 minimizes ||E - X_S Delta^T||^2 / T plus the ridge times
    ||Delta||^2, E (T x d) being what the output lacks. At lambda = 0 it is ordinary least squares; a large lambda
    leaves the kept weights alone, where shrinking the weights themselves would fade channels that are rarely active.

    Args:
        gram: H_SS, (n_kept, n_kept) float64; changed in place.
        missing: M = X_S^T E / T, (n_kept, hidden_size) float64.
        ridge: lambda > 0, relative to the mean of the diagonal.

    Returns:
        (hidden_size, n_kept) float64.

    Raises:
        InputError: `ridge` is not positive, or the system cannot be solved.
    """
    return torch.cholesky_solve(missing, damped_cholesky(gram, ridge)).T


def reconstruct_down(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Weights with which the kept channels best give the output of all: E = X_R W_R^T in `solve_change`.

    Args:
        weight: W, (hidden_size, intermediate_size) of down_proj.
        gram: H, (intermediate_size, intermediate_size), float64.
        kept: S, (n_kept,) int64 channel indices.
        ridge: lambda > 0.

    Returns:
        (hidden_size, n_kept), in the dtype of `weight`.

    Raises:
        InputError: As `solve_change`.
    """
    removed = _others(kept, weight.shape[1])
    rows = gram[kept]
    change = solve_change(rows[:, kept], rows[:, removed] @ exact(weight[:, removed]).T, ridge)
    return (exact(weight[:, kept]) + change).contiguous().to(weight)


def reconstruct_mean(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Weights that keep the mean output: FLAP's bias compensation (An et al., AAAI 2024) without a bias.

    W' = W_S + W_R mu_R mu_S^T / ||mu_S||^2 is the smallest change with W' mu_S = W mu, mu being the mean of X.

    Args:
        weight: W, (hidden_size, intermediate_size).
        mean: mu, (intermediate_size,).
        kept: S, (n_kept,) int64.

    Returns:
        (hidden_size, n_kept), in the dtype of `weight`.
    """
    removed = _others(kept, weight.shape[1])
    mu = exact(mean)
    scale = mu[kept].square().sum().clamp_min(torch.finfo(mu.dtype).tiny)
    change = torch.outer(exact(weight[:, removed]) @ mu[removed], mu[kept] / scale)
    return (exact(weight[:, kept]) + change).contiguous().to(weight)


def _others(kept: torch.Tensor, width: int) -> torch.Tensor:
    is_removed = torch.ones(width, dtype=torch.bool)
    is_removed[kept] = False
    return is_removed.nonzero()[:, 0]
