"""A model block after block, as it is rounded: every layer is rounded for the inputs that it will really get.

Two streams of hidden states run side by side, as in `cfsp.pruning.block_by_block`: the exact one says what every layer
should give, the rounded one what it gets. Of x and x* that a layer with the weight W reads in the two, and of the
residual sums h and h* that its output is added to, the one that it is rounded to is not W but the W' for which W' x is
closest to

    W x + c (W (x* - x) + h* - h)

so that it takes back a share c of the error that the rounded ones before it have left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from cfsp.devices import exact_zeros
from cfsp.memory import require_memory
from cfsp.models.architectures import attention_of, block_linears, decoder_layers, feed_forward, spec_for
from cfsp.models.offload import Arguments, at_hand, enter_blocks, leave_blocks, run_layer
from cfsp.precision import bulk_products, exact_products, exact_sums
from cfsp.progress import Progress, no_progress
from cfsp.pruning.block_by_block import GramSum
from cfsp.pruning.statistics import input_hook
from exporters.quantize.rounding import factored

CORRECTION = 0.4
"""Share of earlier layers' error that is taken back: c. Of SmolLM2-135M in Q4_0 0.35 and 0.5 leave 0.77 to 0.85 of the
divergence that is there without, and 1, which fits the text too closely, 0.9 to 0.95. Shares of each layer's own, and
a larger ridge, were no better."""


class Reading(NamedTuple):
    """A layer that is about to read."""

    gram: torch.Tensor  # X^T X / T of its input, float64; layers that read the same tensor share one
    weight: torch.Tensor  # what it is to be rounded to, W' (rows, columns) float32


Readings = Mapping[str, Reading]
"""By module name."""
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_AT_ONCE = 4
"""Tensors of an FFN's width that are in memory at once, for all tokens; one is what is read in the exact stream."""
_SINK_SHARE = 0.25
"""The first token's weight over that of all tokens. Measured: 0.25 and 1 lose least, 0.03 a little more; tokens that
count by the root of their squared gradients, in every layer, as much."""


