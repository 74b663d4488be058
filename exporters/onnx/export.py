"""Export a checkpoint to ONNX folders: build, save, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from cfsp.devices import moved
from cfsp.errors import InputError, LimitError
from cfsp.files import atomic_directory, sha256_file
from cfsp.memory import require_memory
from cfsp.models.architectures import block_linears, decoder_layers, spec_for
from cfsp.models.checkpoint import load_pruned, read_rounded
from cfsp.text.tokens import tokens_sha256
from exporters.checkpoint_reader import read_config
from exporters.export_record import BlockProof, ExportRecord, ParityReport
from exporters.family import DEFAULT_OPTIONS, ExportOptions
from exporters.job import SOME_HASH, UNTRAINED, Job, check_input, settled
from exporters.onnx.companions import write_companions
from exporters.onnx.decoder_graph import (
    OPSET,
    OPSETS,
    block_graph,
    decoder_graph,
    keep_last_logits,
)
from exporters.onnx.folder import GRAPHS
from exporters.onnx.layers import (
    HEAD_PARTS,
    TABLE,
    Int8Weights,
    Weights,
    check_blocks,
    is_tied,
    packed_names,
    read_weight,
    unwritten,
)
from exporters.onnx.matrix import Int8Rows, Rounded, round_rows, round_to_nearest
from exporters.onnx.portable import check_portable, portable_graph
from exporters.onnx.quantize import (
    Losses,
    QuantizedModel,
    choose_eight_bits,
    default_budget,
    formats_without_text,
    measure,
    outline_in,
    quantize_linears,
    rounded,
    rounded_model,
    trained_layers,
    tune,
)
from exporters.onnx.runtime import PREFILL_TOKENS, FloatArray, OnnxModel, open_model, runtime_version
from exporters.onnx.variants import HEAD, INT8, VARIANTS, BlockFormat, Variant, find_variant
from exporters.proof import Choice, ReadChats, Slice, check_limits, check_matrix, prove_slices

_BYTES_OF_A_WEIGHT = 1.5
"""That are in memory for all layers at once, where few bits are written: one each, and how it is stored."""
_EXTERNAL_BYTES = 1024  # smaller weights stay inside the graph
_SAME_LOGITS = 1e-2
"""Most that the two graphs of a variant may differ; their output matrix multiplies batches of other sizes."""


def export_onnx(
    checkpoint: Path,
    output: Path,
    variants: Sequence[str],
    settings: ExportOptions = DEFAULT_OPTIONS,
) -> tuple[ExportRecord, ...]:
    """Write output/<variant>/ for every variant, and output/export.json (an ExportManifest).

    The float32 variant is written and proven before all that are built like it, and kept if it is asked for. If all are
    of few bits, a model that would take much of the memory is read, and proven as float32, block by block. Returns a
    record a variant. Raises InputError; LimitError: a variant is too far from the checkpoint, and nothing is left;
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
    settings = settled(checkpoint, settings, rows)
    by_blocks = all(row.form for row in rows) and settings.by_blocks
    # Graphs are written from weights of float32, whatever they are kept in.
    settings = replace(settings, dtype="float32", by_blocks=by_blocks)
    job = Job(checkpoint, output, settings, config, config.steady_context)
    if by_blocks:
        n_bytes = int(_BYTES_OF_A_WEIGHT * job.n_params)
        require_memory(n_bytes, "the numbers of all layers", "a GGUF file, or a machine with more memory")
    _ = job.reference, job.n_params, job.model_config  # unusable text is refused before anything is written
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
            made = _Made(job, row)
            made.write(measured)
            folder = job.folder / row.name
            chats = write_companions(job, row, folder)
            job.progress(f"writing {row.name}", 1, 1)
            records[row] = made.proven(chats, blocks)
            if row not in rows:
                shutil.rmtree(folder)
        return job.write_manifest([records[row] for row in rows])


