"""Applying a plan: blocks are cut and solved one after the other, each on what the pruned blocks before it give.

Two streams of hidden states run side by side. The dense one says what every block should give, the pruned one what
it gets. In block l, with the pruned stream as input, the dense FFN would give o (T x d) and the block h; the dense
stream has h*. down_proj is solved for

    o + c (h* - h)

so that it does the removed channels' work and takes back a share c of the error that earlier blocks left in the
residual stream. c = 0 only follows the pruned stream; c = 1 fits the calibration text too closely, as an error cannot
be told from what the block itself should say about such text.

- If blocks after l go, h and h* are taken after these, and down_proj does what they would have added, too.
- If the block loses its attention, h is what it would give with it. If it loses key-value groups, o_proj is solved
  before that for what it gave with all.
- If an FFN's output passes a norm before it is added, what it lacks goes back through that (`_Norm`).
- Of several hidden states of a token h and h* are the active ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from cfsp.models.offload import Calls, StoredStates, at_hand, enter_blocks, run_layer, run_windows
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.parts import attention_left_out
from cfsp.pruning.plan import PruningPlan, check_plan_fits
from cfsp.pruning.statistics import input_hook, output_hook
from cfsp.pruning.surgery import (
    cut_channels,
    cut_groups,
    group_channels,
    remove_attention,
    remove_blocks,
    set_config_shape,
)
from cfsp.settings import check_settings

_DAMPING = 0.01
"""Share of the mean square of a norm's gains that is added to each."""
_GRAM_TILE = 384


def apply_plan(
    model: Any,
    plan: PruningPlan,
    *,
    input_ids: torch.Tensor | None = None,
    states: StoredStates | None = None,
    progress: Progress = no_progress,
) -> None:
    """Cut the model to the plan and repair what is left as the plan's settings say, in place.

    Blocks that keep all of their channels and their whole attention, and have no block after them that goes, are left
    untouched: a plan that removes nothing changes nothing. The repair needs the calibration windows, (nsamples,
    seqlen) int64; `states` are what the dense blocks give for them, if statistics kept it. Memory beyond the model:
    up to five times their hidden states, and one block's Gram matrix. Raises InputError: the plan belongs to another
    model, the repair has no windows, or a block cannot be solved.
    """
    check_plan_fits(model, plan)
    check_settings(plan.settings)
    if plan.keeps_blocks:
        return
    layers = decoder_layers(model)
    with torch.no_grad(), products_in(plan.settings.dtype, model.device.type):
        if plan.settings.repairs:
            if input_ids is None:
                raise InputError("reconstruction block by block needs the calibration windows")
            _prune_block_by_block(model, plan, input_ids, states, progress)
        else:
            for index, (layer, block) in enumerate(zip(layers, plan.blocks, strict=True)):
                with at_hand(layer):
                    if index in plan.narrowed:
                        cut_groups(attention_of(model, layer), plan.narrowed[index])
                    if index not in plan.gone and block.width < plan.dense_widths[index]:
                        cut_channels(feed_forward(model, layer), torch.tensor(block.kept))
                progress("pruning", index + 1, len(layers))
    for index in plan.silent:
        remove_attention(layers[index])
    remove_blocks(model, plan.gone)
    set_config_shape(model)


def _prune_block_by_block(
    model: Any, plan: PruningPlan, windows: torch.Tensor, states: StoredStates | None, progress: Progress
) -> None:
    """Cut and solve every block, first to last, in place; blocks that go are taken out later."""
    layers, groups = decoder_layers(model), plan.narrowed
    changed = [
        index
        for index, block in enumerate(plan.blocks)
        if index not in plan.gone
        and (block.width < plan.dense_widths[index] or index + 1 in plan.gone or index in plan.silent)
    ]
    last = max((*changed, *groups), default=-1)
    dense, calls = enter_blocks(model, layers, windows)
    pruned, pruned_calls = dense, calls
    for index in (index for index in range(last + 1) if index not in plan.gone):
        going = list(takewhile(plan.gone.__contains__, range(index + 1, len(layers))))

        def after(hidden: torch.Tensor, window: int, going: Sequence[int] = going) -> torch.Tensor:
            """What the blocks that go directly after this one make of its output."""
            for later in going:
                hidden = run_layer(layers[later], hidden, calls.of(later, window))
            return hidden

        with at_hand(layers[index], *(layers[later] for later in going)):
            are_one = pruned is dense
            if states is not None:
                wanted = states.get(index + 1 + len(going), model.device)
            else:
                wanted = list(dense) if are_one else dense
                for window, hidden in enumerate(dense):
                    wanted[window] = after(run_layer(layers[index], hidden, calls.of(index, window)), window)
            dense = wanted
            if are_one and index in (*changed, *groups):
                pruned_calls = calls.apart()
            if index in groups:
                attention = attention_of(model, layers[index])
                inputs = group_channels(attention, attention.o_proj.in_features, groups[index])
                norm = _Norm(model, added_norms(model, layers[index])[0])
                solver = _Columns(attention.o_proj, inputs, norm)
                with output_hook(attention.o_proj, solver.observe):
                    run_windows(layers[index], index, pruned, pruned_calls)
                cut_groups(attention, groups[index], solver.solve(plan.settings.ridge))
            if index in changed:
                pruned = _prune_block(model, plan, index, pruned, wanted, pruned_calls, after)
            elif are_one and index not in groups:
                pruned = wanted
            else:
                pruned = run_windows(layers[index], index, pruned, pruned_calls)
        progress("pruning", index + 1, last + 1)


