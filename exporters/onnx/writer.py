"""A variant's graphs on disk: layers as the variant stores them, the graphs over them, the file of their weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch

from cfsp.devices import moved
from cfsp.errors import InputError
from cfsp.files import sha256_file
from exporters.job import load_checkpoint
from exporters.onnx.decoder_graph import OPSET, Decoder, build_decoder
from exporters.onnx.int8_rows import Int8Weights
from exporters.onnx.job import OnnxJob
from exporters.onnx.mixed import choose_few, choose_mixture, quantized_model, with_eight_bits
from exporters.onnx.portable import portable_graph
from exporters.onnx.quantize import QuantizedModel, quantize_linears, tune
from exporters.onnx.variants import Variant, formats_without_text
from exporters.onnx.weights import Weights, decoder_of

_EXTERNAL_BYTES = 1024
"""Smaller weights stay inside the graph."""


@dataclass(frozen=True)
class WrittenGraphs:
    """A variant's files.

    Attributes:
        every: The graph with the logits of every position.
        last: The one with the last position's alone; None where a variant has none.
        data: The weights of both.
        eight_bits: Layers to which text gave them.
    """

    every: Path
    last: Path | None
    data: Path
    eight_bits: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """The graph with all logits and its weights."""
        return self.every.stat().st_size + self.data.stat().st_size


def write_graphs(job: OnnxJob, variant: Variant, folder: Path) -> WrittenGraphs:
    """Write folder/<stem>.onnx, <stem>_last.onnx and <stem>.onnx_data.

    Raises:
        InputError: A model that the graph cannot compute, or a budget that it does not fit.
    """
    common, path = job.common, folder / f"{variant.stem}.onnx"
    if variant.portable:
        common.progress(f"writing {variant.name}", 0, 1)
        # A model of its own: optimum's exporter changes the one that it is given.
        model = load_checkpoint(common.checkpoint)
        portable = portable_graph(model, name=_graph_name(job, variant), opset=common.settings.opset)
        # One graph: who takes standard operators alone wants what optimum's users expect.
        return WrittenGraphs(path, None, save_graph(portable, path, metadata=_origin(job, variant)))
    weights, eight_bits = _weights(job, variant)
    decoder = decoder_of(job.model, weights)
    common.progress(f"writing {variant.name}", 0, 1)
    every = _graph(job, variant, decoder)
    data = save_graph(every, path, metadata=_origin(job, variant))
    stored = {k: v.const_value for k, v in every.graph.initializers.items() if v.const_value is not None}
    last = _graph(job, variant, decoder, stored)
    last.metadata_props.update(every.metadata_props)
    last_path = folder / f"{variant.stem}_last.onnx"
    ir.save(last, last_path)
    return WrittenGraphs(path, last_path, data, eight_bits)


def _weights(job: OnnxJob, variant: Variant) -> tuple[Weights, tuple[str, ...]]:
    """How weights are stored, and which of few bits text gave eight.

    Raises:
        InputError: A size without text, or one that four bits do not fit.
    """
    form, text = variant.form, job.text_for(variant)
    progress, device = job.common.progress, job.common.settings.device
    if form is None:
        return Int8Weights() if variant.int8_rows else Weights(dtype=getattr(torch, variant.dtype)), ()
    if text is None:
        if variant.mixed:
            raise InputError(f"{variant.name} wants text to choose layers by", field="calibration")
        return QuantizedModel(
            quantize_linears(job.model, formats_without_text(form), None, progress=progress)
        ), ()
    if form not in job.quantized:
        with moved(job.model, device):
            job.quantized[form] = quantized_model(job.model, form, text, progress=progress)
    quantized, budget = job.quantized[form], job.budget_bytes(variant)
    if budget is None:
        names = choose_few(job.model, quantized)
    else:
        names = choose_mixture(quantized, _size_bytes(job, variant, quantized), budget)
    mixture = with_eight_bits(job.model, quantized, names)
    with moved(job.model, device):
        return tune(job.model, mixture, text, progress=progress), names


def _size_bytes(job: OnnxJob, variant: Variant, quantized: QuantizedModel) -> int:
    """Of a file with these weights, and the larger graph that has all apart which can be one layer."""
    graph = _graph(job, variant, decoder_of(job.model, replace(quantized, apart=True)))
    with tempfile.TemporaryDirectory(prefix="sizing-", dir=job.common.folder) as scratch:
        path = Path(scratch) / f"{variant.stem}.onnx"
        return WrittenGraphs(path, None, save_graph(graph, path, metadata=_origin(job, variant))).size_bytes


def _graph(
    job: OnnxJob, variant: Variant, decoder: Decoder, stored: Mapping[str, ir.TensorProtocol] | None = None
) -> ir.Model:
    """The graph with all logits; over weights that it has stored, the one with the last position's alone."""
    return build_decoder(
        decoder,
        name=_graph_name(job, variant),
        last_logits=stored is not None,
        stored=stored,
        opset=job.common.settings.opset or OPSET,
    )


def save_graph(graph: ir.Model, path: Path, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a graph, and its weights beside it, whose hash it holds: no protobuf is larger than 2 GiB.

    Args:
        graph: Its weights become references to the file.
        path: The .onnx file.
        metadata: More keys for it.

    Returns:
        The file of the weights.
    """
    data = path.with_name(f"{path.name}_data")
    ir.external_data.unload_from_model(graph, path.parent, data.name, size_threshold_bytes=_EXTERNAL_BYTES)
    graph.metadata_props.update({**(metadata or {}), "phoneready.data_sha256": sha256_file(data)})
    ir.save(graph, path)
    return data


def _graph_name(job: OnnxJob, variant: Variant) -> str:
    return f"{job.common.provenance.name}-{variant.name}"


def _origin(job: OnnxJob, variant: Variant) -> dict[str, str]:
    """What a graph says about where it comes from."""
    origin = job.common.provenance
    more = {
        "phoneready.license": origin.license,
        "phoneready.calibration_sha256": job.text_sha256(variant),
    }
    return origin.metadata() | {key: value for key, value in more.items() if value}
