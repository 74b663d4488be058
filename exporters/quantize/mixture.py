"""Which of several ways to store each tensor, by what rounding it costs, so that a file has a size.

One backward pass over calibration text says what changes of weights cost. The loss of a token is the negative
log-likelihood of a label drawn from the model's own prediction: the second moment of its gradient g is then the Fisher
matrix F, and for a small change delta of an activation KL(dense || changed) = E[delta^T F delta] / 2 to second order.
A change C of a Linear's weight moves its output for token t by C x_t, which costs E[(g_t^T C x_t)^2] / 2:
`predict_divergence`. For many changes of each weight, `collect_weight_moments` keeps that form's diagonal, and some
rows are rounded. Loss and bytes of all tensors are then a knapsack with one choice a tensor: `solve`.

Notation: x_t is a Linear's input for token t, g_t the gradient at its output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
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

GRADIENT_WINDOWS = 4
"""Of the text, from which what changes cost is told."""
ROWS, TABLE_ROWS = 64, 512
"""Of a matrix, and of a table of tokens, that are rounded to see what a type costs it. Of SmolLM2-135M's matrices 64
drawn rows know what all of them cost to 2 to 7 %, by type (root mean square); 128 that matter most knew it to 15 %."""
LOOKUP = "lookup"
"""The token embedding as what looks a token up, apart from the output matrix that it may be, too."""
_ROWS_AT_ONCE, _STEPS, _HEAD_CHUNK = 8192, 2**16, 256
_WHAT = "measuring gradients"
Kind = TypeVar("Kind", bound=Hashable)
Change = tuple[str, slice, Callable[[slice], torch.Tensor]]
"""Name of a Linear; rows of its weight to which C is added; some of these -> their rows of C, (n, in_features) float32,
which is called for each window, so that not all have to be held."""
_Embedded = Iterator[tuple[torch.Tensor, list[torch.Tensor]]]
"""Each window (seqlen,) and the gradients at what each of `token_tables` gives for it, (seqlen, columns)."""


def predict_divergence(
    model: Any, changes: Mapping[str, Change], input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> dict[str, float]:
    """KL(model || one Linear changed), nats a token to second order, of many changes; InputError: not finite."""
    totals = dict.fromkeys(changes, 0.0)

    def add(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        _, rows, matrix = changes[name]
        g = g[:, rows]
        slopes = g.new_zeros(len(g))
        for start in range(0, g.shape[1], _ROWS_AT_ONCE):
            some = slice(start, min(start + _ROWS_AT_ONCE, g.shape[1]))
            slopes += (g[:, some] * (x @ matrix(some).T)).sum(1)
        totals[name] += float(slopes.square().sum())

    receivers = [(model.get_submodule(module), partial(add, name)) for name, (module, *_) in changes.items()]
    for _ in _backwards(model, receivers, input_ids, progress):
        pass
    return {name: _finite(name, total) / input_ids.numel() / 2 for name, total in totals.items()}


class WeightMoments(NamedTuple):
    """What a change C of a weight costs: sum over i, j of C_ij^2 rows_i columns_j / 2 nats a token.

    E[(g_t^T C x_t)^2] / 2 without off-diagonal terms, as rounding errors of two weights are not alike. In x's mean
    square a token counts as much as its gradient: the first one's huge activations move no prediction.
    """

    rows: torch.Tensor  # (out_features,) float64, E[g_i^2]
    columns: torch.Tensor  # (in_features,) float64, E[|g|^2 x_j^2] / E[|g|^2]
    inputs: torch.Tensor  # (in_features,) float64, E[x_j^2]


def collect_weight_moments(
    model: Any, names: Iterable[str], input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> dict[str, WeightMoments]:
    """What changes of Linears and token tables cost, the embedding as `LOOKUP`; errors as `predict_divergence`."""
    sums: dict[str, WeightMoments] = {}

    def keep(name: str, *new: torch.Tensor) -> None:
        old = sums.get(name)
        sums[name] = WeightMoments(*(new if old is None else map(torch.add, old, new)))

    def add(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        strength, squares = exact_sum(g.square(), 1), exact(x).square()
        keep(name, exact_sum(g.square(), 0), strength @ squares, squares.sum(0))

    _, *further = token_tables(model)
    tables = {LOOKUP: model.get_input_embeddings()}
    tables |= {name: module for name, module in model.named_modules() if module in further}
    receivers = [(model.get_submodule(name), partial(add, name)) for name in names if name not in tables]
    for window, gradients in _backwards(model, receivers, input_ids, progress):
        # The input is one-hot, so x_j^2 is the token's share, and rows and columns change places.
        for (name, table), g in zip(tables.items(), gradients, strict=True):
            squares = exact(g).square() * float(getattr(table, "embed_scale", 1.0)) ** 2
            rows = squares.new_zeros(len(table.weight))
            rows.index_add_(0, window.to(rows.device), squares.sum(1))
            keep(name, rows, squares.sum(0), squares.sum(0))
    result: dict[str, WeightMoments] = {}
    for name, total in sums.items():
        strength, n_tokens = _finite(name, float(total.rows.sum())), input_ids.numel()
        moments = (total.rows / n_tokens, total.columns / max(strength, 1e-300), total.inputs / n_tokens)
        result[name] = WeightMoments(*(each.cpu() for each in moments))
    return result


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise InputError("gradients are not finite; check the weights and their dtype", field=name)
    return value


class Sample(NamedTuple):
    """Some rows of a weight, which know what a change of all of them costs."""

    rows: torch.Tensor  # which
    columns: torch.Tensor  # what changes in each column cost beside each other, (columns,) float64
    weights: torch.Tensor  # the same of each row and of those that it stands for, (n,) float64

    def cost(self, change: torch.Tensor) -> torch.Tensor:
        """Nats a token that a change (n, columns) of the rows costs, row by row."""
        squares = exact(change[:, : len(self.columns)]).square()
        return squares @ self.columns * self.weights / 2


def draw(weight: torch.Tensor, moments: WeightMoments, count: int) -> Sample:
    """Rows of a weight, drawn by about what rounding each costs: rows_i (1 + u_i / mean(u) + v_i / mean(v)).

    u_i = sum_j W_ij^2 and v_i = sum_j W_ij^2 columns_j: types lose most where numbers, or inputs, are large.
    """
    columns = moments.columns.float().to(weight.device)
    kinds = torch.stack([torch.ones_like(columns), columns], 1)
    squares = exact(torch.cat([part.float().square() @ kinds for part in torch.split(weight, _ROWS_AT_ONCE)]))
    relative = squares / squares.mean(0).clamp_min(torch.finfo(squares.dtype).tiny)
    rows, factors = drawn_rows(moments.rows * (1 + relative.sum(1).cpu()), count)
    return Sample(rows, moments.columns, moments.rows[rows] * factors)


def drawn_rows(sizes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that stand for all in a sum: systematic sampling by size (Madow 1949), sizes (n,) float64, largest first.

    Returns rows, each once, (m,), and the factors with which theirs sum up to all rows' parts.
    """
    if count >= len(sizes):
        return torch.arange(len(sizes)), torch.ones_like(sizes)
    least = torch.finfo(sizes.dtype).tiny
    total = sizes.sum().clamp_min(least)
    order = sizes.argsort(descending=True, stable=True)
    steps = (torch.arange(count, dtype=sizes.dtype) + 0.5) / count
    draws = torch.searchsorted(sizes[order].cumsum(0) / total, steps).clamp_max(len(sizes) - 1)
    rows, times = torch.unique_consecutive(order[draws], return_counts=True)
    return rows, times / count * total / sizes[rows].clamp_min(least)


