"""Reconstruction block after block: each down_proj is solved on what the already pruned blocks before it give.

Two streams of hidden states run side by side. The dense one says what every block should give, the pruned one what
it gets. In block l, with the pruned stream as input, the dense FFN would give o (T x d) and the block h; the dense
stream has h*. down_proj is solved for

    o + c (h* - h)

so that, beside doing the removed channels' work, it takes back a share c of the error that earlier blocks left in
the residual stream. c = 0 only follows the pruned stream. c = 1 aims at the dense stream itself, which fits the
calibration text too closely: an error cannot be told from what the block itself should say about such text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cfsp.models.architectures import FeedForward, decoder_layers, feed_forward
from cfsp.progress import Progress, no_progress
from cfsp.pruning.reconstruction import solve_change
from cfsp.pruning.streaming import GramSum, enter_blocks, input_hook, output_hook, run_layer
from cfsp.pruning.surgery import cut_channels


def prune_block_by_block(
    model: Any,
    kept: Sequence[torch.Tensor],
    input_ids: torch.Tensor,
    *,
    ridge: float,
    correction: float,
    progress: Progress = no_progress,
) -> None:
    """Cut and solve every block of a dense model, first to last, in place.

    Memory beyond the model: four times the hidden states of the windows, and one block's Gram matrix.

    Args:
        model: The dense model, in eval mode.
        kept: Per block the kept channels, (n_kept,) int64, ascending; a block that keeps all is left as it is.
        input_ids: Calibration windows, (nsamples, seqlen) int64.
        ridge: As in `solve_change`.
        correction: c, in [0, 1].
        progress: Told after each block.

    Raises:
        InputError: A block cannot be solved.
    """
    layers = decoder_layers(model)
    # Not inference mode: weights made in it could never be trained.
    with torch.no_grad():
        dense, calls = enter_blocks(model, layers, torch.split(input_ids, 1))
        pruned = [hidden.clone() for hidden in dense]
        for index, layer in enumerate(layers):
            ffn = feed_forward(model, layer)
            for window, hidden in enumerate(dense):
                dense[window] = run_layer(layer, hidden, calls[index][window])
            if len(kept[index]) == ffn.width:
                for window, hidden in enumerate(pruned):
                    pruned[window] = run_layer(layer, hidden, calls[index][window])
            else:
                solver = _Block(layer, ffn, kept[index], correction)
                rests = [
                    solver.observe(hidden, dense[window], calls[index][window])
                    for window, hidden in enumerate(pruned)
                ]
                cut_channels(ffn, kept[index], solver.solve(ridge))
                pruned = [rest + ffn.module(ffn_input) for rest, ffn_input in rests]
            progress("pruning", index + 1, len(layers))


class _Block:
    """The sums of one block's least-squares problem."""

    def __init__(self, layer: nn.Module, ffn: FeedForward, kept: torch.Tensor, correction: float) -> None:
        self.layer, self.ffn, self.kept, self.correction = layer, ffn, kept, correction
        self.columns = ffn.down.weight[:, kept]
        self.gram = GramSum(len(kept))
        self.missing = torch.zeros(len(kept), ffn.down.weight.shape[0], dtype=torch.float64)
        self.n_tokens = 0
        self.x = self.given = self.ffn_input = torch.empty(0)

    def observe(
        self, hidden: torch.Tensor, wanted: torch.Tensor, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the pruned stream through the block as it still is, and add to the sums.

        Args:
            hidden: The pruned stream before the block, (1, seqlen, hidden_size).
            wanted: The dense stream after it, h*.
            arguments: Of the block's call.

        Returns:
            (the block's output without its FFN, the FFN's input), each (1, seqlen, hidden_size).
        """
        with output_hook(self.ffn.down, self._keep_down), input_hook(self.ffn.gate, self._keep_ffn_input):
            output = run_layer(self.layer, hidden, arguments)
        given = self.given
        kept_x = self.x[..., self.kept]
        # The bias, where there is one, is in both terms and cancels.
        lost = given - nn.functional.linear(kept_x, self.columns, self.ffn.down.bias)
        lacks = lost + self.correction * (wanted - output)
        x = kept_x.reshape(-1, len(self.kept)).float()
        self.gram.add(x)
        self.missing += x.T @ lacks.reshape(len(x), -1).float()
        self.n_tokens += len(x)
        return output - given, self.ffn_input

    def solve(self, ridge: float) -> torch.Tensor:
        """The kept weights, (hidden_size, n_kept)."""
        change = solve_change(self.gram.total() / self.n_tokens, self.missing / self.n_tokens, ridge)
        return (self.columns.double() + change).to(self.columns.dtype)

    def _keep_down(self, x: torch.Tensor, output: torch.Tensor) -> None:
        self.x, self.given = x, output

    def _keep_ffn_input(self, x: torch.Tensor) -> None:
        self.ffn_input = x
