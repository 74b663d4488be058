"""Export a checkpoint to GGUF: write, quantize, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cfsp.errors import InputError, LimitError
from cfsp.files import atomic_directory
from cfsp.models.gguf_file import read_gguf
from cfsp.models.shape import ModelShape
from cfsp.text.tokens import tokens_sha256
from exporters.checkpoint_reader import open_tensors
from exporters.export_record import BlockProof, ExportRecord
from exporters.family import DEFAULT_OPTIONS, ExportOptions
from exporters.gguf import runtime
from exporters.gguf.architecture import ChosenLayout, add_hyperparameters, read_layout
from exporters.gguf.files import Files, WrittenFile, find_rows
from exporters.gguf.matrix import WHOLE_BLOCKS, StoredMatrix
from exporters.gguf.quants import PARITY_CACHE, QUANT_NAMES, QUANTS, limits_of_bits
from exporters.gguf.runtime import Context, FloatArray
from exporters.gguf.tensors import fallbacks, tensor_specs
from exporters.gguf.writer import (
    PlainTensor,
    check_tokenizer,
    normalizes_to_nfc,
    plain_rope_tensors,
    write_tensors,
)
from exporters.job import UNTRAINED, Job, check_input, settled
from exporters.proof import ReadChats, Slice, check_limits, check_matrix, prove_slices, read_chats

_log = logging.getLogger(__name__)
_BATCH = 128


def export_gguf(
    checkpoint: Path,
    output: Path,
    quants: Sequence[str],
    settings: ExportOptions = DEFAULT_OPTIONS,
) -> tuple[ExportRecord, ...]:
    """Write output/<name>-<quant>.gguf for every quant (names from QUANTS), and output/export.json.

    The float32 file is always written and proven first, as all are quantized from it, and kept if it is asked for.
    Of a model that is read block by block it is one in its own 16 bits, and every block is proven as float32. Returns a
    record a quant. Raises InputError; LimitError: a file is too far from the checkpoint, and nothing is left;
    MissingExtraError: llama-cpp-python is not installed.
    """
    rows = find_rows(checkpoint, quants, settings)
    if not rows:
        raise InputError("no quantization asked for", field="quants", allowed=QUANT_NAMES)
    check_input(checkpoint, output, force=settings.force)
    settings = settled(checkpoint, settings, rows)
    runtime.runtime_version()
    chosen = read_layout(checkpoint)  # what llama.cpp cannot represent is refused before the model is run
    job = Job(checkpoint, output, settings, chosen.config, chosen.context_length)
    files = Files(job, chosen, rows)
    _ = job.reference, job.stops  # unusable text is refused before anything is written
    job.drop_model()
    records, blocks = {}, None
    with atomic_directory(output, force=settings.force) as job.folder:
        first = files.write(files.first)
        strings = check_tokenizer(first.path, job.tokenizer)
        with runtime.open_vocabulary(first.path) as model:
            read = lambda _, text: model.tokenize(text)  # noqa: E731
            chats = read_chats("llama.cpp", job.tokenizer, job.stops, read, model.is_end_of_generation)
        if settings.by_blocks:
            blocks = prove_blocks(job, chosen)
        if first.quant in rows or not settings.by_blocks:
            records[first.quant] = _prove(files, first, strings, chats)
        made = settings.made or {}
        rest = [
            files.take(row, made[row.name]) if row.name in made else files.write(row)
            for row in rows
            if row != files.first
        ]
        job.drop_model()
        for file in rest:
            check_numbers(files.base, file)
            records[file.quant] = found = _prove(files, file, strings, chats)
            if file.quant.name in made:  # what the importance matrix was of is known to who made it
                had = made[file.quant.name].record.imatrix_tensors
                records[file.quant] = replace(found, imatrix_tensors=had)
        if files.first not in rows:
            files.base.unlink()
        return job.write_manifest([replace(records[row], blocks=blocks) for row in rows])


def check_numbers(base: Path, file: WrittenFile) -> None:
    """Hold every tensor of a file against the one that it was quantized from; raises LimitError (`exporters.proof`)."""
    exact = {tensor.name: tensor for tensor in read_gguf(base).tensors}
    stored = {tensor.name: tensor for tensor in read_gguf(file.path).tensors}
    if exact.keys() != stored.keys():
        names = ", ".join(sorted(exact.keys() ^ stored.keys()))
        raise LimitError(f"{file.path.name} has not the tensors of {base.name}: {names}")
    for name, tensor in stored.items():
        kind, from_ = tensor.kind.name, exact[name]
        if kind == from_.kind.name:
            # Training of scales changes norms.
            is_tuned = bool(file.tuned_tensors) and len(tensor.shape) == 1
            if not is_tuned and not np.array_equal(tensor.data, from_.data):
                raise LimitError(f"{name} in {file.path.name} is not that of {base.name}")
            continue
        importance = file.imatrix.get(name)
        if importance is None and kind in WHOLE_BLOCKS:
            importance = np.ones(tensor.shape[-1], np.float32)

        def plain(values: FloatArray, kind: str = kind, importance: Any = importance) -> FloatArray:
            return StoredMatrix.nearest(values, kind, importance).values()

        what, slope = f"{name} in {file.path.name}", file.slopes.get(name)
        check_matrix(what, tensor.shape[0], from_.rows, tensor.rows, plain, slope)
        tensor.let_go()
        from_.let_go()


def _prove(files: Files, file: WrittenFile, strings: int, chats: ReadChats) -> ExportRecord:
    """Reopen a file, compare it with the checkpoint, and describe it; raises LimitError: it is too far from it."""
    job, chosen, path, quant, row = files.job, files.chosen, file.path, file.quant, file.quant
    tensors, mixture = read_gguf(path).tensors, file.mixture
    if quant.base_type == "F32" and chosen.exact_limits is not None:
        row = replace(quant, limits=chosen.exact_limits)
    if mixture is not None:
        matrices = [tensor for tensor in tensors if tensor.name in mixture.types]
        n_weights = sum(math.prod(tensor.shape) for tensor in matrices)
        bits = 8 * sum(int(tensor.data.nbytes) for tensor in matrices) / n_weights
        row = replace(quant, limits=limits_of_bits(bits))
    choice = file.choice
    parity = choice.held_to(job.settings.limits_of(row)) if choice else files.measured(row, path)
    check_limits(parity, path.name)
    own: dict[str, Any] = {}
    if mixture is not None:
        own = {
            "budget_bytes": quant.budget_bytes,
            "chosen_types": mixture.types,
            "predicted_loss": mixture.loss,
        }
    ids = job.settings.calibration
    by_text = file.gptq_tensors or file.tuned_tensors or (mixture and not file.trained_tensors)
    if ids is not None and (by_text or file.imatrix):
        own |= {
            "calibration_sha256": tokens_sha256(ids),
            "calibration_tokens": ids.numel(),
            "gptq_tensors": file.gptq_tensors,
            "tuned_tensors": file.tuned_tensors,
        }
    kinds = fallbacks(tensors, quant) if mixture is None else ()
    warnings = (*_warnings(job, file, chosen), *kinds, *chats.warnings)
    for warning in warnings:
        _log.warning("%s: %s", path.name, warning)
    return job.record(
        path,
        quant,
        file.choice,
        format="gguf",
        parity=parity,
        file_bytes=path.stat().st_size,
        architecture=chosen.layout.architecture,
        n_params=sum(math.prod(tensor.shape) for tensor in tensors),
        tensor_types=dict(Counter(sorted(tensor.kind.name for tensor in tensors)).most_common()),
        imatrix_tensors=len(file.imatrix),
        trained_tensors=file.trained_tensors,
        slopes=dict(file.slopes),
        tokenizer_strings=strings,
        chats=chats.equal,
        warnings=warnings,
        runtime=runtime.runtime_version(),
        **own,
    )


def _warnings(job: Job, file: WrittenFile, chosen: ChosenLayout) -> Iterator[str]:
    config = chosen.config
    if chosen.context_length < config.max_position_embeddings:
        yield (
            "llama.cpp has no sliding window for this model: context_length is cut to the window, "
            f"{chosen.context_length}"
        )
    yield from job.unproven_window()
    if file.untrained:
        yield UNTRAINED
    if file.trained_tensors and job.settings.calibration is not None:
        yield "its numbers are those that training through this rounding has left, whatever the calibration text"
    if normalizes_to_nfc(job.tokenizer):
        yield "the tokenizer composes characters (NFC) and llama.cpp does not: give it composed text"
    if file.mixture and file.quant.budget_bytes and file.mixture.file_bytes > file.quant.budget_bytes:
        yield f"the smallest types take {file.mixture.file_bytes} bytes, not {file.quant.budget_bytes}"
    yield from file.choice.warnings() if file.choice else ()
    if file.quant.uses_imatrix and not file.imatrix:
        yield f"{file.quant.name} is quantized without an importance matrix"


def prove_blocks(job: Job, chosen: ChosenLayout) -> BlockProof:
    """Run every block in torch and in llama.cpp: see `prove_slices`.

    As few at a time as the architecture counts them by, and in each run one that attends, and one with what takes
    attention's place if the architecture has that: llama.cpp makes no context without.
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
    limits = chosen.exact_limits or QUANTS["f32"].limits
    return prove_slices(
        job.model,
        runs,
        job.reference.windows,
        partial(_logits, job, chosen),
        runtime="llama.cpp",
        max_logit_diff=limits.max_logit_diff,
        progress=job.progress,
    )


