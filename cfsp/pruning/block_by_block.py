"""Reconstruction block after block: each down_proj is solved on what the already pruned blocks before it give.

Two streams of hidden states run side by side. The dense one says what every block should give, the pruned one what
it gets. In block l, with the pruned stream as input, the dense FFN would give o (T x d) and the block h; the dense
stream has h*. down_proj is solved for

    o + c (h* - h)

so that, beside doing the removed channels' work, it takes back a share c of the error that earlier blocks left in
the residual stream. Where whole blocks after l go, h and h* are taken after these, and down_proj does what they would
have added as well. Where the block loses its attention, h is what it would give with it. Where it loses some key-value
groups, o_proj is solved before that, for what it gave with all. Where what an FFN adds goes through a norm first, what
it lacks goes back through that (`_Norm`). Of several hidden states of a token h and h* are the active ones. c = 0 only
follows the pruned stream. c = 1 aims at the dense stream itself, which fits the calibration text too closely: an error
cannot be told from what the block itself should say about such text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from cfsp.devices import exact, exact_zeros
from cfsp.errors import InputError
from cfsp.models.architectures import (
    added_norms,
    attention_of,
    decoder_layers,
    feed_forward,
    norm_epsilon,
    spec_for,
)
from cfsp.models.block_pass import Calls, enter_blocks, run_layer, run_windows
from cfsp.models.paging import at_hand
from cfsp.processes import mine, number_summed, summed
from cfsp.pruning.axes.kv_groups import group_channels
from cfsp.pruning.axes.removal import attention_left_out
from cfsp.pruning.reconstruction import solve_change
from cfsp.pruning.streaming import GramSum, input_hook, output_hook
from cfsp.pruning.surgery import Cut, cut_channels, cut_groups

_DAMPING = 0.01
"""Share of the mean square of a norm's gains that is added to each."""


def prune_block_by_block(cut: Cut) -> None:
    """Cut and solve every block of a dense model, first to last, in place; one that keeps all is left as it is.

    Blocks that go are not taken out yet, and are what they were. What the dense blocks give is read where the
    statistics have kept it, else they are run.

    Memory beyond the model: up to five times the hidden states of the windows, and one block's Gram matrix.

    Raises:
        InputError: No calibration windows, or a block cannot be solved.
    """
    if cut.input_ids is None:
        raise InputError("reconstruction block by block needs the calibration windows")
    layers = decoder_layers(cut.model)
    changed = _blocks_to_solve(cut, layers)
    last = max((*changed, *cut.groups), default=-1)
    # Not inference mode: weights made in it could never be trained.
    with torch.no_grad():
        windows = mine(cut.input_ids)
        kept = cut.statistics.stream_of(windows) if cut.statistics is not None else None
        dense, calls = enter_blocks(cut.model, layers, windows)
        pruned, pruned_calls = dense, calls
        for index in (index for index in range(last + 1) if index not in cut.gone):
            going = _blocks_going_after(layers, index, cut.gone)
            with at_hand(layers[index], *going):
                after, are_one = _blocks_after(layers, calls, index, cut.gone), pruned is dense
                if kept is not None:
                    wanted = kept.get(index + 1 + len(going), cut.model.device)
                else:
                    wanted = list(dense) if are_one else dense
                    for window, hidden in enumerate(dense):
                        output = run_layer(layers[index], hidden, calls.of(index, window))
                        wanted[window] = after(output, window)
                dense = wanted
                if are_one and index in (*changed, *cut.groups):
                    pruned_calls = calls.apart()
                if index in cut.groups:
                    _prune_attention(cut, index, pruned, pruned_calls)
                if index in changed:
                    pruned = _prune_block(cut, index, pruned, wanted, pruned_calls, after)
                elif are_one and index not in cut.groups:
                    pruned = wanted
                else:
                    pruned = run_windows(layers[index], index, pruned, pruned_calls)
            cut.progress("pruning", index + 1, last + 1)


def _blocks_to_solve(cut: Cut, layers: Sequence[nn.Module]) -> list[int]:
    """Blocks that lose channels or their attention, or that stand before a block that goes."""
    return [
        index
        for index, (layer, kept) in enumerate(zip(layers, cut.kept, strict=True))
        if index not in cut.gone
        and (len(kept) < feed_forward(cut.model, layer).width or index + 1 in cut.gone or index in cut.silent)
    ]


_Run = Callable[[torch.Tensor, int], torch.Tensor]
"""From hidden states, and the number of their window, to what becomes of them."""


def _blocks_going_after(layers: Sequence[nn.Module], index: int, gone: frozenset[int]) -> list[nn.Module]:
    """The blocks directly after a block that go."""
    return [layers[later] for later in takewhile(gone.__contains__, range(index + 1, len(layers)))]


def _blocks_after(layers: Sequence[nn.Module], calls: Calls, index: int, gone: frozenset[int]) -> _Run:
    """What the blocks that go directly after a block make of hidden states; the same states where none do."""
    going = _blocks_going_after(layers, index, gone)

    def run(hidden: torch.Tensor, window: int) -> torch.Tensor:
        for number, later in enumerate(going, index + 1):
            hidden = run_layer(later, hidden, calls.of(number, window))
        return hidden

    return run


