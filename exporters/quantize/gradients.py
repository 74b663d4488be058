"""What the loss says about every block: one backward pass over calibration windows.

The loss of a token is the negative log-likelihood of a label drawn from the model's own prediction. The second
moment of its gradient g is then the Fisher matrix F, and for a small change delta of an activation
KL(dense || changed) = E[delta^T F delta] / 2 to second order. No labels are needed, and the text's own next tokens
(which would give the "empirical" Fisher) are not used.

Notation: x_t is a Linear's input for token t, g_t the gradient at its output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cfsp.devices import exact, exact_sum
from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, output_logits, state_size, token_tables
from cfsp.models.offload import (
    StoredStates,
    at_hand,
    enter_blocks,
    is_paged,
    leave_blocks,
    require_scratch,
    run_layer,
    run_windows,
)
from cfsp.progress import Progress, no_progress
from cfsp.pruning.statistics import gradient_hook

_HEAD_CHUNK = 256
LOOKUP = "lookup"
"""The token embedding as what looks a token up, apart from the output matrix that it may be, too."""


@dataclass
class WeightMoments:
    """What a change C of a weight costs, to second order: sum over i, j of C_ij^2 rows_i columns_j / 2 nats a token.

    The Fisher matrix's quadratic form E[(g_t^T C x_t)^2] / 2 without its off-diagonal terms, with E[g_ti^2 x_tj^2] as
    the product of E[g_ti^2] and x's mean square where every token counts as much as its gradient: rounding errors of
    one weight and the next are not alike, and the first token's huge activations move no prediction.

    Attributes:
        rows: (out_features,) float64, E[g_i^2] for the gradient g at the output.
        columns: (in_features,) float64, E[|g|^2 x_j^2] / E[|g|^2] for the input x.
        inputs: (in_features,) float64, E[x_j^2].
    """

    rows: torch.Tensor
    columns: torch.Tensor
    inputs: torch.Tensor

    def cost(self, change: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Nats a token that a change of some rows costs, by rows, (n,) float64.

        Args:
            change: Of these rows, (n, in_features).
            weights: What `rows` has of each of them and of those that it stands for, (n,) float64.
        """
        return exact(change).square() @ self.columns * weights / 2


