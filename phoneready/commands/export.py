"""`phoneready export`: a model as GGUF files and ONNX folders, each proven against the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfsp.files import claim_output
from cfsp.records import record_to_json
from cfsp.settings import as_read
from cfsp.text.settings import SELF
from exporters.export_record import ExportManifest, ExportRecord
from exporters.settings import ExportSettings
from phoneready.commands.options import DtypeOption, was_given
from phoneready.console import MakeOptions, prepare_torch, show_progress, warn, write_result

if TYPE_CHECKING:
    from cfsp.progress import Progress
    from phoneready.forecasts.said import Machine


def export(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder, pruned or dense; or a hub id, a GGUF file, smollm2-135m.",
            metavar="MODEL",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to create.", show_default=False)],
    settings: ExportSettings,
    how: MakeOptions,
    dtype: DtypeOption = "auto",
) -> None:
    """Write a model as GGUF files or ONNX folders, reopen each in its runtime and hold it against the model.

    With both kinds the output has a folder for each. What is too far from the checkpoint fails the export: nothing
    is left, and the exit status is 1.
    """
    prepare_torch(how.threads)
    from cfsp.devices import find_device
    from phoneready.exporting import EXPORT_READS, export_model
    from phoneready.forecasts.said import Machine

    if settings.onnx and not was_given(context, "quants"):
        settings = replace(settings, quants=())
    settings, warnings = as_read(settings, EXPORT_READS)
    warn(warnings)
    machine = Machine(device=find_device(how.device))  # the proof has float32, whatever is asked for
    with claim_output(output), show_progress() as progress:
        records = export_model(
            model,
            output,
            settings,
            how,
            dtype=dtype,
            warnings=warnings,
            before=partial(_foretell, model, output, machine, progress),
            progress=progress,
        )
    record = ExportManifest(records, warnings)
    write_result(format_exports(records, output), record_to_json(record), as_json=how.json)


def _foretell(
    model: str, output: Path, machine: Machine, progress: Progress, request: ExportSettings
) -> None:
    from phoneready.exporting import is_checkpoint, reads_text
    from phoneready.forecasts.said import foretell
    from phoneready.forecasts.stages import Exporting, Windows

    text = Windows(request.nsamples, request.seqlen).most(request.rounding_windows)
    asked = Exporting(
        request.names,
        text if reads_text(request) else None,
        request.gptq,
        request.tune_scales,
        is_saved=not is_checkpoint(model),
    )
    written = (request.calibration or (SELF,)) if asked.text else ()
    foretell(
        "export",
        (model,),
        asked,
        output,
        text=written,
        writer=request.dense,
        machine=machine,
        progress=progress,
    )


def format_exports(records: Sequence[ExportRecord], output: Path) -> str:
    """Size, stored types, how close each file is to the checkpoint, and how each kind of file was proven."""
    from phoneready.report.tables import proof_table

    lines = [proof_table(records).markdown()]
    lines += [f"{record.file}: {warning}" for record in records for warning in record.warnings]
    firsts: dict[str, ExportRecord] = {}
    for record in records:
        firsts.setdefault(record.format, record)
    for first in firsts.values():
        parity, strings = first.parity, first.tokenizer_strings
        where = f"{parity.text}, {parity.n_windows} windows of {parity.seqlen} tokens"
        equal = f"; tokenization equal on {strings} strings" if strings else ""
        chats = f"; {len(first.chats)} chats read token by token" if first.chats else ""
        lines.append(f"Held against the checkpoint in {first.runtime}, on {where}{equal}{chats}.")
        if first.blocks:
            lines.append(
                f"Quantized from {first.blocks.n_blocks} blocks that were held against the checkpoint one by one, as "
                f"float32: {first.blocks.max_difference:.1e} of the largest logit at most."
            )
    return "\n".join([*lines, f"Written to {output}."])
