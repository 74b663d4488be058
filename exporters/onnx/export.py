"""Export a checkpoint to ONNX folders: build, save, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from cfsp.devices import moved
from cfsp.errors import InputError, LimitError
from cfsp.files import atomic_directory, sha256_file
from cfsp.memory import give_back_memory, require_memory
from cfsp.models.architectures import decoder_layers, spec_for
from cfsp.models.checkpoint import load_pruned
from cfsp.models.offload import is_paged
from cfsp.models.rounded_numbers import read_rounded
from cfsp.text.tokens import tokens_sha256
from exporters.chats import ReadChats
from exporters.checkpoint_reader import read_config
from exporters.export_record import ExportRecord, ParityReport
from exporters.family import DEFAULT_OPTIONS, ExportOptions
from exporters.job import UNTRAINED, Job, check_input, settled
from exporters.onnx.checks import Sums, check_graph, check_numbers, slope_sums
from exporters.onnx.companions import write_companions
from exporters.onnx.decoder_graph import OPSET, OPSETS, Decoder, build_decoder
from exporters.onnx.folder import GRAPHS
from exporters.onnx.int8_rows import Int8Weights
from exporters.onnx.portable import check_portable, portable_graph
from exporters.onnx.quantize import (
    Losses,
    QuantizedModel,
    choose_few,
    choose_mixture,
    default_budget,
    measure,
    outline_in,
    quantize_linears,
    rounded_model,
    trained_layers,
    tune,
    with_nearest,
)
from exporters.onnx.runtime import PREFILL_TOKENS, FloatArray, OnnxModel, open_model, runtime_version
from exporters.onnx.variants import INT8, VARIANTS, BlockFormat, Variant, find_variant, formats_without_text
from exporters.onnx.weights import Weights, check_blocks, decoder_of, slice_of
from exporters.proof import Choice, Slice, check_limits, prove_slices
from exporters.provenance import SOME_HASH

_BYTES_OF_A_WEIGHT = 1.5
"""That are in memory for all layers at once, where few bits are written: one each, and how it is stored."""
_EXTERNAL_BYTES = 1024
"""Smaller weights stay inside the graph."""
_SAME_LOGITS = 1e-2
"""Most that the two graphs of a variant may differ; their output matrix multiplies batches of other sizes."""


def export_onnx(
    checkpoint: Path,
    output: Path,
    variants: Sequence[str],
    settings: ExportOptions = DEFAULT_OPTIONS,
) -> tuple[ExportRecord, ...]:
    """Write output/<variant>/ for every variant, and output/export.json (an ExportManifest).

    The float32 variant is written and proven before all that are built like it, and kept only if it is asked for. If
    all are of few bits, a model that would take much of the memory is read block by block, and the proof is one of
    every block as float32.

    Args:
        checkpoint: Hugging Face folder, pruned or dense.
        output: Folder to create.
        variants: Names from VARIANTS, in any case.
        settings: How.

    Returns:
        One record a variant, in the order asked.

    Raises:
        InputError: Unknown variant, unusable checkpoint, a model that the graph cannot compute, existing output,
            a mixture without text or with too few bytes, an operator that the opset lacks.
        LimitError: A variant is too far from the checkpoint; the message has metric, value and limit. Nothing is left.
        MissingExtraError: ONNX Runtime is not installed, or optimum's exporter for a portable variant.
    """
    rows = list(dict.fromkeys(find_variant(variant) for variant in variants))
    if not rows:
        raise InputError("no variant asked for", field="onnx", allowed=", ".join(VARIANTS))
    check_input(checkpoint, output, force=settings.force)
    config = read_config(checkpoint)
    check_blocks(config.spec)
    runtime_version()
    if settings.opset is not None and settings.opset not in OPSETS:
        known = f"{OPSETS.start} to {OPSETS.stop - 1}"
        raise InputError("out of range", field="opset", value=settings.opset, allowed=known)
    if any(row.portable for row in rows):
        check_portable(config.shape)
    by_blocks = all(row.form for row in rows) and settled(checkpoint, settings).by_blocks
    # Graphs are written from weights of float32, whatever they are kept in.
    settings = replace(settings, dtype="float32", by_blocks=by_blocks)
    job = Job(checkpoint, output, settings, config, config.steady_context)
    if by_blocks:
        n_bytes = int(_BYTES_OF_A_WEIGHT * sum(parameter.numel() for parameter in job.model.parameters()))
        require_memory(n_bytes, "the numbers of all layers", "a GGUF file, or a machine with more memory")
    _ = job.reference  # unusable text is refused before anything is written
    with atomic_directory(output, force=settings.force) as job.folder:
        # That the graph computes the checkpoint only shows on the float32 one, or on its blocks.
        blocks = None
        if by_blocks:
            blocks = prove_slices(
                job.model,
                [range(block, block + 1) for block in range(len(decoder_layers(job.model)))],
                job.reference.windows,
                partial(_slice_logits, job),
                runtime="ONNX Runtime",
                max_logit_diff=VARIANTS["fp32"].limits.max_logit_diff,
                progress=job.progress,
            )
        first = () if blocks or all(row.portable for row in rows) else (VARIANTS["fp32"],)
        records, measured = {}, dict[BlockFormat, Losses]()
        for row in dict.fromkeys((*first, *rows)):
            folder = job.folder / row.name
            (folder / GRAPHS).mkdir(parents=True)
            asked = _Asked(job, row)
            written = _write(asked, folder / GRAPHS, measured)
            chats = write_companions(job, row, folder)
            job.progress(f"writing {row.name}", 1, 1)
            records[row] = replace(_prove(asked, written, chats), blocks=blocks)
            if row not in rows:
                shutil.rmtree(folder)
        return job.write_manifest([records[row] for row in rows])


@dataclass(frozen=True)
class WrittenGraphs:
    """A variant's files.

    Attributes:
        every: The graph with the logits of every position.
        last: The one with only the last position's; None if a variant has none.
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


