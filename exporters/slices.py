"""Proving a model that is too large to run whole as float32: its blocks, each in a runtime on what really enters it.

A slice is a file of a few blocks with the settings of the whole. Its vocabulary are the positions of a text, its
embedding the hidden states that enter there: token t is position t. Its last norm is a plain one, that of the last
blocks the model's; its output matrix is the embedding again, so that its logits are the products of what comes out of
the blocks at one position with what entered at every other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import LimitError
from cfsp.models.architectures import decoder_layers, last_norm, norm_epsilon, spec_for
from cfsp.models.block_pass import enter_blocks, run_layer
from cfsp.models.offload import at_hand
from cfsp.progress import Progress, no_progress
from cfsp.text.tokens import TokenWindows
from exporters.export_record import BlockProof
from exporters.parity import LARGEST_LOGIT


@dataclass(frozen=True)
class Slice:
    """Some blocks, and what goes through them.

    Attributes:
        blocks: Their numbers in the model.
        entering: Hidden states before them, (tokens, hidden_size) float32.
        leaving: Behind them.
        gain: What the norm behind them multiplies with, (hidden_size,).
    """

    blocks: range
    entering: torch.Tensor
    leaving: torch.Tensor
    gain: torch.Tensor

    def logits(self, epsilon: float) -> torch.Tensor:
        """What a runtime should compute, (tokens, tokens)."""
        normed = self.leaving * (self.leaving.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        return (normed * self.gain) @ self.entering.T


def prove_slices(
    model: Any,
    runs: Sequence[range],
    windows: TokenWindows,
    run: Callable[[Slice], Iterable[npt.NDArray[np.float32]]],
    *,
    runtime: str,
    max_logit_diff: float | None,
    progress: Progress = no_progress,
) -> BlockProof:
    """Run every block of a checkpoint in torch and in a runtime, as float32, on the first window of a text.

    Args:
        model: The checkpoint's, whose weights may stay in files.
        runs: Numbers of blocks, that each slice has.
        windows: The text, (n_windows, seqlen).
        run: A slice -> its logits in the runtime for tokens 0, 1, ..., in pieces (k, tokens) of successive positions.
        runtime: Its name.
        max_logit_diff: Limit of the format to the difference of a language model's logits.
        progress: Told after each slice.

    Raises:
        LimitError: A block gives something else in the runtime; the message says which.
    """
    largest, total, ids = 0.0, len(decoder_layers(model)), windows.ids[:1]
    limit = (max_logit_diff or 0.0) / LARGEST_LOGIT
    for part in _slices(model, ids, runs):
        difference = _difference(part.logits(norm_epsilon(model.config)), run(part))
        if not difference <= limit:
            raise LimitError(
                f"block {part.blocks.start} is too far from the checkpoint in {runtime}: {difference:.3g} of the "
                f"largest logit, above {limit:g}"
            )
        largest = max(largest, difference)
        progress("parity: blocks", part.blocks.stop, total)
    return BlockProof(total, ids.numel(), f"{windows.source} ({windows.sha256[:12]})", largest, limit)


def _slices(model: Any, ids: torch.Tensor, runs: Sequence[range]) -> Iterator[Slice]:
    """All blocks, few at a time."""
    layers = decoder_layers(model)
    with torch.inference_mode():
        (hidden,), calls = enter_blocks(model, layers, ids)
        for blocks in runs:
            entering = hidden[0]
            for block in blocks:
                with at_hand(layers[block]):
                    hidden = run_layer(layers[block], hidden, calls.of(block))
            gain = torch.ones(hidden.shape[-1])
            if blocks.stop == len(layers):
                gain = last_norm(model).weight.float() + spec_for(model.config).norm_offset
            yield Slice(blocks, entering.float(), hidden[0].float(), gain)


def _difference(expected: torch.Tensor, pieces: Iterable[npt.NDArray[np.float32]]) -> float:
    """The largest difference of a logit, relative to the largest of its position."""
    start, largest = 0, 0.0
    for piece in pieces:
        ours = expected[start : start + len(piece)]
        difference = (torch.from_numpy(piece) - ours).abs().amax(1) / ours.abs().amax(1)
        largest = max(largest, float(difference.max()))
        start += len(piece)
    return largest
