"""Reconstruction block after block: each down_proj is solved on what the already pruned blocks before it give.

Two streams of hidden states run side by side. The dense one says what every block should give, the pruned one what
it gets. In block l, with the pruned stream as input, the dense FFN would give o (T x d) and the block h; the dense
stream has h*. down_proj is solved for

    o + c (h* - h)

so that, beside doing the removed channels' work, it takes back a share c of the error that earlier blocks left in
the residual stream. Where whole blocks after l go, h and h* are taken after these, and down_proj does what they would
have added as well. Where the block loses its attention, h is what it would give with it. c = 0 only follows the pruned
stream. c = 1 aims at the dense stream itself, which fits the calibration text too closely: an error cannot be told
from what the block itself should say about such text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import FeedForward, decoder_layers, feed_forward
from cfsp.pruning.axes.removal import attention_left_out
from cfsp.pruning.reconstruction import solve_change
from cfsp.pruning.streaming import GramSum, enter_blocks, input_hook, output_hook, run_layer
from cfsp.pruning.surgery import Cut, cut_channels


def prune_block_by_block(cut: Cut) -> None:
    """Cut and solve every block of a dense model, first to last, in place; one that keeps all is left as it is.

    Blocks that go are not taken out yet, and are what they were.

    Memory beyond the model: four times the hidden states of the windows, and one block's Gram matrix.

    Raises:
        InputError: No calibration windows, or a block cannot be solved.
    """
    if cut.input_ids is None:
        raise InputError("reconstruction block by block needs the calibration windows")
    layers = decoder_layers(cut.model)
    ffns = [feed_forward(cut.model, layer) for layer in layers]
    changed = [
        index
        for index, (ffn, kept) in enumerate(zip(ffns, cut.kept, strict=True))
        if index not in cut.gone and (len(kept) < ffn.width or index + 1 in cut.gone or index in cut.silent)
    ]
    # Not inference mode: weights made in it could never be trained.
    with torch.no_grad():
        dense, calls = enter_blocks(cut.model, layers, cut.input_ids)
        pruned = dense
        for index in (index for index in range(max(changed, default=-1) + 1) if index not in cut.gone):
            layer, ffn, kept = layers[index], ffns[index], cut.kept[index]
            after = _blocks_after(layers, calls, index, cut.gone)
            wanted = list(dense) if pruned is dense else dense
            for window, hidden in enumerate(dense):
                wanted[window] = after(run_layer(layer, hidden, calls[index]))
            if index in changed:
                solver = _Block(layer, ffn, kept, cut.correction, after, silent=index in cut.silent)
                rests = [
                    solver.observe(hidden, target, calls[index])
                    for hidden, target in zip(pruned, wanted, strict=True)
                ]
                cut_channels(ffn, kept, solver.solve(cut.ridge))
                pruned = [rest + ffn.module(ffn_input) for rest, ffn_input in rests]
            elif pruned is dense:
                pruned = wanted
            else:
                pruned = [run_layer(layer, hidden, calls[index]) for hidden in pruned]
            dense = wanted
            cut.progress("pruning", index + 1, max(changed) + 1)


_Run = Callable[[torch.Tensor], torch.Tensor]


def _blocks_after(
    layers: Sequence[nn.Module], calls: Sequence[dict[str, Any]], index: int, gone: frozenset[int]
) -> _Run:
    """What the blocks that go directly after a block make of hidden states; the same states where none do."""

    def run(hidden: torch.Tensor) -> torch.Tensor:
        for later in range(index + 1, len(layers)):
            if later not in gone:
                break
            hidden = run_layer(layers[later], hidden, calls[later])
        return hidden

    return run


class _Block:
    """The sums of one block's least-squares problem."""

    def __init__(
        self,
        layer: nn.Module,
        ffn: FeedForward,
        kept: torch.Tensor,
        correction: float,
        after: _Run,
        *,
        silent: bool,
    ) -> None:
        self.layer, self.ffn, self.kept, self.correction = layer, ffn, kept, correction
        self.after, self.silent = after, silent
        self.columns = ffn.down.weight[:, kept]
        self.gram = GramSum(len(kept))
        self.missing = torch.zeros(len(kept), ffn.down.weight.shape[0], dtype=torch.float64)
        self.n_tokens = 0

    def observe(
        self, hidden: torch.Tensor, wanted: torch.Tensor, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the pruned stream through the block as it still is, and add to the sums.

        Args:
            hidden: The pruned stream before the block, (1, seqlen, hidden_size).
            wanted: The dense stream after it and the blocks after it that go, h*.
            arguments: Of the block's call.

        Returns:
            (the pruned block's output without its FFN, the FFN's input), each (1, seqlen, hidden_size).
        """
        seen: dict[str, torch.Tensor] = {}
        whole = run_layer(self.layer, hidden, arguments) if self.silent else None
        with (
            attention_left_out(self.layer) if self.silent else nullcontext(),
            input_hook(self.ffn.gate, lambda x: seen.update(ffn_input=x)),
            output_hook(self.ffn.down, lambda x, given: seen.update(x=x, given=given)),
        ):
            output = run_layer(self.layer, hidden, arguments)
        given, kept_x = seen["given"], seen["x"][..., self.kept]
        # The bias, where there is one, is in both terms and cancels.
        lost = given - nn.functional.linear(kept_x, self.columns, self.ffn.down.bias)
        whole = self.after(output if whole is None else whole)
        lacks = lost + (whole - output) + self.correction * (wanted - whole)
        x = kept_x.reshape(-1, len(self.kept)).float()
        self.gram.add(x)
        self.missing += x.T @ lacks.reshape(len(x), -1).float()
        self.n_tokens += len(x)
        return output - given, seen["ffn_input"]

    def solve(self, ridge: float) -> torch.Tensor:
        """The kept weights, (hidden_size, n_kept)."""
        change = solve_change(self.gram.total() / self.n_tokens, self.missing / self.n_tokens, ridge)
        return (self.columns.double() + change).to(self.columns.dtype)