@dataclass(frozen=True)
class _Asked:
    """A variant of a job."""

    job: Job
    variant: Variant

    @property
    def text(self) -> torch.Tensor | None:
        """What it is rounded for."""
        return self.job.settings.calibration if self.variant.calibrated else None

    @property
    def text_sha256(self) -> str | None:
        """Hash of that."""
        return None if self.text is None else tokens_sha256(self.text)

    @property
    def budget(self) -> int | None:
        """Most bytes of a mixture; None if it is not chosen for a size."""
        return (
            (self.job.settings.mixed_bytes or default_budget(self.job.model)) if self.variant.mixed else None
        )

    @property
    def metadata(self) -> dict[str, str]:
        """Where it comes from."""
        text, license_ = self.text_sha256, self.job.provenance.license
        more = {"phoneready.license": license_, "phoneready.calibration_sha256": text}
        return self.job.provenance.metadata() | {key: value for key, value in more.items() if value}

    def graph(self, decoder: Decoder, stored: Mapping[str, ir.TensorProtocol] | None = None) -> ir.Model:
        """The graph with all logits; over weights that it has stored, the one with only the last position's."""
        return build_decoder(
            decoder,
            name=f"{self.job.provenance.name}-{self.variant.name}",
            last_logits=stored is not None,
            stored=stored,
            opset=self.job.settings.opset or OPSET,
        )

    def save(self, weights: Weights, folder: Path) -> WrittenGraphs:
        """The graphs over weights that are known."""
        stem, decoder = self.variant.stem, decoder_of(self.job.model, weights)
        self.job.progress(f"writing {self.variant.name}", 0, 1)
        every = self.graph(decoder)
        path, last_path = folder / f"{stem}.onnx", folder / f"{stem}_last.onnx"
        data = save_graph(every, path, metadata=self.metadata)
        stored = {k: v.const_value for k, v in every.graph.initializers.items() if v.const_value is not None}
        last = self.graph(decoder, stored)
        last.metadata_props.update(every.metadata_props)
        ir.save(last, last_path)
        return WrittenGraphs(path, last_path, data)


