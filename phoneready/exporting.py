"""A model in all the formats that are asked for, in one folder that appears when all of them are proven."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cfsp.devices import CPU
from cfsp.errors import InputError
from cfsp.files import atomic_directory, no_space_as_input_error, refuse_existing, scratch_directory
from cfsp.models.checkpoint import PLAN_FILE, save_checkpoint
from cfsp.models.folds import is_folded
from cfsp.models.offload import NARROW
from cfsp.models.reference import load_model, load_tokenizer
from cfsp.models.rounded_numbers import RoundedFormat, read_rounded_format
from cfsp.models.source import LoadedModel
from cfsp.models.token_trees import trimmed_tokenizer
from cfsp.progress import Progress, no_progress
from cfsp.pruning.moments import spread_windows
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from cfsp.settings import Reads
from cfsp.text.respelling import respelling
from cfsp.text.settings import SELF
from exporters.export_record import ExportFormat, ExportRecord
from exporters.families import FAMILIES, find_format
from exporters.job import has_dtype
from exporters.provenance import file_stem
from exporters.settings import READS, ExportSettings, read_by_formats
from phoneready.text import load_calibration

NO_TEXT = "none"
_Load = Callable[[str | Path], LoadedModel]
_OF_TEXT = (
    lambda asked: NO_TEXT not in asked.calibration and (bool(asked.calibration) or reads_text(asked)),
    "without --calibration REF, or what needs text",
)
EXPORT_READS: Reads = {
    **read_by_formats({"calibration": "without files of few bits", "opset": "without --onnx VARIANT,..."}),
    **READS,
    **dict.fromkeys(("nsamples", "seqlen", "rounding_windows", "dense"), _OF_TEXT),
}


def export_model(
    reference: str,
    output: Path,
    request: ExportSettings,
    *,
    trust_remote_code: bool = False,
    device: torch.device = CPU,
    dtype: str = "auto",
    n_threads: int | None = None,
    force: bool = False,
    warnings: tuple[str, ...] = (),
    before: Callable[[ExportSettings], None] = lambda request: None,
    progress: Progress = no_progress,
) -> tuple[ExportRecord, ...]:
    """Export; of several families each has a folder of its own in `output`, and one alone is `output` itself.

    Raises:
        InputError: As the families' exports, or a model or calibration text that cannot be read.
        LimitError: Something is too far from the checkpoint. Nothing is left.
    """
    refuse_existing(output, force=force, inputs=[Path(reference), *map(Path, request.calibration)])
    formats = request.formats
    if not formats:
        raise InputError("no format asked for", field="formats", allowed=", ".join(FAMILIES))
    rows = [find_format(name) for name in request.names]
    if request.name:
        file_stem(request.name)
    for family in formats:
        FAMILIES[family].require()
    _check(rows, request)
    if is_checkpoint(reference):
        _check_dtype(Path(reference), dtype)
    else:
        request = replace(request, dense=request.dense or reference)
    before(request)
    load = partial(
        load_model,
        trust_remote_code=trust_remote_code,
        device=device,
        dtype=dtype,
        may_stream=True,
        progress=progress,
    )
    with _checkpoint(reference, output, request.seed, load) as checkpoint:
        return _export(
            checkpoint,
            output,
            request,
            load,
            device=str(device),
            dtype=dtype,
            n_threads=n_threads,
            force=force,
            warnings=warnings,
            progress=progress,
        )


def _check_dtype(checkpoint: Path, dtype: str) -> None:
    """Raise InputError where 16 bits are asked for that a folder does not have: files hold the weights that it has."""
    if dtype in NARROW and not has_dtype(checkpoint, dtype):
        why = f"files hold a checkpoint's own weights, and those of {checkpoint} are not all of that"
        raise InputError(why, field="dtype", value=dtype, allowed="auto, float32")


def is_checkpoint(reference: str) -> bool:
    """Whether exports read a folder as it is; a model that is loaded as one of another type is saved as that first."""
    return Path(reference).is_dir() and not is_folded(Path(reference))


@contextmanager
def _checkpoint(reference: str, output: Path, seed: int, load: _Load) -> Iterator[Path]:
    """The folder that is exported; of a model that is none a dense one, beside the output and only for as long."""
    if is_checkpoint(reference):
        yield Path(reference)
        return
    loaded = load(reference)
    with scratch_directory(output) as scratch:
        with no_space_as_input_error(output):
            save_checkpoint(loaded, scratch / "model", seed=seed)
        del loaded
        yield scratch / "model"


def _export(
    checkpoint: Path,
    output: Path,
    request: ExportSettings,
    load: _Load,
    *,
    device: str,
    dtype: str,
    n_threads: int | None,
    force: bool,
    warnings: tuple[str, ...],
    progress: Progress,
) -> tuple[ExportRecord, ...]:
    formats = request.formats
    wants_text = reads_text(request, read_rounded_format(checkpoint))
    options = request.options(
        _calibration(checkpoint, request, load, progress) if wants_text else None,
        name=request.name,
        opset=request.opset,
        device=device,
        dtype=dtype,
        n_threads=n_threads,
        warnings=warnings,
        force=force,
        progress=progress,
    )
    if len(formats) == 1:
        ((family, names),) = formats.items()
        return FAMILIES[family].export(checkpoint, output, names, options)
    inner = replace(options, force=False)
    with atomic_directory(output, force=force) as folder:
        return tuple(
            _within(family, record)
            for family, names in formats.items()
            for record in FAMILIES[family].export(checkpoint, folder / family, names, inner)
        )


def reads_text(request: ExportSettings, trained: RoundedFormat | None = None) -> bool:
    """Whether text makes a difference to any of the formats but the one whose numbers a checkpoint has."""
    rows = (row for row in map(find_format, request.names) if trained is None or row.name != trained.format)
    return NO_TEXT not in request.calibration and any(_reads_text(row, request) for row in rows)


def _reads_text(row: ExportFormat, request: ExportSettings) -> bool:
    """Whether text makes a difference to a format, and there is some or it is worth sampling."""
    rounds = "gptq" not in row.reads or request.gptq or request.imatrix
    wants = row.needs_text or (request.tune_scales and "tune_scales" in row.reads)
    return wants or bool("calibration" in row.reads and request.calibration and rounds)


def _within(folder: str, record: ExportRecord) -> ExportRecord:
    """The record as it is from the folder above."""
    return replace(record, file=f"{folder}/{record.file}")


def _check(rows: Sequence[ExportFormat], request: ExportSettings) -> None:
    """Refuse what cannot be made before anything is."""
    mixed = [row.name for row in rows if row.needs_text and not row.is_sized]
    if mixed and NO_TEXT in request.calibration:
        raise InputError(f"{mixed[0]} wants text to choose layers by", field="calibration", value=NO_TEXT)
    if request.tune_scales and NO_TEXT in request.calibration:
        raise InputError("scales are trained on text", field="calibration", value=NO_TEXT)
    if NO_TEXT in request.calibration and len(request.calibration) > 1:
        raise InputError("`none` stands alone", field="calibration", value=request.calibration)


def _calibration(checkpoint: Path, request: ExportSettings, load: _Load, progress: Progress) -> torch.Tensor:
    """Windows to round weights of few bits for."""
    # A bare name could be a built-in alias.
    loaded = load(request.dense or checkpoint.resolve())
    ids = load_calibration(
        request.calibration or (SELF,),
        loaded,
        nsamples=request.nsamples,
        seqlen=request.seqlen,
        seed=request.seed,
        progress=progress,
    ).input_ids
    plan = read_record(PruningPlan, checkpoint / PLAN_FILE) if (checkpoint / PLAN_FILE).is_file() else None
    if request.dense and plan and plan.vocabulary:
        trimmed = trimmed_tokenizer(loaded.tokenizer, plan.vocabulary.kept)
        ids = respelling(loaded.tokenizer, trimmed).windows(ids)
    elif request.dense and load_tokenizer(checkpoint.resolve()).get_vocab() != loaded.tokenizer.get_vocab():
        raise InputError(
            "has another vocabulary than what is exported",
            field="dense",
            value=request.dense,
            allowed="leave it out",
        )
    return spread_windows(ids, request.rounding_windows)
