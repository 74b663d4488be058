"""A variant's graphs on disk: layers as the variant stores them, the graphs over them, the file of their weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir
import torch

from cfsp.devices import moved
from cfsp.errors import InputError
from cfsp.models.architectures import spec_for
from cfsp.models.offload import is_paged
from cfsp.models.rounded_numbers import RoundedNumbers, read_rounded
from exporters.job import load_checkpoint
from exporters.onnx.graph_file import save_graph, size_of, stored_size
from exporters.onnx.int8_rows import Int8Weights
from exporters.onnx.job import OnnxJob
from exporters.onnx.mixed import choose_few, choose_mixture, measured_model, rounded_model, without_numbers
from exporters.onnx.portable import portable_graph
from exporters.onnx.quantize import QuantizedModel, quantize_linears, tune, with_nearest
from exporters.onnx.stored import Sums, slope_sums
from exporters.onnx.through import trained_layers
from exporters.onnx.variants import INT8, BlockFormat, Variant, formats_without_text
from exporters.onnx.weights import Weights, decoder_of
from exporters.parity import Choice


@dataclass(frozen=True)
class WrittenGraphs:
    """A variant's files.

    Attributes:
        every: The graph with the logits of every position.
        last: The one with the last position's alone; None where a variant has none.
        data: The weights of both.
        eight_bits: Layers to which text gave them.
        slopes: By `slope_sums`, of layers whose numbers were chosen for a text.
        choice: Whose numbers it has, if any were chosen for a text.
    """

    every: Path
    last: Path | None
    data: Path
    eight_bits: tuple[str, ...] = ()
    slopes: Mapping[str, Sums] = field(default_factory=dict)
    choice: Choice | None = None

    @property
    def size_bytes(self) -> int:
        """See `stored_size`."""
        return stored_size(self.every, self.data)


def write_graphs(job: OnnxJob, variant: Variant, folder: Path) -> WrittenGraphs:
    """Write folder/<stem>.onnx, <stem>_last.onnx and <stem>.onnx_data.

    If numbers are chosen for a text, the plain quantizer's are written, too; those that lose less stay.

    Raises:
        InputError: A model that the graph cannot compute, or a budget that it does not fit.
    """
    common, labels = job.common, job.labels(variant)
    path = folder / f"{labels.stem}.onnx"
    if variant.portable:
        common.progress(f"writing {variant.name}", 0, 1)
        # A model of its own: optimum's exporter changes the one that it is given.
        model = load_checkpoint(common.checkpoint)
        portable = portable_graph(model, name=labels.name, opset=common.settings.opset)
        # One graph: who takes standard operators alone wants what optimum's users expect.
        return WrittenGraphs(path, None, save_graph(portable, path, metadata=labels.metadata))
    trained = read_rounded(common.checkpoint, variant.name)
    weights, eight_bits = _weights(job, variant, trained)
    written = _save(job, variant, weights, eight_bits, folder)
    if job.text_for(variant) is None or trained is not None:
        return written
    assert isinstance(weights, QuantizedModel)
    nearest, slopes = with_nearest(job.model, weights), slope_sums(job.model, weights.layers)
    del weights
    with tempfile.TemporaryDirectory(dir=folder) as apart:
        plain = _save(job, variant, nearest, eight_bits, Path(apart))
        choice = Choice(job.divergence(variant, plain.every), job.divergence(variant, written.every))
        if choice.is_plain:
            for file in Path(apart).iterdir():
                file.replace(folder / file.name)
    return replace(written, slopes={} if choice.is_plain else slopes, choice=choice)


def _save(
    job: OnnxJob, variant: Variant, weights: Weights, eight_bits: tuple[str, ...], folder: Path
) -> WrittenGraphs:
    """The graphs over weights that are known."""
    common, labels = job.common, job.labels(variant)
    path = folder / f"{labels.stem}.onnx"
    decoder = decoder_of(job.model, weights)
    common.progress(f"writing {variant.name}", 0, 1)
    every = labels.graph(decoder)
    data = save_graph(every, path, metadata=labels.metadata)
    stored = {k: v.const_value for k, v in every.graph.initializers.items() if v.const_value is not None}
    last = labels.graph(decoder, stored)
    last.metadata_props.update(every.metadata_props)
    last_path = folder / f"{variant.stem}_last.onnx"
    ir.save(last, last_path)
    return WrittenGraphs(path, last_path, data, eight_bits)


def _weights(
    job: OnnxJob, variant: Variant, trained: RoundedNumbers | None
) -> tuple[Weights, tuple[str, ...]]:
    """How weights are stored, and which of few bits text gave eight.

    Raises:
        InputError: A size without text, or one that four bits do not fit.
    """
    form, text = variant.form, job.text_for(variant)
    if form is None:
        return weights_without_blocks(variant), ()
    if trained is not None:
        eight_bits = tuple(name for name, bits in trained.format.types.items() if bits == str(INT8.bits))
        return QuantizedModel(trained_layers(job.model, variant, trained)), eight_bits
    if text is not None:
        return _for_text(job, variant, form, text)
    if variant.mixed:
        raise InputError(f"{variant.name} wants text to choose layers by", field="calibration")
    format_of = formats_without_text(form, spec_for(job.model.config).down)
    return QuantizedModel(quantize_linears(job.model, format_of, None, progress=job.common.progress)), ()


def _for_text(
    job: OnnxJob, variant: Variant, form: BlockFormat, text: torch.Tensor
) -> tuple[Weights, tuple[str, ...]]:
    """The same, rounded for a text."""
    progress, device = job.common.progress, job.common.settings.device
    if form not in job.measured:
        found = measured_model(job.model, form, text, device=device, progress=progress)
        job.measured[form] = without_numbers(found)
    measured, budget = job.measured[form], job.budget_bytes(variant)
    if budget is None:
        names = choose_few(job.model, measured)
    else:
        # The larger graph, which has all apart that can be one layer.
        apart = decoder_of(job.model, replace(measured, apart=True))
        names = choose_mixture(measured, size_of(apart, job.labels(variant)), budget)
    mixture = rounded_model(job.model, form, names, text, device=device, progress=progress)
    if is_paged(job.model):
        return mixture, names
    with moved(job.model, device):
        return tune(job.model, mixture, text, progress=progress), names


def weights_without_blocks(variant: Variant) -> Weights:
    """How a variant without blocks of few bits stores weights."""
    return Int8Weights() if variant.int8_rows else Weights(dtype=getattr(torch, variant.dtype))