def save_graph(
    graph: ir.Model,
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    sha256: Callable[[Path], str] = sha256_file,
) -> Path:
    """Write a graph, and its weights beside it, whose hash it holds: no protobuf is larger than 2 GiB.

    Args:
        graph: Its weights become references to the file.
        path: The .onnx file.
        metadata: More keys for it.
        sha256: Hash of that file.

    Returns:
        The file of the weights.
    """
    data = path.with_name(f"{path.name}_data")
    ir.external_data.unload_from_model(graph, path.parent, data.name, size_threshold_bytes=_EXTERNAL_BYTES)
    graph.metadata_props.update({**(metadata or {}), "phoneready.data_sha256": sha256(data)})
    ir.save(graph, path)
    return data


def _write(asked: _Asked, folder: Path, measured: dict[BlockFormat, Losses]) -> WrittenGraphs:
    """Write folder/<stem>.onnx, <stem>_last.onnx and <stem>.onnx_data.

    If numbers are chosen for a text, the plain quantizer's are written, too; those that lose less stay.

    Raises:
        InputError: A model that the graph cannot compute, or a budget that it does not fit.
    """
    job, variant, form, text = asked.job, asked.variant, asked.variant.form, asked.text
    device, progress = job.settings.device, job.progress
    if variant.portable:
        progress(f"writing {variant.name}", 0, 1)
        # A model of its own: optimum's exporter changes the one that it is given.
        model = load_pruned(job.checkpoint, torch.float32)
        portable = portable_graph(
            model, name=f"{job.provenance.name}-{variant.name}", opset=job.settings.opset
        )
        path = folder / f"{variant.stem}.onnx"
        # One graph: who takes only standard operators wants what optimum's users expect.
        return WrittenGraphs(path, None, save_graph(portable, path, metadata=asked.metadata))
    if form is None:
        plain = Int8Weights() if variant.int8_rows else Weights(dtype=getattr(torch, variant.dtype))
        return asked.save(plain, folder)
    if (trained := read_rounded(job.checkpoint, variant.name)) is not None:
        named = trained.format.types.items()
        written = asked.save(QuantizedModel(trained_layers(job.model, variant, trained)), folder)
        return replace(written, eight_bits=tuple(name for name, bits in named if bits == str(INT8.bits)))
    if text is None:
        if variant.mixed:
            raise InputError(f"{variant.name} wants text to choose layers by", field="calibration")
        format_of = formats_without_text(form, spec_for(job.model.config).down)
        return asked.save(
            QuantizedModel(quantize_linears(job.model, format_of, None, progress=progress)), folder
        )
    if form not in measured:
        measured[form] = measure(job.model, form, text, device=device, progress=progress)
    if asked.budget is None:
        eight_bits = choose_few(job.model, form, measured[form])
    else:
        # The larger graph, which has all apart that can be one layer; its weights are nowhere.
        apart = decoder_of(job.model, outline_in(job.model, form))
        with tempfile.TemporaryDirectory(prefix="sizing-") as scratch:
            path = Path(scratch) / f"{variant.stem}.onnx"
            data = save_graph(asked.graph(apart), path, metadata=asked.metadata, sha256=lambda _: SOME_HASH)
            n_bytes = path.stat().st_size + data.stat().st_size
        eight_bits = choose_mixture(job.model, form, measured[form], n_bytes, asked.budget)
    chosen = rounded_model(job.model, form, eight_bits, text, device=device, progress=progress)
    if not is_paged(job.model):
        with moved(job.model, device):
            chosen = tune(job.model, chosen, text, progress=progress)
    written = replace(asked.save(chosen, folder), eight_bits=eight_bits)
    nearest, slopes = with_nearest(job.model, chosen), slope_sums(job.model, chosen.layers)
    del chosen
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        plain_file = asked.save(nearest, Path(beside)).every
        choice = Choice(_divergence(job, variant, plain_file), _divergence(job, variant, written.every))
        if choice.is_plain:
            for file in Path(beside).iterdir():
                file.replace(folder / file.name)
    return replace(written, slopes={} if choice.is_plain else slopes, choice=choice)


def _opened(job: Job, path: Path) -> closing[OnnxModel]:
    """A graph in its runtime, for windows of the proof's text."""
    give_back_memory()  # of the layers that were written, or the graph before: a runtime has its weights once more
    n_ctx = job.reference.windows.ids.shape[1]
    return closing(open_model(path, n_ctx=n_ctx, n_threads=job.n_threads, n_batch=PREFILL_TOKENS))