def collect_weight_moments(
    model: Any, names: Iterable[str], input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> dict[str, WeightMoments]:
    """Run every window forwards and backwards once.

    Args:
        model: A causal LM of the architecture table, in eval mode; unchanged.
        names: Of Linears, of further tables of tokens, and `LOOKUP`: the token embedding as what looks a token up.
        input_ids: (nsamples, seqlen) int64.
        progress: Told after each window, or block.

    Raises:
        InputError: A gradient is not finite.
    """
    sums: dict[str, WeightMoments] = {}

    def add(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        strength, squares = exact_sum(g.square(), 1), exact(x).square()
        keep(name, WeightMoments(exact_sum(g.square(), 0), strength @ squares, squares.sum(0)))

    def add_lookups(window: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        # The input is one-hot, so x_j^2 is the token's share, and rows and columns change places.
        for (name, table), g in zip(tables.items(), gradients, strict=True):
            squares = exact(g).square() * float(getattr(table, "embed_scale", 1.0)) ** 2
            rows = squares.new_zeros(len(table.weight))
            rows.index_add_(0, window.to(rows.device), squares.sum(1))
            keep(name, WeightMoments(rows, squares.sum(0), squares.sum(0)))

    def keep(name: str, new: WeightMoments) -> None:
        old = sums.get(name)
        sums[name] = (
            new
            if old is None
            else WeightMoments(old.rows + new.rows, old.columns + new.columns, old.inputs + new.inputs)
        )

    _, *further = token_tables(model)
    tables = {LOOKUP: model.get_input_embeddings()}
    tables |= {name: module for name, module in model.named_modules() if module in further}
    linears = [name for name in names if name not in tables]
    generator = torch.Generator(device=model.device).manual_seed(0)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    run = _backwards_by_blocks if is_paged(model) else _backwards_by_windows
    with torch.enable_grad(), ExitStack() as stack:
        model.requires_grad_(False)
        for name in linears:
            stack.enter_context(gradient_hook(model.get_submodule(name), partial(add, name)))
        try:
            for window, gradients in run(model, input_ids.to(model.device), generator, progress):
                add_lookups(window, gradients)
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained[name])
    result: dict[str, WeightMoments] = {}
    for name, total in sums.items():
        strength, n_tokens = float(total.rows.sum()), input_ids.numel()
        if not math.isfinite(strength):
            raise InputError("gradients are not finite; check the weights and their dtype", field=name)
        moments = (total.rows / n_tokens, total.columns / max(strength, 1e-300), total.inputs / n_tokens)
        result[name] = WeightMoments(*(each.cpu() for each in moments))
    return result


_WHAT = "measuring gradients"
_Embedded = Iterator[tuple[torch.Tensor, list[torch.Tensor]]]
"""Each window (seqlen,) and the gradients at what each of `token_tables` gives for it, (seqlen, columns)."""


def _backwards_by_windows(
    model: Any, input_ids: torch.Tensor, generator: torch.Generator, progress: Progress
) -> _Embedded:
    for done, window in enumerate(input_ids, 1):
        with _embeddings_as_leaves(model) as embedded:
            hidden = model.get_decoder()(input_ids=window[None], use_cache=False).last_hidden_state
        torch.autograd.backward(hidden, _head_gradient(model, hidden, generator))
        yield window, [_gradient(embedded[table])[0] for table in token_tables(model)]
        progress(_WHAT, done, len(input_ids))


@contextmanager
def _embeddings_as_leaves(model: Any) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Collect what each of `token_tables` gives while the context is open; a backward pass ends there."""
    embedded: dict[nn.Module, torch.Tensor] = {}

    def keep(table: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        embedded[table] = output.detach().requires_grad_()
        return embedded[table]

    with ExitStack() as stack:
        for table in token_tables(model):
            stack.enter_context(table.register_forward_hook(keep))
        yield embedded


def _backwards_by_blocks(
    model: Any, input_ids: torch.Tensor, generator: torch.Generator, progress: Progress
) -> _Embedded:
    """The same with one block in memory: it is run again when its gradients are due.

    Beside hidden states, gradients go back through what a block gets of each token, and through the keys and values
    that it reads of an earlier block.
    """
    layers = decoder_layers(model)
    require_scratch(input_ids.numel() * state_size(model.config) * torch.float32.itemsize * len(layers))
    before = StoredStates()
    with torch.no_grad():
        states, calls = enter_blocks(model, layers, input_ids)
        for index, layer in enumerate(layers):
            before.put(index, states)
            with at_hand(layer):
                states = run_windows(layer, index, states, calls)
            progress(_WHAT, index + 1, 2 * len(layers))
    gradients: list[torch.Tensor] = []
    with at_hand(model.get_output_embeddings()):
        for state in states:
            normed = leave_blocks(model, state.requires_grad_())
            torch.autograd.backward(normed, _head_gradient(model, normed, generator))
            gradients.append(_gradient(state))
    of_inputs: list[dict[tuple[int, str], torch.Tensor]] = [{} for _ in gradients]
    of_keys: list[dict[Any, tuple[torch.Tensor, ...]]] = [{} for _ in gradients]
    for index, layer in reversed(list(enumerate(layers))):
        with at_hand(layer):
            for window, state in enumerate(before.get(index, model.device)):
                arguments = calls.of(index, window)
                leaves: dict[str, torch.Tensor] = {}
                for name, value in calls.own[window][index].items():
                    if isinstance(value, torch.Tensor):
                        arguments[name] = leaves[name] = value.detach().requires_grad_()
                read: dict[Any, tuple[torch.Tensor, ...]] = {}
                if calls.shared:
                    left = arguments[calls.shared]
                    read = {k: tuple(t.detach().requires_grad_() for t in pair) for k, pair in left.items()}
                    arguments[calls.shared] = left = copy.copy(left)
                    left.update(read)
                outputs = [run_layer(layer, state.requires_grad_(), arguments)]
                given = [gradients[window]]
                for kind in [kind for kind in read if left[kind] is not read[kind]]:
                    # The block has left its own there, which later ones may have read.
                    del read[kind]
                    if kind in of_keys[window]:
                        outputs += left[kind]
                        given += of_keys[window].pop(kind)
                torch.autograd.backward(outputs, given)
                gradients[window] = _gradient(state)
                of_inputs[window] |= {(index, name): _gradient(leaf) for name, leaf in leaves.items()}
                for kind, pair in read.items():
                    known = of_keys[window].get(kind)
                    new = tuple(map(_gradient, pair))
                    of_keys[window][kind] = new if known is None else tuple(map(torch.add, known, new))
        progress(_WHAT, 2 * len(layers) - index, 2 * len(layers))
    with at_hand(model.get_input_embeddings()):
        for window, gradient, inputs in zip(input_ids, gradients, of_inputs, strict=True):
            with _embeddings_as_leaves(model) as embedded:
                (entered,), calls = enter_blocks(model, layers, window[None])
            outputs = [entered, *(calls.own[0][index][name] for index, name in inputs)]
            torch.autograd.backward(outputs, [gradient, *inputs.values()])
            yield window, [_gradient(embedded[table])[0] for table in token_tables(model)]


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _head_gradient(model: Any, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The gradient at the output matrix's inputs (1, seqlen, hidden_size), for labels that are drawn.

    The matrix multiplies in chunks, so that seqlen x vocab_size is never held.
    """
    ending = hidden[0].detach().requires_grad_()
    for chunk in torch.split(ending, _HEAD_CHUNK):
        logits = output_logits(model, chunk)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.autograd.backward(F.cross_entropy(logits, labels, reduction="sum"))
    assert ending.grad is not None
    return ending.grad[None]
