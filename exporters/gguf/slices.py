"""Proving a model that is too large to run whole as float32: its blocks, each in llama.cpp on what really enters it.

A slice is a GGUF file of a few blocks with the architecture and the settings of the whole. Its vocabulary are the
positions of a text, its embedding the hidden states that enter there: token t is position t. Its last norm is a plain
one, that of the last blocks the model's; its output matrix is the embedding again, so that its logits are the products
of what comes out of the blocks at one position with what entered at every other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfsp.errors import LimitError
from cfsp.models.architectures import decoder_layers, last_norm, spec_for
from cfsp.models.block_pass import enter_blocks, run_layer
from cfsp.models.paging import at_hand
from cfsp.models.shape import ModelShape
from cfsp.progress import Progress, no_progress
from cfsp.text.tokens import TokenWindows
from exporters.checkpoint_reader import open_tensors
from exporters.export_record import BlockProof
from exporters.gguf import runtime
from exporters.gguf.architecture import ChosenLayout, FloatArray, tensor_specs
from exporters.gguf.metadata import add_hyperparameters
from exporters.gguf.quants import QUANTS
from exporters.gguf.writer import PlainTensor, plain_rope_tensors, write_tensors

_LARGEST = 10.0
"""Of a language model's logits, so that a limit to their difference is one to a share of the largest."""
_BATCH = 128


@dataclass(frozen=True)
class _Slice:
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
        """What llama.cpp should compute, (tokens, tokens)."""
        normed = self.leaving * (self.leaving.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        return (normed * self.gain) @ self.entering.T


def prove_blocks(
    checkpoint: Path,
    model: Any,
    chosen: ChosenLayout,
    windows: TokenWindows,
    scratch: Path,
    *,
    n_threads: int,
    progress: Progress = no_progress,
) -> BlockProof:
    """Run every block of a checkpoint in torch and in llama.cpp, as float32, on the first window of a text.

    Args:
        checkpoint: Hugging Face folder.
        model: Its model, whose weights may stay in files.
        chosen: How it goes into GGUF files.
        windows: The text, (n_windows, seqlen).
        scratch: An existing folder, in which one slice at a time is written.
        n_threads: llama.cpp's.
        progress: Told after each slice.

    Raises:
        LimitError: A block gives something else in llama.cpp; the message says which.
    """
    largest, total, ids = 0.0, chosen.config.num_hidden_layers, windows.ids[:1]
    limit = ((chosen.layout.exact_limits or QUANTS["f32"].limits).max_logit_diff or 0.0) / _LARGEST
    for part in _slices(model, ids, chosen):
        path = scratch / f"blocks-{part.blocks.start}.gguf"
        try:
            _write(checkpoint, path, chosen, part)
            difference = _difference(path, part, chosen, n_threads)
        finally:
            path.unlink(missing_ok=True)
        if not difference <= limit:
            raise LimitError(
                f"block {part.blocks.start} is too far from the checkpoint in llama.cpp: {difference:.3g} of the "
                f"largest logit, above {limit:g}"
            )
        largest = max(largest, difference)
        progress("parity: blocks", part.blocks.stop, total)
    return BlockProof(total, ids.numel(), f"{windows.source} ({windows.sha256[:12]})", largest, limit)


def _slices(model: Any, ids: torch.Tensor, chosen: ChosenLayout) -> Iterator[_Slice]:
    """All blocks, few at a time."""
    layers = decoder_layers(model)
    with torch.inference_mode():
        (hidden,), calls = enter_blocks(model, layers, ids)
        for blocks in _runs(chosen):
            entering = hidden[0]
            for block in blocks:
                with at_hand(layers[block]):
                    hidden = run_layer(layers[block], hidden, calls[block])
            gain = torch.ones(hidden.shape[-1])
            if blocks.stop == len(layers):
                gain = last_norm(model).weight.float() + spec_for(model.config).norm_offset
            yield _Slice(blocks, entering.float(), hidden[0].float(), gain)


def _runs(chosen: ChosenLayout) -> list[range]:
    """As few blocks at a time as the architecture counts them by, and of each run one that attends.

    llama.cpp makes no context without, nor without a convolution where the architecture has any.
    """
    layout, kv_heads = chosen.layout, chosen.config.kv_heads
    windowed = chosen.config.narrowest is not None
    step = math.lcm(
        layout.unrotated_step or 1, layout.full_step or 1, (windowed and layout.windowed_depth) or 1
    )

    def is_complete(heads: Sequence[int]) -> bool:
        return any(heads) and not (chosen.config.convolution_length and all(heads))

    runs: list[range] = []
    for start in range(0, len(kv_heads), step):
        stop = min(start + step, len(kv_heads))
        if runs and not (is_complete(kv_heads[start:stop]) and is_complete(kv_heads[runs[-1].start : start])):
            runs[-1] = range(runs[-1].start, stop)
        else:
            runs.append(range(start, stop))
    return runs


def _write(checkpoint: Path, path: Path, chosen: ChosenLayout, part: _Slice) -> None:
    config, entering = chosen.config, part.entering
    blocks = tuple(replace(config.shape.blocks[block], origin=block) for block in part.blocks)
    its = replace(chosen, config=config.with_shape(ModelShape(len(entering), blocks)))
    factor = config.hidden_size**0.5 if config.spec.scaled_embedding else 1.0

    def add_metadata(writer: Any) -> None:
        add_hyperparameters(writer, its)
        writer.add_tokenizer_model("no_vocab")

    with open_tensors(checkpoint) as opened:
        tensors = [
            *plain_rope_tensors(its),
            _plain("token_embd.weight", (entering / factor).numpy()),
            *(
                PlainTensor(f"blk.{number}.{rest}", spec.shape, "F32", partial(spec.build, opened))
                for spec in tensor_specs(chosen)
                if (place := _place(spec.name, part.blocks)) is not None
                for number, rest in [place]
            ),
            _plain(chosen.name(f"model.{config.spec.last_norm}"), part.gain.numpy()),
            *([] if factor == 1 and chosen.layout.tied else [_plain("output.weight", entering.numpy())]),
        ]
        write_tensors(path, chosen.layout.architecture, add_metadata, tensors, "writing a block")


def _plain(name: str, values: FloatArray) -> PlainTensor:
    return PlainTensor(name, values.shape, "F32", lambda: values)


def _place(name: str, blocks: range) -> tuple[int, str] | None:
    """The number in a slice, and the rest, of a block's tensor; None of one that is not in it."""
    kind, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return (int(number) - blocks.start, rest) if kind == "blk" and int(number) in blocks else None


def _difference(path: Path, part: _Slice, chosen: ChosenLayout, n_threads: int) -> float:
    """The largest difference of a logit, relative to the largest of its position."""
    expected, start, largest = part.logits(chosen.config.rms_norm_eps), 0, 0.0
    with runtime.open_model(
        path, n_ctx=len(expected), n_threads=n_threads, n_batch=_BATCH, n_ubatch=_BATCH, kv_f32=True
    ) as opened:
        for piece in opened.iter_logits(np.arange(len(expected))):
            ours = expected[start : start + len(piece)]
            difference = (torch.from_numpy(piece) - ours).abs().amax(1) / ours.abs().amax(1)
            largest = max(largest, float(difference.max()))
            start += len(piece)
    return largest