def _divergence(job: Job, variant: Variant, path: Path) -> ParityReport:
    """Hold a graph against the checkpoint; its limits are stored, not checked."""
    with _opened(job, path) as model:
        return job.compare(variant, model.iter_logits)


def _slice_logits(job: Job, part: Slice) -> Iterator[FloatArray]:
    """What ONNX Runtime makes of a block as a graph of its own, position by position."""
    path, count = job.folder / f"block-{part.blocks.start}.onnx", len(part.entering)
    data: Path | None = None
    try:
        decoder = slice_of(job.model, part.blocks.start, part.entering, part.gain)
        data = save_graph(build_decoder(decoder, name=path.stem), path)
        del decoder
        with closing(open_model(path, n_ctx=count, n_threads=job.n_threads)) as opened:
            yield from opened.iter_logits(np.arange(count))
    finally:
        for file in filter(None, (path, data)):
            file.unlink(missing_ok=True)


def _prove(asked: _Asked, written: WrittenGraphs, chats: ReadChats) -> ExportRecord:
    """Compare the graph with the checkpoint, the other one of its weights with it, and describe it.

    Raises:
        LimitError: They are too far from the checkpoint, or not shaped as its plan says.
    """
    job, variant, text = asked.job, asked.variant, asked.text
    path, choice, limits = written.every, written.choice, job.settings.limits_of(variant)
    for graph in filter(None, (path, written.last)):
        check_graph(graph, job.config)
    if not variant.portable:  # optimum's own names; the graph is proven in its logits, as float32 is
        check_numbers(path, job.model, written.slopes)
    parity = _divergence(job, variant, path) if choice is None else choice.held_to(limits)
    if written.last:
        window = job.reference.windows.ids[0, :PREFILL_TOKENS].numpy()
        with _opened(job, path) as model:
            every = next(iter(model.iter_logits(window)))[-1].copy()
        with _opened(job, written.last) as model:
            difference = float(np.abs(model.decode(window)[-1] - every).max())
        if not difference <= _SAME_LOGITS:
            raise LimitError(f"{written.last.name} differs from {path.name} by {difference:.4g} in a logit")
    check_limits(parity, f"{variant.name} ({path.name})")
    counts: Counter[str] = Counter()
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.dtype == ir.DataType.INT64 or tensor.size == 1:
            continue
        if not name.endswith((".scale", ".frequencies")):
            packed = tensor.dtype == ir.DataType.UINT8
            counts[f"int{name.rpartition('.q')[2]}" if packed else tensor.dtype.name.lower()] += 1
    return job.record(
        path,
        variant,
        choice,
        format="onnx",
        parity=parity,
        architecture=job.config.model_type,
        file_bytes=path.stat().st_size + written.data.stat().st_size,
        n_params=sum(parameter.numel() for parameter in job.model.parameters()),
        tensor_types=dict(counts),
        warnings=(*_warnings(asked), *(choice.warnings() if choice else ()), *chats.warnings),
        chats=chats.equal,
        runtime=runtime_version(),
        calibration_sha256=asked.text_sha256,
        calibration_tokens=0 if text is None else text.numel(),
        budget_bytes=asked.budget,
        eight_bit_layers=written.eight_bits,
    )


def _warnings(asked: _Asked) -> Iterator[str]:
    job, variant, text = asked.job, asked.variant, asked.text
    if variant.calibrated and text is None:
        yield f"{variant.name} is rounded to the nearest numbers, without text"
    if text is not None and is_paged(job.model):
        yield UNTRAINED
    if job.context_length < job.config.max_position_embeddings:
        yield (
            "the rope has other frequencies in longer texts, which no graph has: context_length is cut to "
            f"{job.context_length}"
        )
    yield from job.unproven_window()
    unknown_to_optimum = (
        (
            not job.config.shape.has_equal_heads,
            "differ in key-value heads, and optimum's ORTModelForCausalLM takes one number for all",
        ),
        (
            job.config.kept_of_texts,
            "have something else in the place of attention, and optimum's ORTModelForCausalLM knows no cache of it",
        ),
    )
    for is_there, what in unknown_to_optimum:
        if is_there:
            yield f"blocks {what}: it cannot run this graph; ONNX Runtime, GenAI and transformers.js can"