class Option(NamedTuple, Generic[Kind]):
    """A way to store a tensor."""

    kind: Kind
    n_bytes: int  # in the file
    loss: float  # nats a token, predicted


def solve(
    options: Mapping[str, Sequence[Option[Kind]]], left_bytes: int, steps: int = _STEPS
) -> dict[str, Option[Kind]]:
    """One option a name with the least loss that fits `left_bytes`, in so many steps of what is to be shared out."""
    least = {name: min(option.n_bytes for option in each) for name, each in options.items()}
    spare = left_bytes - sum(least.values())
    step = max(1, spare // steps)
    best = np.zeros(spare // step + 1)  # least loss of the names so far, by the steps that they may take
    picks = []
    for name, each in options.items():
        costs = [-(-(option.n_bytes - least[name]) // step) for option in each]
        tried = np.full((len(each), len(best)), np.inf)
        for row, cost, option in zip(tried, costs, each, strict=True):
            if cost < len(best):
                row[cost:] = best[: len(best) - cost] + option.loss
        pick = tried.argmin(0)
        best = tried[pick, np.arange(len(best))]
        picks.append((name, pick.astype(np.int8), costs))
    place, chosen = len(best) - 1, {}
    for name, pick, costs in reversed(picks):
        chosen[name] = options[name][pick[place]]
        place -= costs[pick[place]]
    return dict(reversed(chosen.items()))


def _backwards(
    model: Any, receivers: Sequence[tuple[nn.Linear, Any]], input_ids: torch.Tensor, progress: Progress
) -> _Embedded:
    """Forwards and backwards through every window, with a `gradient_hook` on each Linear; weights are frozen."""
    generator = torch.Generator(device=model.device).manual_seed(0)
    # By name: a page that comes back has other parameters, and what was there is let go.
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    input_ids = input_ids.to(model.device)
    with torch.enable_grad(), ExitStack() as stack:
        model.requires_grad_(False)
        for linear, receive in receivers:
            stack.enter_context(gradient_hook(linear, receive))
        try:
            if is_paged(model):
                yield from _backwards_by_blocks(model, input_ids, generator, progress)
                return
            for done, window in enumerate(input_ids, 1):
                with _embeddings_as_leaves(model) as embedded:
                    hidden = model.get_decoder()(input_ids=window[None], use_cache=False).last_hidden_state
                torch.autograd.backward(hidden, _head_gradient(model, hidden, generator))
                yield window, [_gradient(embedded[table])[0] for table in token_tables(model)]
                progress(_WHAT, done, len(input_ids))
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained[name])


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
    """As `_backwards` with one block in memory, run again when gradients of states, inputs and shared keys are due."""
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
    """The gradient at the output matrix's inputs (1, seqlen, hidden_size), for labels that are drawn, in chunks."""
    ending = hidden[0].detach().requires_grad_()
    for chunk in torch.split(ending, _HEAD_CHUNK):
        logits = output_logits(model, chunk)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.autograd.backward(F.cross_entropy(logits, labels, reduction="sum"))
    assert ending.grad is not None
    return ending.grad[None]