def save_graph(graph: ir.Model, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a graph, and its weights beside it, whose hash it holds: no protobuf is larger than 2 GiB."""
    data = path.with_name(f"{path.name}_data")
    ir.external_data.unload_from_model(graph, path.parent, data.name, size_threshold_bytes=_EXTERNAL_BYTES)
    graph.metadata_props.update({**(metadata or {}), "phoneready.data_sha256": sha256_file(data)})
    ir.save(graph, path)


class _Made:
    """A variant of a job, as it is made: `every` has the logits of every position, `last` only the last one's."""

    def __init__(self, job: Job, variant: Variant) -> None:
        self.job, self.variant, self.name = job, variant, f"{job.provenance.name}-{variant.name}"
        self.folder = job.folder / variant.name / GRAPHS
        self.folder.mkdir(parents=True)
        self.every, self.last = (
            self.folder / f"{variant.stem}.onnx",
            self.folder / f"{variant.stem}_last.onnx",
        )
        self.text = job.settings.calibration if variant.needs_text else None
        self.text_sha256 = None if self.text is None else tokens_sha256(self.text)
        self.budget = (job.settings.mixed_bytes or default_budget(job.model)) if variant.mixed else None
        more = {
            "phoneready.license": job.provenance.license,
            "phoneready.calibration_sha256": self.text_sha256,
        }
        stated = {key: value for key, value in more.items() if value}
        self.metadata = job.provenance.metadata() | stated | job.recipe(variant).metadata()
        self.eight_bits: tuple[str, ...] = ()
        self.slopes: Mapping[str, Sums] = {}
        self.choice: Choice | None = None
        self.is_trained = False

    def write(self, measured: dict[BlockFormat, Losses]) -> None:
        """Write both graphs, with what loses less of chosen and plain numbers; `measured`: what formats cost layers."""
        job, variant, form, text = self.job, self.variant, self.variant.form, self.text
        device, progress = job.settings.device, job.progress
        if variant.portable:
            progress(f"writing {variant.name}", 0, 1)
            # A model of its own: optimum's exporter changes the one that it is given.
            model = load_pruned(job.checkpoint, torch.float32)
            save_graph(portable_graph(model, self.name, job.settings.opset), self.every, self.metadata)
            return
        if form is None:
            plain = Int8Weights() if variant.int8_rows else Weights(dtype=getattr(torch, variant.dtype))
            self._save(plain, self.folder)
            return
        if (trained := read_rounded(job.checkpoint, variant.name)) is not None:
            types, self.is_trained = trained.format.types, True
            self.eight_bits = tuple(n for n, bits in types.items() if bits == str(INT8.bits) and n != TABLE)
            self._save(QuantizedModel(trained_layers(job.model, variant, trained)), self.folder)
            return
        if text is None:
            if variant.mixed:
                raise InputError(f"{variant.name} wants text to choose layers by", field="calibration")
            format_of = formats_without_text(form, spec_for(job.model.config).down)
            layers = quantize_linears(job.model, format_of, None, progress=progress)
            self._save(QuantizedModel(layers), self.folder)
            return
        if form not in measured:
            measured[form] = measure(job.model, form, text, device=device, progress=progress)
        left = None if self.budget is None else self.budget - self._least_bytes(form)
        if left is not None and left < 0:
            raise InputError(
                "four bits for every layer take more",
                field="mixed_bytes",
                value=self.budget,
                allowed=f"{(self.budget or 0) - left} or more",
            )
        self.eight_bits = choose_eight_bits(job.model, form, measured[form], left)
        chosen = rounded_model(job.model, form, self.eight_bits, text, device=device, progress=progress)
        if not job.settings.by_blocks:
            with moved(job.model, device):
                chosen = tune(job.model, chosen, text, progress=progress)
        self._save(chosen, self.folder)
        slopes, layers = dict[str, Sums](), {}
        for name, layer in chosen.layers.items():
            exact = read_weight(job.model, name)
            slopes[name] = float((layer.dequantize() * exact).sum()), float(exact.square().sum())
            layers[name] = rounded(exact, layer.form)
        self.slopes = slopes
        del chosen, layer
        with tempfile.TemporaryDirectory(dir=self.folder) as beside:
            self._save(QuantizedModel(layers), Path(beside))
            self.choice = Choice(self._compared(Path(beside) / self.every.name), self._compared(self.every))
            if self.choice.is_plain:
                self.slopes = {}
                for file in Path(beside).iterdir():
                    file.replace(self.folder / file.name)

    def _graph(self, weights: Weights) -> ir.Model:
        return decoder_graph(self.job.model, weights, name=self.name, opset=self.job.settings.opset or OPSET)

    def _save(self, weights: Weights, folder: Path) -> None:
        """Both graphs over weights that are known."""
        self.job.progress(f"writing {self.variant.name}", 0, 1)
        graph = self._graph(weights)
        save_graph(graph, folder / self.every.name, self.metadata)
        keep_last_logits(graph.graph)
        ir.save(graph, folder / self.last.name)

    def _least_bytes(self, form: BlockFormat) -> int:
        """Most that the larger graph and its weights take in few bits, with all apart that can be one layer."""
        graph = self._graph(outline_in(self.job.model, form))
        n_bytes = 0
        for value in graph.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and (
                tensor.nbytes > _EXTERNAL_BYTES or isinstance(tensor, ir.ExternalTensor)
            ):
                n_bytes += tensor.nbytes
                value.const_value = unwritten(str(value.name), tensor.dtype, tensor.shape.numpy())
        graph.metadata_props.update({**self.metadata, "phoneready.data_sha256": SOME_HASH})
        return n_bytes + len(ir.to_proto(graph).SerializeToString())

    def _opened(self, path: Path) -> closing[OnnxModel]:
        """A graph in its runtime, for windows of the proof's text; it has the weights once more."""
        self.job.drop_model()
        n_ctx = self.job.reference.windows.ids.shape[1]
        return closing(open_model(path, n_ctx=n_ctx, n_threads=self.job.n_threads, n_batch=PREFILL_TOKENS))

    def _compared(self, path: Path) -> ParityReport:
        """Hold a graph against the checkpoint; its limits are stored, not checked."""
        with self._opened(path) as model:
            return self.job.compare(self.variant, model.iter_logits)

    def proven(self, chats: ReadChats, blocks: BlockProof | None) -> ExportRecord:
        """Compare the graph with the checkpoint, the other one of its weights with it, and describe it."""
        job, variant, path, choice = self.job, self.variant, self.every, self.choice
        if not variant.portable:  # optimum's own names; the graph is proven in its logits, as float32 is
            check_numbers(path, job.model, self.slopes)
        limits = job.settings.limits_of(variant)
        parity = self._compared(path) if choice is None else choice.held_to(limits)
        # One portable graph: who takes only standard operators wants what optimum's users expect.
        if not variant.portable:
            window = job.reference.windows.ids[0, :PREFILL_TOKENS].numpy()
            with self._opened(path) as model:
                every = next(iter(model.iter_logits(window)))[-1].copy()
            with self._opened(self.last) as model:
                difference = float(np.abs(model.decode(window)[-1] - every).max())
            if not difference <= _SAME_LOGITS:
                raise LimitError(f"{self.last.name} differs from {path.name} by {difference:.4g} in a logit")
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
            file_bytes=path.stat().st_size + path.with_name(f"{path.name}_data").stat().st_size,
            n_params=job.n_params,
            tensor_types=dict(counts),
            warnings=(*self._warnings(), *(choice.warnings() if choice else ()), *chats.warnings),
            chats=chats.equal,
            runtime=runtime_version(),
            calibration_sha256=self.text_sha256,
            calibration_tokens=0 if self.text is None else self.text.numel(),
            budget_bytes=self.budget,
            eight_bit_layers=self.eight_bits,
            blocks=blocks,
        )

    def _warnings(self) -> Iterator[str]:
        job, config = self.job, self.job.config
        if self.variant.needs_text and self.text is None and not self.is_trained:
            yield f"{self.variant.name} is rounded to the nearest numbers, without text"
        if self.text is not None and job.settings.by_blocks:
            yield UNTRAINED
        if job.context_length < config.max_position_embeddings:
            yield (
                "the rope has other frequencies in longer texts, which no graph has: context_length is cut to "
                f"{job.context_length}"
            )
        yield from job.unproven_window()
        unknown = []
        if not config.shape.has_equal_heads:
            unknown.append("differ in key-value heads")
        if config.kept_of_texts:
            unknown.append("have something else in the place of attention")
        for what in unknown:
            yield (
                f"blocks {what}: optimum's ORTModelForCausalLM cannot run this graph; "
                "ONNX Runtime, GenAI and transformers.js can"
            )


