"""Running a decoder block by block, so that memory holds one depth of hidden states instead of all.

What is common to collecting statistics and to reconstructing block after block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cfsp.errors import InputError
from cfsp.memory import require_memory

_GRAM_TILE = 384


class GramSum:
    """Running X^T X of batches of X, in float64; only the upper tiles are multiplied, which is what costs."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._upper = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add one batch, (tokens, width) float32."""
        width = self._upper.shape[0]
        for start in range(0, width, _GRAM_TILE):
            rows = slice(start, min(start + _GRAM_TILE, width))
            self._upper[rows, start:] += x[:, rows].T @ x[:, start:]

    def total(self) -> torch.Tensor:
        """The whole symmetric matrix, (width, width) float64."""
        return self._upper.triu() + self._upper.triu(1).T


def run_layer(layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """A block's output, (batch, seqlen, hidden_size), whether the library returns a tensor or a tuple."""
    output = layer(hidden, **arguments)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def enter_blocks(
    model: Any, layers: Sequence[nn.Module], input_ids: torch.Tensor
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """What runs through the blocks, for windows (nsamples, seqlen).

    The decoder is run with its blocks short-circuited: masks, positions and rotary tables then are exactly what
    the model itself passes, whatever the architecture and the library's version. All windows share them, as they are
    equally long.

    Returns:
        Each window's hidden states before the first block, (1, seqlen, hidden_size); every block's keyword arguments.
    """
    hidden: list[torch.Tensor] = []
    in_tuple = _returns_tuple(model, layers, input_ids)
    record: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def passes_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise InputError(
                "the decoder passes block arguments by position; this architecture is unsupported"
            )
        record.append((hidden_states, kwargs))
        return (hidden_states,) if in_tuple else hidden_states

    if model.device.type == "cpu" and len(input_ids) > 1:
        n_bytes = input_ids.numel() * model.config.hidden_size * model.dtype.itemsize
        what = f"hidden states of {len(input_ids)} windows of {input_ids.shape[1]} tokens"
        require_memory(n_bytes, what, "fewer windows (--nsamples), or shorter ones (--seqlen)")
    with ExitStack() as stack:
        for layer in layers:
            layer.forward = passes_on
            stack.callback(delattr, layer, "forward")
        for window in torch.split(input_ids.to(model.device), 1):
            record.clear()
            model.get_decoder()(input_ids=window, use_cache=False)
            hidden.append(record[0][0].clone())
    return hidden, [arguments for _, arguments in record]


_IN_TUPLES: dict[type[nn.Module], bool] = {}
"""Kind of block -> whether it returns its hidden states in a tuple, as transformers 4's Gemma 3 does."""


def _returns_tuple(model: Any, layers: Sequence[nn.Module], input_ids: torch.Tensor) -> bool:
    """Whether the decoder expects its blocks to return tuples; of each kind of block one is asked."""
    kind = type(layers[0])
    if kind not in _IN_TUPLES:

        def look(_: nn.Module, __: Any, output: Any) -> None:
            _IN_TUPLES[kind] = isinstance(output, tuple)

        with layers[0].register_forward_hook(look):
            model.get_decoder()(input_ids=input_ids[:1, :2].to(model.device), use_cache=False)
    return _IN_TUPLES[kind]


def output_hook(linear: nn.Linear, receive: Callable[[torch.Tensor, torch.Tensor], None]) -> RemovableHandle:
    """Hand a Linear's input and output to `receive` each time it has run, while the context is open."""
    return linear.register_forward_hook(lambda _, args, output: receive(args[0], output))


def input_hook(linear: nn.Linear, receive: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Hand a Linear's input to `receive` each time it runs, while the context is open."""
    return linear.register_forward_pre_hook(lambda _, args: receive(args[0]))


def gradient_hook(
    linear: nn.Linear, receive: Callable[[torch.Tensor, torch.Tensor], None]
) -> RemovableHandle:
    """Hand a Linear's input and the gradient at its output, (tokens, features) float32, to `receive`."""

    def watch(x: torch.Tensor, output: torch.Tensor) -> None:
        kept = x.detach()

        def add(gradient: torch.Tensor) -> None:
            g = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            receive(kept.reshape(len(g), -1).float(), g)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return output_hook(linear, watch)