def round_blocks(
    model: Any,
    input_ids: torch.Tensor,
    visit: Callable[[int, Readings], Mapping[str, torch.Tensor]],
    *,
    correction: float = CORRECTION,
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Let a caller round layer after layer, each when it is about to read; a block is run once in each stream.

    `visit` is (index of a block, those of its layers that read one tensor) -> module -> what its weight has become,
    in the order in which layers read. The model, float32, stays as it is. Without a correction c there is one stream.

    Returns X^T X / T of the output matrix's inputs. Raises InputError: so much text, (nsamples, seqlen), does not fit
    the memory.
    """
    layers, linears = decoder_layers(model), block_linears(model)
    if model.device.type == "cpu":
        widest = max(linear.in_features for block in linears for linear in block.values())
        n_bytes = rounding_bytes(input_ids.numel(), widest)
        what = f"rounding for {len(input_ids)} windows of {input_ids.shape[1]} tokens"
        require_memory(
            n_bytes,
            what,
            "fewer windows (--set nsamples, --set rounding_windows), or shorter ones (--set seqlen)",
        )
    with torch.no_grad():
        windows, each = enter_blocks(model, layers, input_ids)
        hidden, calls, exact_calls = torch.cat(windows, dim=-3), each.together(), each.together()
        del windows
        exact = hidden
        for index, layer in enumerate(layers):
            with at_hand(layer), bulk_products(model.device.type):
                block = _Block(model, layer, linears[index], partial(visit, index), correction)
                groups = block.groups(hidden.narrow(-3, 0, 1), each.of(index))
                if correction:
                    # What the block makes of the exact stream, before anything of it is rounded.
                    firsts = {name: linears[index][name] for name in groups}
                    with _inputs(firsts, block.exact), _inputs(block.sums, block.exact_sums):
                        exact = run_layer(layer, exact, exact_calls.of(index))
                with block.rounded_when_read(groups):
                    hidden = run_layer(layer, hidden, calls.of(index))
            progress("quantizing", index + 1, len(layers) + 1)
        total = GramSum(hidden.shape[-1], hidden.device)
        for window in torch.split(hidden, 1, dim=-3):
            total.add(leave_blocks(model, window)[0].float())
        return total.mean(hidden.shape[-3:-1].numel())


def rounding_bytes(tokens: int, widest: int) -> int:
    """Of activations in memory at once where every layer is rounded for so many tokens; widest: most inputs of one."""
    return _AT_ONCE * tokens * widest * torch.float32.itemsize


def alike(forms: Mapping[str, Any], readings: Readings) -> list[list[str]]:
    """Names whose matrices can be rounded as one: those of one format that read the same."""
    groups: dict[tuple[Any, int], list[str]] = {}
    for name, form in forms.items():
        read = readings[name].gram if name in readings else name
        groups.setdefault((form, id(read)), []).append(name)
    return list(groups.values())


def _with_attention_sink(x: torch.Tensor) -> torch.Tensor:
    """Attention's inputs (seqlen, hidden_size), or what they lack, with the first token, the attention sink, larger.

    An error in its key or value reaches every other token (Xiao et al., arXiv 2309.17453). Unweighted, one v_proj made
    30 % of the whole divergence of SmolLM2-135M in four bits.
    """
    weighted = x.float().clone()
    weighted[0] *= max(1.0, _SINK_SHARE * len(x)) ** 0.5
    return weighted


class _Block:
    """A block whose layers are rounded when they are about to read."""

    def __init__(
        self,
        model: Any,
        layer: nn.Module,
        linears: Mapping[str, nn.Linear],
        visit: Callable[[Readings], Mapping[str, torch.Tensor]],
        correction: float,
    ) -> None:
        self._layer, self._linears, self._visit, self._correction = layer, linears, visit, correction
        # Of the exact stream what the first layer of each group reads; of both the residual sums.
        self.exact: dict[str, torch.Tensor] = {}
        self.exact_sums: dict[str, torch.Tensor] = {}
        self._own_sums: dict[str, torch.Tensor] = {}
        # Linear whose output is added to the residual sum as it is -> the norm that has read that before.
        self.sums: dict[str, nn.Module] = {}
        spec, attention = spec_for(model.config), attention_of(model, layer)
        if not (spec.added_norms or spec.goes_on):
            writers = {spec.ffn_norm: feed_forward(model, layer).down}
            if attention is not None:
                writers[spec.attention_norm] = getattr(attention, spec.output)
            names = {linear: name for name, linear in linears.items()}
            self.sums = {names[linear]: layer.get_submodule(norm) for norm, linear in writers.items()}

    def groups(self, window: torch.Tensor, arguments: Arguments) -> dict[str, tuple[str, ...]]:
        """First of the layers that read one tensor, as q, k and v do, or gate and up -> all of them."""
        # The tensor is held, or its id could belong to another one.
        read: dict[int, tuple[torch.Tensor, list[str]]] = {}

        def add(name: str, x: torch.Tensor) -> None:
            read.setdefault(id(x), (x, []))[1].append(name)

        with ExitStack() as stack, exact_products(window.device.type):
            for name, linear in self._linears.items():
                stack.enter_context(input_hook(linear, partial(add, name)))
            run_layer(self._layer, window, arguments)
        return {names[0]: tuple(names) for _, names in read.values()}

    @contextmanager
    def rounded_when_read(self, groups: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
        """Round each group when its first layer is about to read; layers compute with what the runtime will have."""
        weights = {name: linear.weight for name, linear in self._linears.items()}

        def round_group(names: tuple[str, ...], x: torch.Tensor) -> None:
            # A rounded sum of products need not be positive definite, beside channels a thousand times as large.
            with exact_sums(x.device.type):
                readings = self._readings(names, x)
            with exact_products(x.device.type):
                changed = self._visit(readings)
            for name, weight in changed.items():
                moved = weight.to(weights[name].device)
                self._linears[name].weight = nn.Parameter(moved, requires_grad=False)

        with ExitStack() as stack:
            if self._correction:
                stack.enter_context(_inputs(self.sums, self._own_sums))
            for first, names in groups.items():
                stack.enter_context(input_hook(self._linears[first], partial(round_group, names)))
            try:
                yield
            finally:
                for name, weight in weights.items():
                    self._linears[name].weight = weight

    def _readings(self, names: tuple[str, ...], x: torch.Tensor) -> dict[str, Reading]:
        """Of layers that read x (windows, seqlen, in_features): W' = W + c L^T X (H + RIDGE mean(diag H) I)^-1 / T.

        L, (T, rows), is what outputs lack, (X* - X) W^T + h* - h. Without sums and with more rows than columns inputs
        are corrected in place of outputs: (X* - X)^T X is the smaller product.
        """
        weigh = _with_attention_sink if names[0].endswith(_ATTENTION) else torch.Tensor.float
        count = x.shape[:-1].numel()
        gram_sum = GramSum(x.shape[-1], x.device)
        for window in x:
            gram_sum.add(weigh(window).float())
        gram = gram_sum.mean(count)
        weights = [self._linears[name].weight.detach().float() for name in names]
        exact = self.exact.pop(names[0], None)
        if exact is not None:
            own_sum, exact_sum = self._own_sums.pop(names[0], None), self.exact_sums.pop(names[0], None)
            whole = torch.cat(weights)
            rows, columns = whole.shape
            of_outputs = own_sum is not None or rows < columns
            total = exact_zeros(rows if of_outputs else columns, columns, device=whole.device)
            for n, (own, wanted) in enumerate(zip(x, exact, strict=True)):
                lack = (wanted - own).float()
                if of_outputs:
                    lack = lack @ whole.T
                if own_sum is not None and exact_sum is not None:
                    lack += exact_sum[n] - own_sum[n]
                total += (weigh(lack).T @ weigh(own)).to(total.device)
            total *= self._correction / count
            factor = factored(gram)
            change = torch.cholesky_solve(total.T.to(factor), factor).T.to(whole)
            whole = whole + (change if of_outputs else whole @ change)
            weights = list(torch.split(whole, [len(weight) for weight in weights]))
        return {name: Reading(gram, weight) for name, weight in zip(names, weights, strict=True)}


@contextmanager
def _inputs(modules: Mapping[str, nn.Module], kept: dict[str, torch.Tensor]) -> Iterator[None]:
    """Keep what modules read, by their names, while the context is open."""
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(input_hook(module, partial(kept.__setitem__, name)))
        yield