def _slice_logits(job: Job, part: Slice) -> Iterator[FloatArray]:
    """What ONNX Runtime makes of a block as a graph of its own, position by position."""
    count = len(part.entering)
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        path = Path(folder) / f"block-{part.blocks.start}.onnx"
        save_graph(block_graph(job.model, part.blocks.start, part.entering, part.gain, name=path.stem), path)
        with closing(open_model(path, n_ctx=count, n_threads=job.n_threads)) as opened:
            yield from opened.iter_logits(np.arange(count))


_STORED = re.compile(r"(.+?)(?:\.(\d))?\.weight(\.q[48])?")
"""(module, which part of it if its rows are of unlike formats, bits)."""
Sums = tuple[float, float]
"""Of a matrix q w and w w, whose quotient is its slope (`exporters.proof`)."""


def check_numbers(path: Path, model: Any, chosen: Mapping[str, Sums] = MappingProxyType({})) -> None:
    """Hold every matrix of one of the product's own graphs against the model's, float32.

    `chosen`: the sums of slopes of layers whose numbers were chosen for a text. Raises LimitError: a matrix is not the
    model's (`exporters.proof`), is missing, or is stored twice.
    """
    values = ir.load(path).graph.initializers
    tensors = {name: value.const_value for name, value in values.items() if value.const_value is not None}
    found = Counter[str]()
    tied = is_tied(model)
    for name, tensor in tensors.items():
        match = _STORED.fullmatch(name)
        if match is None or len(tensor.shape) < 2:
            continue
        module, part, bits = match.groups()
        is_table = f"{module}.weight" == TABLE
        names: tuple[str, ...] = HEAD_PARTS if tied else (TABLE,)
        if not is_table:
            names = packed_names(_in_model(model, module))
        names = names if part is None else names[int(part) : int(part) + 1]
        found.update(names)
        exact = torch.cat([read_weight(model, one) for one in names])
        stored = torch.from_numpy(np.array(tensor.numpy()))
        if stored.ndim == 2 and not is_table:
            stored = stored.T
        form: BlockFormat | None = None
        if bits:
            scales = torch.from_numpy(np.array(tensors[f"{name.removesuffix(bits)}.scale"].numpy()))
            if stored.ndim == 2:
                stored = Int8Rows(stored, scales).dequantize()
            else:
                packed = Rounded.from_packed(stored, scales, exact.shape[1], int(bits[-1]))
                stored, form = packed.dequantize(), packed.form
        if stored.shape != exact.shape:
            raise LimitError(f"{name} in {path.name} is {tuple(stored.shape)}, not {tuple(exact.shape)}")
        sums = [chosen[one] for one in names if one in chosen]
        inner, squares = (sum(each) for each in zip(*sums, strict=True)) if sums else (0.0, 0.0)

        def nearest(rows: FloatArray, form: BlockFormat | None = form, plain: bool = not bits) -> FloatArray:
            if plain:
                return rows
            weight = torch.from_numpy(rows)
            rounded = round_rows(weight) if form is None else round_to_nearest(weight, form)
            return np.asarray(rounded.dequantize().numpy())

        check_matrix(
            f"{name} in {path.name}",
            len(exact),
            _rows_of(exact),
            _rows_of(stored),
            nearest,
            inner / squares if squares else None,
        )
    linears = (name for block in block_linears(model) for name in block)
    for name in (*linears, *HEAD_PARTS, *(() if tied else (TABLE,))):
        if found[name] != 1:
            raise LimitError(f"{path.name} has {found[name]} matrices for {name}, not 1")


def _in_model(model: Any, module: str) -> str:
    """The model's own name of a module of the graph, in which all architectures have the same."""
    spec = spec_for(model.config)
    if module in ("logits", HEAD):  # it may be named as what it gives
        return HEAD
    names = {f"mlp.{part}_proj": f"{spec.mlp}.{getattr(spec, part)}" for part in ("gate", "up", "down")}
    names["self_attn.o_proj"] = f"{spec.attention}.{spec.output}"
    *_, block, part = module.split(".", 3)
    part = names.get(part, part.replace("self_attn.", f"{spec.attention}."))
    return f"{spec.layers}.{block}.{part}"


def _rows_of(matrix: torch.Tensor) -> Callable[[int, int], FloatArray]:
    return lambda start, stop: matrix[start:stop].float().numpy()
