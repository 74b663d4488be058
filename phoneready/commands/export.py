"""`phoneready export`: a model as GGUF files and ONNX folders, each proven against the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cfsp.files import claim_output
from cfsp.records import record_to_json
from cfsp.settings import as_read
from exporters.export_record import ExportManifest, ExportRecord
from exporters.families import ExportSettings
from phoneready.commands.options import DtypeOption, was_given
from phoneready.console import MakeOptions, prepare_torch, show_progress, warn, write_result


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
    from phoneready.exporting import EXPORT_READS, export_model, is_checkpoint, reads_text
    from phoneready.room import check_room, exporting_needs

    if settings.onnx and not was_given(context, "quants"):
        settings = replace(settings, quants=())
    settings, warnings = as_read(settings, EXPORT_READS)
    warn(warnings)
    with claim_output(output), show_progress() as progress:

        def before(request: ExportSettings) -> None:
            count = request.nsamples if request.rounding_windows is None else request.rounding_windows
            windows = min(count, request.nsamples) if reads_text(request) else None
            saved = not is_checkpoint(model)
            needs = partial(
                exporting_needs, settings=request, windows=windows, seqlen=request.seqlen, is_saved=saved
            )
            # The proof has float32, whatever is asked for.
            check_room("export", (model,), needs, output, device=find_device(how.device), progress=progress)

        records = export_model(
            model,
            output,
            settings,
            how,
            dtype=dtype,
            warnings=warnings,
            before=before,
            progress=progress,
        )
    record = ExportManifest(records, warnings)
    write_result(format_exports(records, output), record_to_json(record), as_json=how.json)


def format_exports(records: Sequence[ExportRecord], output: Path) -> str:
    """Size, stored types, how close each file is to the checkpoint, and how each kind of file was proven."""
    from phoneready.report.report import proof_table

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
