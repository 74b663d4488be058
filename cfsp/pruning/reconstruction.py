"""Closed-form repair of a Linear whose inputs are fewer (method 4): tensors in, one tensor out.

S are the inputs that stay, X (T x m) all of them, H = X^T X / T.
"""

from __future__ import annotations

import torch

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
