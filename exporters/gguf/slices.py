"""A model's blocks as GGUF files of a few of them, each with the architecture and the settings of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cfsp.models.shape import ModelShape
from cfsp.progress import Progress, no_progress
from cfsp.text.tokens import TokenWindows
from exporters.checkpoint_reader import open_tensors
from exporters.export_record import BlockProof
from exporters.gguf import runtime
from exporters.gguf.architecture import ChosenLayout
from exporters.gguf.cache_types import PARITY_CACHE
from exporters.gguf.metadata import add_hyperparameters
from exporters.gguf.quants import QUANTS
from exporters.gguf.tensors import FloatArray, tensor_specs
from exporters.gguf.writer import PlainTensor, plain_rope_tensors, write_tensors
from exporters.slices import Slice, prove_slices

_BATCH = 128


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
    limits = chosen.exact_limits or QUANTS["f32"].limits
    return prove_slices(
        model,
        _runs(chosen),
        windows,
        partial(_logits, checkpoint, chosen, scratch, n_threads),
        runtime="llama.cpp",
        max_logit_diff=limits.max_logit_diff,
        progress=progress,
    )


def _logits(
    checkpoint: Path, chosen: ChosenLayout, scratch: Path, n_threads: int, part: Slice
) -> Iterator[FloatArray]:
    """What llama.cpp makes of a slice, position by position."""
    path, count = scratch / f"blocks-{part.blocks.start}.gguf", len(part.entering)
    try:
        _write(checkpoint, path, chosen, part)
        with runtime.open_model(
            path, n_ctx=count, n_threads=n_threads, n_batch=_BATCH, n_ubatch=_BATCH, cache_type=PARITY_CACHE
        ) as opened:
            yield from opened.iter_logits(np.arange(count))
    finally:
        path.unlink(missing_ok=True)


def _runs(chosen: ChosenLayout) -> list[range]:
    """As few blocks at a time as the architecture counts them by, and of each run one that attends.

    llama.cpp makes no context without, nor without what takes attention's place where the architecture has that.
    """
    layout, kv_heads = chosen.layout, chosen.config.kv_heads
    windowed = chosen.config.narrowest is not None
    step = math.lcm(
        layout.unrotated_step or 1, layout.full_step or 1, (windowed and layout.windowed_depth) or 1
    )

    def is_complete(heads: Sequence[int]) -> bool:
        return any(heads) and not (chosen.config.spec.mixer and all(heads))

    runs: list[range] = []
    for start in range(0, len(kv_heads), step):
        stop = min(start + step, len(kv_heads))
        if runs and not (is_complete(kv_heads[start:stop]) and is_complete(kv_heads[runs[-1].start : start])):
            runs[-1] = range(runs[-1].start, stop)
        else:
            runs.append(range(start, stop))
    return runs


def _write(checkpoint: Path, path: Path, chosen: ChosenLayout, part: Slice) -> None:
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