def _prune_block(
    model: Any,
    plan: PruningPlan,
    index: int,
    pruned: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    calls: Calls,
    after: Callable[[torch.Tensor, int], torch.Tensor],
) -> list[torch.Tensor]:
    """Cut a block's channels, solve its down_proj, and return the pruned stream after it.

    Args:
        pruned: Each window's pruned stream before the block, (..., 1, seqlen, hidden_size); `calls` are of it.
        wanted: The dense stream h* after it and the blocks after it that go.
        after: From the block's output and the number of its window to the output of these blocks.
    """
    layer, silent = decoder_layers(model)[index], index in plan.silent
    ffn, kept = feed_forward(model, layer), torch.tensor(plan.blocks[index].kept)
    norm = _Norm(model, added_norms(model, layer)[1])
    solver, rests = _Columns(ffn.down, kept, norm), []
    seen: dict[str, torch.Tensor] = {}
    spec, correction = spec_for(model.config), plan.settings.correction
    if spec.scalar:
        # What the block does with the sum behind its FFN is taken for the multiplication alone.
        # A block that is multiplied by 0 has nothing to take back.
        correction /= float(getattr(layer, spec.scalar)) or 1.0
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
    cut_channels(ffn, kept, solver.solve(plan.settings.ridge))
    if spec.goes_on:
        return run_windows(layer, index, pruned, calls)
    return [rest + norm(ffn.module(ffn_input)) for rest, ffn_input in rests]


class _Norm:
    """What is between a Linear's output y and the residual sum: N(y) = g r(y) y, or nothing.

    r(y) = 1 / sqrt(mean(y^2) + epsilon) sees all of y, g is a number for each channel. N is blind to the size of y, so
    of all y' that give N(y) + e the one of y's size is meant, y + e / (g r(y)), and an error d of y' counts as r(y) d.
    """

    def __init__(self, model: Any, module: Any) -> None:
        self.module, self.epsilon = module, norm_epsilon(model.config)
        self.gain = None if module is None else module.weight + spec_for(model.config).norm_offset

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """What is added to the residual sum."""
        added: torch.Tensor = y if self.module is None else self.module(y)
        return added

    def counts(self, y: torch.Tensor) -> torch.Tensor | None:
        """r(y), (..., 1); None if it is 1."""
        return None if self.module is None else (y.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()

    def before(self, lack: torch.Tensor) -> torch.Tensor:
        """e / g, damped if g is next to nothing and all that it could do is to change the size of y."""
        if self.gain is None:
            return lack
        square = self.gain.square()
        before: torch.Tensor = lack * (self.gain / (square + _DAMPING * square.mean()))
        return before


class _Columns:
    """The least-squares problem of a Linear of whose inputs `kept`, (n_kept,) ascending, stay."""

    def __init__(self, linear: nn.Linear, kept: torch.Tensor, norm: _Norm) -> None:
        self.linear, self.kept, self.norm = linear, kept, norm
        self.columns = linear.weight[:, kept]
        device = linear.weight.device
        self.gram = GramSum(len(kept), device)
        self.missing = exact_zeros(len(kept), linear.out_features, device=device)
        self.n_tokens = 0

    def observe(self, x: torch.Tensor, given: torch.Tensor, *lacks: torch.Tensor) -> None:
        """Add the Linear's input and output, (1, seqlen, features), and what the norm's output should have besides."""
        kept_x = x[..., self.kept]
        # A bias is in both terms and cancels.
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
        """The kept weights, (out_features, n_kept).

        Their change Delta = M^T (H_SS + lambda mean(diag H_SS) I)^-1 minimizes ||E - X_S Delta^T||^2 / T plus the ridge
        times ||Delta||^2, with H_SS = X_S^T X_S / T, M = X_S^T E / T, and E (T x d) what the output lacks. A
        large lambda leaves the kept weights alone, while shrinking the weights themselves would fade channels that are
        rarely active.
        """
        gram, missing = self.gram.mean(self.n_tokens), self.missing.div_(self.n_tokens)
        change = torch.cholesky_solve(missing, damped_cholesky(gram, ridge)).T
        return (exact(self.columns) + change).to(self.columns)


class GramSum:
    """Running X^T X of batches of X, in float64; only the upper tiles are multiplied."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._upper = exact_zeros(width, width, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add one batch, (tokens, width) float32."""
        width = self._upper.shape[0]
        for start in range(0, width, _GRAM_TILE):
            rows = slice(start, min(start + _GRAM_TILE, width))
            self._upper[rows, start:] += (x[:, rows].T @ x[:, start:]).to(self._upper.device)

    def mean(self, n_tokens: int) -> torch.Tensor:
        """X^T X / T, (width, width) float64; it takes the place of the sum."""
        result, width = self._upper, self._upper.shape[0]
        for start in range(0, width, _GRAM_TILE):
            tile = slice(start, start + _GRAM_TILE)
            square = result[tile, tile]
            square.copy_(square.triu() + square.triu(1).T)
            result[start + _GRAM_TILE :, tile] = result[tile, start + _GRAM_TILE :].T
        return result.div_(n_tokens)


def damped_cholesky(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Lower Cholesky factor of H + ridge mean(diag H) I, for H (n, n) float64, in its place.

    Raises InputError: `ridge` is not positive, or the matrix is not finite or still singular.
    """
    if not ridge > 0:
        raise InputError("out of range", field="ridge", value=ridge, allowed="above 0")
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    # LAPACK's order of columns: the other one would be copied, which is as large as H.
    torch.linalg.cholesky_ex(gram.mT, upper=True, out=(gram.mT, info))
    if int(info) != 0:
        raise InputError("the reconstruction cannot be solved; raise the ridge", field="ridge", value=ridge)
    return gram
