"""What is summed up and watched while a decoder runs block by block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cfsp.devices import exact_zeros
from cfsp.processes import summed

_GRAM_TILE = 384


class GramSum:
    """Running X^T X of batches of X, in float64; only the upper tiles are multiplied, which is what costs."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._upper = exact_zeros(width, width, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add one batch, (tokens, width) float32."""
        width = self._upper.shape[0]
        for start in range(0, width, _GRAM_TILE):
            rows = slice(start, min(start + _GRAM_TILE, width))
            self._upper[rows, start:] += (x[:, rows].T @ x[:, start:]).to(self._upper.device)

    def mean(self, n_tokens: int) -> torch.Tensor:
        """X^T X / T, the whole symmetric matrix (width, width) float64; it takes the sum's place, which is over.

        The sum, like T, is that of all processes.
        """
        result, width = summed(self._upper), self._upper.shape[0]
        for start in range(0, width, _GRAM_TILE):
            tile = slice(start, start + _GRAM_TILE)
            square = result[tile, tile]
            square.copy_(square.triu() + square.triu(1).T)
            result[start + _GRAM_TILE :, tile] = result[tile, start + _GRAM_TILE :].T
        return result.div_(n_tokens)


def output_hook(linear: nn.Linear, receive: Callable[[torch.Tensor, torch.Tensor], None]) -> RemovableHandle:
    """Hand a Linear's input and output to `receive` each time it has run, while the context is open."""
    return linear.register_forward_hook(lambda _, args, output: receive(args[0], output))


def input_hook(module: nn.Module, receive: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Hand a module's input to `receive` each time it runs, while the context is open."""
    return module.register_forward_pre_hook(lambda _, args: receive(args[0]))


def gradient_hook(
    linear: nn.Linear, receive: Callable[[torch.Tensor, torch.Tensor], None]
) -> RemovableHandle:
    """Hand a Linear's input and the gradient at its output, (tokens, features) float32, to `receive`.

    Passes without gradients are not watched.
    """

    def watch(x: torch.Tensor, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        kept = x.detach()

        def add(gradient: torch.Tensor) -> None:
            g = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            receive(kept.reshape(len(g), -1).float(), g)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return output_hook(linear, watch)