def _logits(job: Job, chosen: ChosenLayout, part: Slice) -> Iterator[FloatArray]:
    """What llama.cpp makes of a slice, position by position."""
    config, entering = chosen.config, part.entering
    path, count = job.folder / f"blocks-{part.blocks.start}.gguf", len(entering)
    blocks = tuple(replace(config.shape.blocks[block], origin=block) for block in part.blocks)
    its = replace(chosen, config=config.with_shape(ModelShape(count, blocks)))
    factor = config.hidden_size**0.5 if config.spec.scaled_embedding else 1.0

    def plain(name: str, values: FloatArray) -> PlainTensor:
        return PlainTensor(name, values.shape, "F32", lambda: values)

    def add_metadata(writer: Any) -> None:
        add_hyperparameters(writer, its)
        writer.add_tokenizer_model("no_vocab")

    try:
        with open_tensors(job.checkpoint) as opened:
            tensors = [*plain_rope_tensors(its), plain("token_embd.weight", (entering / factor).numpy())]
            for spec in tensor_specs(chosen):
                kind, _, rest = spec.name.partition(".")
                number, _, rest = rest.partition(".")
                if kind == "blk" and int(number) in part.blocks:
                    name = f"blk.{int(number) - part.blocks.start}.{rest}"
                    tensors.append(PlainTensor(name, spec.shape, "F32", partial(spec.build, opened.read)))
            tensors.append(plain(chosen.name(f"model.{config.spec.last_norm}"), part.gain.numpy()))
            if not (factor == 1 and chosen.layout.tied):
                tensors.append(plain("output.weight", entering.numpy()))
            write_tensors(path, chosen.layout.architecture, add_metadata, tensors, "writing a block")
        context = Context(count, _BATCH, _BATCH, PARITY_CACHE)
        with runtime.open_model(path, context, n_threads=job.n_threads) as model:
            yield from model.iter_logits(np.arange(count))
    finally:
        path.unlink(missing_ok=True)
