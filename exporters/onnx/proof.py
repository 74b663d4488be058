"""A variant's graphs, reopened: shaped as the plan says, as close as the limits say, and all of them alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cfsp.errors import LimitError
from cfsp.models.offload import is_paged
from exporters.chats import ReadChats
from exporters.export_record import ExportRecord
from exporters.job import UNTRAINED
from exporters.onnx.checks import check_graph
from exporters.onnx.job import OnnxJob
from exporters.onnx.runtime import PREFILL_TOKENS, runtime_version
from exporters.onnx.stored import check_numbers
from exporters.onnx.variants import Variant
from exporters.onnx.writer import WrittenGraphs
from exporters.parity import check_limits

_SAME_LOGITS = 1e-2
"""Most that the two graphs of a variant may differ; their output matrix multiplies batches of other sizes."""


def prove(job: OnnxJob, variant: Variant, written: WrittenGraphs, chats: ReadChats) -> ExportRecord:
    """Compare the graph with the checkpoint, others of its weights with it, and describe it.

    Raises:
        LimitError: They are too far from the checkpoint, or not shaped as its plan says.
    """
    common, path = job.common, written.every
    graphs = [path, *([written.last] if written.last else [])]
    for graph in graphs:
        check_graph(graph, common.config)
    if not variant.portable:  # optimum's own names; the graph is proven in its logits, as float32 is
        check_numbers(path, job.model, written.slopes)
    choice = written.choice
    limits = common.settings.limits_of(variant)
    parity = job.divergence(variant, path) if choice is None else choice.held_to(limits)
    with job.opened(path) as model:
        window = common.reference.windows.ids[0, :PREFILL_TOKENS].numpy()
        every = next(iter(model.iter_logits(window)))[-1].copy()
    for other in graphs[1:]:
        with job.opened(other) as model:
            difference = float(np.abs(model.decode(window)[-1] - every).max())
        if not difference <= _SAME_LOGITS:
            raise LimitError(f"{other.name} differs from {path.name} by {difference:.4g} in a logit")
    check_limits(parity, f"{variant.name} ({path.name})")
    text = job.text_for(variant)
    return common.record(
        path,
        variant,
        choice,
        format="onnx",
        parity=parity,
        architecture=common.config.model_type,
        file_bytes=written.size_bytes,
        n_params=sum(parameter.numel() for parameter in job.model.parameters()),
        tensor_types=_tensor_types(path),
        warnings=(
            *_warnings(job, variant),
            *(choice.warnings() if choice else ()),
            *chats.warnings,
        ),
        chats=chats.equal,
        runtime=runtime_version(),
        calibration_sha256=job.text_sha256(variant),
        calibration_tokens=0 if text is None else text.numel(),
        budget_bytes=job.budget_bytes(variant),
        eight_bit_layers=written.eight_bits,
    )


def _warnings(job: OnnxJob, variant: Variant) -> Iterator[str]:
    if variant.calibrated and job.text_for(variant) is None:
        yield f"{variant.name} is rounded to the nearest numbers, without text"
    if variant.calibrated and job.text_for(variant) is not None and is_paged(job.model):
        yield UNTRAINED
    common = job.common
    if common.context_length < common.config.max_position_embeddings:
        yield (
            "the rope has other frequencies in longer texts, which no graph has: context_length is cut to "
            f"{common.context_length}"
        )
    yield from common.unproven_window()
    unknown_to_optimum = (
        (
            not common.config.shape.has_equal_heads,
            "differ in key-value heads, and optimum's ORTModelForCausalLM takes one number for all",
        ),
        (
            common.config.kept_of_texts,
            "have something else in the place of attention, and optimum's ORTModelForCausalLM knows no cache of it",
        ),
    )
    for is_there, what in unknown_to_optimum:
        if is_there:
            yield f"blocks {what}: it cannot run this graph; ONNX Runtime, GenAI and transformers.js can"


def _tensor_types(path: Path) -> dict[str, int]:
    """Stored type -> number of weights' tensors; scales, ropes' frequencies, single numbers and sizes are left out."""
    counts: Counter[str] = Counter()
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.dtype == ir.DataType.INT64 or tensor.size == 1:
            continue
        if name.endswith((".scale", ".frequencies")):
            continue
        packed = tensor.dtype == ir.DataType.UINT8
        counts[f"int{name.rpartition('.q')[2]}" if packed else tensor.dtype.name.lower()] += 1
    return dict(counts)
