"""A model block after block, as it is rounded: every layer is rounded for the inputs that it will really get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from cfsp.memory import require_memory
from cfsp.models.architectures import block_linears, decoder_layers
from cfsp.models.block_pass import Arguments, enter_blocks, leave_blocks, run_layer
from cfsp.models.paging import at_hand
from cfsp.precision import bulk_products, exact_products
from cfsp.progress import Progress, no_progress
from cfsp.pruning.streaming import GramSum, input_hook

Grams = Mapping[str, torch.Tensor]
"""Module name -> X^T X / T of its input; those that read the same tensor share one."""
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_AT_ONCE = 3
"""Tensors of an FFN's width that are in memory at once, for all tokens."""
_SINK_SHARE = 0.25
"""The first token's weight over that of all tokens. Measured: 0.25 and 1 lose least, 0.03 a little more."""


def round_blocks(
    model: Any,
    input_ids: torch.Tensor,
    visit: Callable[[int, Grams], Mapping[str, torch.Tensor]],
    *,
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Let a caller round layer after layer, and run each as it is then.

    A block is run once, with all windows beside each other: a layer is rounded when it is about to read, so that its
    inputs are what the rounded ones before it give, those of its own block too.

    Args:
        model: A causal LM of the architecture table, float32; unchanged.
        input_ids: Text to round for, (nsamples, seqlen).
        visit: (index of a block, inputs of those of its layers that read one tensor) -> module name -> what its weight
            has become; others stay. It is called several times a block, in the order in which layers read.
        progress: Told after each block, of one more than there are; the output matrix is the caller's.

    Returns:
        X^T X / T of the output matrix's inputs.

    Raises:
        InputError: So much text does not fit the memory.
    """
    layers, linears = decoder_layers(model), block_linears(model)
    if model.device.type == "cpu":
        widest = max(linear.in_features for block in linears for linear in block.values())
        n_bytes = rounding_bytes(input_ids.numel(), widest)
        what = f"rounding for {len(input_ids)} windows of {input_ids.shape[1]} tokens"
        require_memory(
            n_bytes, what, "fewer windows (--nsamples, --rounding-windows), or shorter ones (--seqlen)"
        )
    with torch.no_grad():
        windows, calls = enter_blocks(model, layers, input_ids)
        hidden, calls, first_calls = torch.cat(windows, dim=-3), calls.together(), calls.first()
        del windows
        for index, layer in enumerate(layers):
            with at_hand(layer):
                first = hidden.narrow(-3, 0, 1)
                groups = _read_together(linears[index], layer, first, first_calls.of(index))
                with (
                    bulk_products(model.device.type),
                    _rounded_when_read(linears[index], groups, partial(visit, index)),
                ):
                    hidden = run_layer(layer, hidden, calls.of(index))
            progress("quantizing", index + 1, len(layers) + 1)
        return _head_gram(model, hidden)


def rounding_bytes(tokens: int, widest: int) -> int:
    """Of activations in memory at once where every layer is rounded for so many tokens; widest: most inputs of one."""
    return _AT_ONCE * tokens * widest * torch.float32.itemsize


def alike(forms: Mapping[str, Any], grams: Grams) -> list[list[str]]:
    """Names whose matrices can be rounded as one: those of one format that read the same."""
    groups: dict[tuple[Any, int], list[str]] = {}
    for name, form in forms.items():
        groups.setdefault((form, id(grams.get(name, name))), []).append(name)
    return list(groups.values())


def _with_attention_sink(x: torch.Tensor) -> torch.Tensor:
    """Attention's inputs (seqlen, hidden_size), with the first token as large as its part in what comes out.

    Heads that have nothing to say attend to the first token (Xiao et al., arXiv 2309.17453), so an error in its key or
    value reaches every other token. Where it counts as one of hundreds, GPTQ moves the others' errors to it: on
    SmolLM2-135M in four bits, one v_proj then made 30 % of the whole divergence.
    """
    weighted = x.clone()
    weighted[0] *= max(1.0, _SINK_SHARE * len(x)) ** 0.5
    return weighted


def _head_gram(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """X^T X / T of the output matrix's inputs, from the last block's outputs."""
    total = GramSum(hidden.shape[-1], hidden.device)
    for window in torch.split(hidden, 1, dim=-3):
        total.add(leave_blocks(model, window)[0].float())
    return total.mean(hidden.shape[-3:-1].numel())


def _read_together(
    linears: Mapping[str, nn.Linear], layer: nn.Module, window: torch.Tensor, arguments: Arguments
) -> dict[str, tuple[str, ...]]:
    """First of the layers that read one tensor -> all of them, as q, k and v do, or gate and up."""
    read: dict[int, tuple[torch.Tensor, list[str]]] = {}  # holds it, or its id could belong to another one

    def add(name: str, x: torch.Tensor) -> None:
        read.setdefault(id(x), (x, []))[1].append(name)

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(input_hook(linear, partial(add, name)))
        run_layer(layer, window, arguments)
    return {names[0]: tuple(names) for _, names in read.values()}


@contextmanager
def _rounded_when_read(
    linears: Mapping[str, nn.Linear],
    groups: Mapping[str, tuple[str, ...]],
    visit: Callable[[Grams], Mapping[str, torch.Tensor]],
) -> Iterator[None]:
    """Round each group when its first layer is about to read; its layers compute with what the runtime will have."""
    weights = {name: linear.weight for name, linear in linears.items()}

    def round_group(names: tuple[str, ...], x: torch.Tensor) -> None:
        # A sum of rounded products need not be positive definite, beside channels that are a thousand times the others.
        with exact_products(x.device.type):
            gram = _input_gram(x, attention=names[0].endswith(_ATTENTION))
            changed = visit(dict.fromkeys(names, gram))
        for name, weight in changed.items():
            linears[name].weight = nn.Parameter(weight.to(weights[name].device), requires_grad=False)

    with ExitStack() as stack:
        for first, names in groups.items():
            stack.enter_context(input_hook(linears[first], partial(round_group, names)))
        try:
            yield
        finally:
            for name, weight in weights.items():
                linears[name].weight = weight


def _input_gram(x: torch.Tensor, *, attention: bool) -> torch.Tensor:
    """X^T X / T of inputs (windows, seqlen, in_features); attention's, with the first token's weight."""
    total = GramSum(x.shape[-1], x.device)
    for window in x:
        total.add((_with_attention_sink(window) if attention else window).float())
    return total.mean(x.shape[:-1].numel())
