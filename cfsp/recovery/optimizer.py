"""Muon for the matrices of blocks, AdamW for all else: one optimizer to a trainer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along its momentum made orthogonal,
so that all directions of it are learnt at one pace. Steps are scaled to the size of AdamW's (Liu et al., arXiv
2502.16982), and torch has the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.recovery.settings import ADAMW, MUON, Training


def check_optimizer(settings: Training) -> None:
    """Raise InputError where torch is too old for what is asked for."""
    if settings.optimizer == MUON and not hasattr(torch.optim, "Muon"):
        why = f"torch {torch.__version__} has no Muon"
        raise InputError(why, field="optimizer", value=MUON, allowed=f"{ADAMW}, or torch 2.9")


class MuonAndAdamW(torch.optim.Optimizer):
    """Both, each with its own parameters and rates.

    Args:
        matrices: What Muon moves: weights of two dimensions.
        others: What AdamW moves.
        rate: Learning rate of the matrices.
        other_rate: Learning rate of all else.
        weight_decay: Of both; norms and biases have none, as in transformers.
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
        wide: list[torch.nn.Parameter] = []
        flat: list[torch.nn.Parameter] = []
        for parameter in others:
            (wide if parameter.ndim > 1 else flat).append(parameter)
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": wide, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=other_rate)
        self._parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters once."""
        found = None if closure is None else closure()
        groups = iter(self.param_groups)
        for part in self._parts:
            # Loading a state makes new groups and a new state: the parts work on what is here.
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state
            part.step()
        return found
