"""A model in all the formats that are asked for, in one folder that appears when all of them are proven."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from cfsp.devices import find_device
from cfsp.errors import InputError
from cfsp.files import atomic_directory, no_space_as_input_error, refuse_existing, scratch_directory
from cfsp.models.checkpoint import PLAN_FILE, RoundedFormat, read_rounded_format, save_checkpoint
from cfsp.models.offload import NARROW
from cfsp.models.reference import is_folded, load_model, load_tokenizer
from cfsp.models.source import LoadedModel
from cfsp.models.token_trees import trimmed_tokenizer
from cfsp.progress import Progress, no_progress
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.statistics import spread_windows
from cfsp.records import read_record
from cfsp.settings import Reads
from cfsp.text.calibration import Calibration
from cfsp.text.respelling import respelling
from exporters.export_record import ExportRecord
from exporters.families import FAMILIES, READS, ExportSettings, find_format, read_by_formats
from exporters.job import file_stem, has_dtype
from exporters.recipe import Recipe
from phoneready.console import MakeOptions
from phoneready.text import load_calibration

NO_TEXT = "none"
_Load = Callable[[str | Path], LoadedModel]
_OF_TEXT = (
    lambda asked: reads_text(asked),
    "without text to round for",
)
EXPORT_READS: Reads = {
    "calibration": (
        lambda asked: NO_TEXT in asked.calibration or asked.reads("calibration"),
        "without files of few bits",
    ),
    **read_by_formats({"opset": "without ONNX variants"}),
    **READS,
    **dict.fromkeys(("nsamples", "seqlen", "rounding_windows", "dense"), _OF_TEXT),
}


def export_model(
    reference: str,
    output: Path,
    request: ExportSettings,
    how: MakeOptions,
    *,
    dtype: str = "auto",
    warnings: tuple[str, ...] = (),
    before: Callable[[ExportSettings], None] = lambda request: None,
    progress: Progress = no_progress,
) -> tuple[ExportRecord, ...]:
    """Export a checkpoint folder, or whatever else `load_model` takes, into a folder that the caller has claimed.

    Of several families each has a folder of its own in `output`, and a single one is `output` itself. `before` is
    called with what is made, before a model is read; `warnings` are for the record.

    Raises:
        InputError: As the families' exports, or a model or calibration text that cannot be read.
        LimitError: Something is too far from the checkpoint. Nothing is left.
    """
    refuse_existing(output, force=how.force, inputs=[Path(reference), *map(Path, request.calibration)])
    formats, no_text = request.formats, NO_TEXT in request.calibration
    known = [find_format(name) for name in request.names]
    if request.name:
        file_stem(request.name)
    for family in formats:
        FAMILIES[family].require()
    mixed = [row.name for row in known if row.needs_text and not row.is_sized]
    if mixed and no_text:
        raise InputError(f"{mixed[0]} wants text to choose layers by", field="calibration", value=NO_TEXT)
    if request.tune_scales and no_text:
        raise InputError("scales are trained on text", field="calibration", value=NO_TEXT)
    if no_text and len(request.calibration) > 1:
        raise InputError("`none` stands alone", field="calibration", value=request.calibration)
    if not is_checkpoint(reference):
        request = replace(request, dense=request.dense or reference)
    elif dtype in NARROW and not has_dtype(Path(reference), dtype):
        why = f"files hold a checkpoint's own weights, and those of {reference} are not all of that"
        raise InputError(why, field="dtype", value=dtype, allowed="auto, float32")
    before(request)
    device = find_device(how.device)
    load = partial(
        load_model,
        device=device,
        dtype=dtype,
        may_stream=True,
        progress=progress,
    )
    with ExitStack() as stack:
        checkpoint = Path(reference)
        if not is_checkpoint(reference):
            # A dense model is saved beside the output, and only for as long.
            loaded = load(reference)
            checkpoint = stack.enter_context(scratch_directory(output)) / "model"
            with no_space_as_input_error(output):
                save_checkpoint(loaded, checkpoint, seed=request.seed)
            del loaded
        wants_text = reads_text(request, read_rounded_format(checkpoint))
        drawn = _calibration(checkpoint, request, load, progress) if wants_text else None
        options = request.options(
            None if drawn is None else spread_windows(drawn.input_ids, request.rounding_windows),
            recipe=Recipe()
            if drawn is None
            else Recipe(drawn.sources, request.nsamples, request.seqlen, drawn.seed),
            name=request.name,
            opset=request.opset,
            device=str(device),
            dtype=dtype,
            n_threads=how.threads,
            warnings=warnings,
            force=how.force,
            progress=progress,
        )
        if len(formats) == 1:
            ((family, names),) = formats.items()
            return FAMILIES[family].export(checkpoint, output, names, options)
        inside = replace(options, force=False)
        with atomic_directory(output, force=how.force) as folder:
            return tuple(
                replace(record, file=f"{family}/{record.file}")
                for family, names in formats.items()
                for record in FAMILIES[family].export(checkpoint, folder / family, names, inside)
            )


def is_checkpoint(reference: str) -> bool:
    """Whether exports read a folder as it is; a model that is loaded as one of another type is saved as that first."""
    return Path(reference).is_dir() and not is_folded(Path(reference))


def reads_text(request: ExportSettings, trained: RoundedFormat | None = None) -> bool:
    """Whether text makes a difference to a format, and there is some.

    The format whose numbers a checkpoint has is left out.
    """
    if NO_TEXT in request.calibration:
        return False
    for row in map(find_format, request.names):
        if trained is not None and row.name == trained.format:
            continue
        rounds = "gptq" not in row.reads or request.gptq or request.imatrix
        if row.needs_text or (request.tune_scales and "tune_scales" in row.reads):
            return True
        if "calibration" in row.reads and rounds:
            return True
    return False


def _calibration(checkpoint: Path, request: ExportSettings, load: _Load, progress: Progress) -> Calibration:
    """Windows to round weights of few bits for, in the checkpoint's ids."""
    # A bare name could be a built-in alias.
    loaded = load(request.dense or checkpoint.resolve())
    drawn = load_calibration(
        request.calibration,
        loaded,
        nsamples=request.nsamples,
        seqlen=request.seqlen,
        seed=request.seed,
        progress=progress,
    )
    plan = read_record(PruningPlan, checkpoint / PLAN_FILE) if (checkpoint / PLAN_FILE).is_file() else None
    if request.dense and plan and plan.vocabulary:
        trimmed = trimmed_tokenizer(loaded.tokenizer, plan.vocabulary.kept)
        return replace(drawn, input_ids=respelling(loaded.tokenizer, trimmed).windows(drawn.input_ids))
    if request.dense and load_tokenizer(checkpoint.resolve()).get_vocab() != loaded.tokenizer.get_vocab():
        raise InputError(
            "has another vocabulary than what is exported",
            field="dense",
            value=request.dense,
            allowed="leave it out",
        )
    return drawn
