"""A model's blocks as graphs of one each, with the settings of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cfsp.models.architectures import decoder_layers
from exporters.export_record import BlockProof
from exporters.onnx.decoder_graph import build_decoder
from exporters.onnx.graph_file import save_graph
from exporters.onnx.job import OnnxJob
from exporters.onnx.runtime import FloatArray, open_model
from exporters.onnx.variants import VARIANTS
from exporters.onnx.weights import slice_of
from exporters.slices import Slice, prove_slices


def prove_blocks(job: OnnxJob) -> BlockProof:
    """Run every block of a checkpoint in torch and in ONNX Runtime, as float32; see `prove_slices`."""
    common = job.common
    return prove_slices(
        job.model,
        [range(block, block + 1) for block in range(len(decoder_layers(job.model)))],
        common.reference.windows,
        partial(_logits, job),
        runtime="ONNX Runtime",
        max_logit_diff=VARIANTS["fp32"].limits.max_logit_diff,
        progress=common.progress,
    )


def _logits(job: OnnxJob, part: Slice) -> Iterator[FloatArray]:
    """What ONNX Runtime makes of a block, position by position."""
    path, count = job.common.folder / f"block-{part.blocks.start}.onnx", len(part.entering)
    data: Path | None = None
    try:
        graph: ir.Model = build_decoder(
            slice_of(job.model, part.blocks.start, part.entering, part.gain), name=path.stem
        )
        data = save_graph(graph, path)
        del graph
        with closing(open_model(path, n_ctx=count, n_threads=job.common.n_threads)) as opened:
            yield from opened.iter_logits(np.arange(count))
    finally:
        for file in filter(None, (path, data)):
            file.unlink(missing_ok=True)
