"""`phoneready quantize`: a model as GGUF files and ONNX folders, each rounded for a text and proven."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cfsp.files import claim_output
from cfsp.records import record_to_json
from cfsp.settings import as_read, setting
from cfsp.units import format_bytes
from exporters.export_record import ExportManifest, ExportRecord
from exporters.families import ExportSettings
from phoneready.commands.options import DtypeOption, ModelArgument
from phoneready.console import MakeOptions, prepare_torch, show_progress, warn, write_result

_SMALLER = 0.9
"""Of a file's size: the limit of the search that is proposed."""


def quantize(
    model: ModelArgument,
    settings: ExportSettings,
    how: MakeOptions,
    output: Path | None = setting(
        None, "Folder to create.", option="-o --output", metavar="DIR", shown="MODEL-FORMAT"
    ),
    dtype: DtypeOption = "auto",
) -> None:
    """Write a model as a good 4-bit file, or in the formats of --to, and prove it.

    Numbers of few bits are chosen for a text: yours, or what the model writes itself. Each file is reopened in its
    runtime and held against the model; what is too far from it fails, leaves nothing, and exits with 1.
    """
    prepare_torch(how.threads)
    from cfsp.devices import find_device
    from exporters.job import file_stem
    from phoneready.exporting import EXPORT_READS, export_model, is_checkpoint, reads_text
    from phoneready.room import check_room, exporting_needs

    if output is None:
        stem = file_stem(model.rstrip("/").removesuffix(".gguf"))
        output = Path("-".join((stem, *settings.names)).replace(":", "-"))
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
            check_room("quantize", (model,), needs, output, device=find_device(how.device), progress=progress)

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
    write_result(format_exports(model, records, output), record_to_json(record), as_json=how.json)


def format_exports(model: str, records: Sequence[ExportRecord], output: Path) -> str:
    """Size, stored types, how close each file is to the model, how it was proven, and what to do next."""
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
        lines.append(f"Held against the model in {first.runtime}, on {where}{equal}{chats}.")
        if first.blocks:
            lines.append(
                f"Quantized from {first.blocks.n_blocks} blocks that were held against the model one by one, as "
                f"float32: {first.blocks.max_difference:.1e} of the largest logit at most."
            )
    lines += [
        f"{record.quant} with numbers chosen for the text: KL {record.rounded_kl:.3f}; with those of the plain "
        f"quantizer, in as many bytes: {record.plain_kl:.3f}."
        for record in records
        if record.plain_kl is not None
    ]
    limit = format_bytes(int(_SMALLER * min(record.file_bytes for record in records))).replace(" ", "")
    return "\n".join([*lines, f"Written to {output}. Smaller: phoneready search {model} --max-size {limit}"])