def _prune_block(
    cut: Cut,
    index: int,
    pruned: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    calls: Calls,
    after: _Run,
) -> list[torch.Tensor]:
    """Cut a block's channels and solve its down_proj.

    Args:
        cut: What to cut.
        index: Of the block.
        pruned: Each window's pruned stream before the block, (..., 1, seqlen, hidden_size).
        wanted: The dense stream after it and the blocks after it that go, h*.
        calls: Of the pruned stream.
        after: What the blocks that go after it do.

    Returns:
        The pruned stream after it.
    """
    layer = decoder_layers(cut.model)[index]
    ffn, kept, silent = feed_forward(cut.model, layer), cut.kept[index], index in cut.silent
    norm = _Norm.of(cut.model, added_norms(cut.model, layer)[1])
    solver, rests = _Columns(ffn.down, kept, norm), []
    seen: dict[str, torch.Tensor] = {}
    spec = spec_for(cut.model.config)
    # What the block does with the sum behind its FFN is taken for the multiplication alone.
    # A block that is multiplied by 0 has nothing to take back.
    correction = (
        cut.correction / (float(getattr(layer, spec.scalar)) or 1.0) if spec.scalar else cut.correction
    )
    for window, (hidden, target) in enumerate(zip(pruned, wanted, strict=True)):
        arguments = calls.of(index, window)
        whole = run_layer(layer, hidden, arguments) if silent else None
        with (
            attention_left_out(layer) if silent else nullcontext(),
            input_hook(ffn.gate, lambda x: seen.update(ffn_input=x)),
            output_hook(ffn.down, lambda x, given: seen.update(x=x, given=given)),
        ):
            output = run_layer(layer, hidden, arguments)
        whole = after(output if whole is None else whole, window)
        lacks = (whole - output, correction * (target - whole))
        solver.observe(seen["x"], seen["given"], *lacks)
        if not spec.goes_on:
            rests.append((output - norm(seen["given"]), seen["ffn_input"]))
    cut_channels(ffn, kept, solver.solve(cut.ridge))
    if spec.goes_on:
        return run_windows(layer, index, pruned, calls)
    return [rest + norm(ffn.module(ffn_input)) for rest, ffn_input in rests]


def _prune_attention(cut: Cut, index: int, pruned: Sequence[torch.Tensor], calls: Calls) -> None:
    """Cut a block's key-value groups and solve its o_proj, for the pruned stream before the block."""
    layer = decoder_layers(cut.model)[index]
    attention = attention_of(cut.model, layer)
    o_proj = attention.o_proj
    norm = _Norm.of(cut.model, added_norms(cut.model, layer)[0])
    solver = _Columns(o_proj, group_channels(attention, o_proj.in_features, cut.groups[index]), norm)
    with output_hook(o_proj, solver.observe):
        run_windows(layer, index, pruned, calls)
    cut_groups(attention, cut.groups[index], solver.solve(cut.ridge))


@dataclass(frozen=True)
class _Norm:
    """What is between a Linear's output y and the residual sum: N(y) = g r(y) y, or nothing.

    r(y) = 1 / sqrt(mean(y^2) + epsilon) sees all of y, g is a number for each channel. N is blind to the size of y, so
    of all y' that give N(y) + e the one of y's size is meant, y + e / (g r(y)), and an error d of y' counts as r(y) d.

    Attributes:
        module: The norm; None for nothing.
        gain: g, (hidden_size,).
        epsilon: Of the mean.
    """

    module: nn.Module | None
    gain: torch.Tensor
    epsilon: float

    @classmethod
    def of(cls, model: Any, module: Any) -> _Norm:
        """A norm of one of `model`'s blocks, None for nothing."""
        gain = torch.ones(()) if module is None else module.weight + spec_for(model.config).norm_offset
        return cls(module, gain, norm_epsilon(model.config))

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """What is added to the residual sum."""
        added: torch.Tensor = y if self.module is None else self.module(y)
        return added

    def counts(self, y: torch.Tensor) -> torch.Tensor | None:
        """r(y), (..., 1); None where it is 1."""
        return None if self.module is None else (y.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()

    def before(self, lack: torch.Tensor) -> torch.Tensor:
        """e / g, damped where g is next to nothing and all that it could do is to change the size of y."""
        if self.module is None:
            return lack
        square = self.gain.square()
        return lack * (self.gain / (square + _DAMPING * square.mean()))


class _Columns:
    """The least-squares problem of a Linear of whose inputs some stay.

    Args:
        linear: As it still is.
        kept: (n_kept,) int64 input channels, ascending.
        norm: What its output goes through.
    """

    def __init__(self, linear: nn.Linear, kept: torch.Tensor, norm: _Norm) -> None:
        self.linear, self.kept, self.norm = linear, kept, norm
        self.columns = linear.weight[:, kept]
        device = linear.weight.device
        self.gram = GramSum(len(kept), device)
        self.missing = exact_zeros(len(kept), linear.out_features, device=device)
        self.n_tokens = 0

    def observe(self, x: torch.Tensor, given: torch.Tensor, *lacks: torch.Tensor) -> None:
        """Add to the sums.

        Args:
            x: The Linear's input, (1, seqlen, in_features).
            given: Its output, (1, seqlen, out_features).
            lacks: What should come out of the norm beside what does, as `given`.
        """
        kept_x = x[..., self.kept]
        # The bias, where there is one, is in both terms and cancels.
        missing = given - nn.functional.linear(kept_x, self.columns, self.linear.bias)
        counts = self.norm.counts(given)
        if counts is not None:
            kept_x, missing = kept_x * counts, missing * counts
        for more in lacks:
            missing = missing + self.norm.before(more)
        kept_x = kept_x.reshape(-1, len(self.kept)).float()
        self.gram.add(kept_x)
        products = kept_x.T @ missing.reshape(len(kept_x), -1).float()
        self.missing += products.to(self.missing.device)
        self.n_tokens += len(kept_x)

    def solve(self, ridge: float) -> torch.Tensor:
        """The kept weights, (out_features, n_kept)."""
        n_tokens = round(number_summed(self.n_tokens))
        change = solve_change(self.gram.mean(n_tokens), summed(self.missing).div_(n_tokens), ridge)
        return (exact(self.columns) + change).to(self.columns)
