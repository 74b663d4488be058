"""Muon for the matrices of blocks, AdamW for all else: one optimizer to a trainer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along its momentum made orthogonal,
so that all directions of it are learnt at one pace. Steps are scaled to the size of AdamW's (Liu et al., arXiv
2502.16982), and torch has the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from cfsp.errors import InputError


def require_muon() -> None:
    """Raise InputError where torch is too old to have Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"torch {torch.__version__} has no Muon",
            field="optimizer",
            value="muon",
            allowed="adamw, or torch 2.9",
        )


class MuonAndAdamW(torch.optim.Optimizer):
    """Both, each with its own parameters and rates.

    Args:
        matrices: What Muon moves: weights of two dimensions.
        others: What AdamW moves.
        rate: Learning rate of the matrices.
        other_rate: Learning rate of all else.
        weight_decay: Of both.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        *,
        rate: float,
        other_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            muon,
            torch.optim.AdamW(others, lr=other_rate, weight_decay=weight_decay),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters once."""
        found = None if closure is None else closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Loading a state makes new groups and a new state: the parts work on what is here.
            part.param_groups, part.state = [group], self.state
            part.step()
        return found
