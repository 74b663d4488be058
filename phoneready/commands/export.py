"""`phoneready export`: a checkpoint as GGUF files, each proven against the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cfsp.errors import InputError
from phoneready.commands.options import DebugOption, ForceOption, JsonOption, ThreadsOption, split_names
from phoneready.console import format_bytes, format_rows, prepare_torch, show_progress, write_result

__all__ = ["export", "format_exports"]


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder, pruned or dense.", metavar="DIR")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to create.", show_default=False)],
    gguf: Annotated[
        list[str],
        typer.Option(
            "--gguf", help="f32, f16, Q8_0, Q5_K_M, Q4_K_M, Q4_0, IQ4_NL; as A,B.", metavar="QUANT,..."
        ),
    ] = ["Q4_0"],  # noqa: B006
    name: Annotated[
        str | None, typer.Option("--name", help="Stem of the file names.", show_default="the model's name")
    ] = None,
    no_imatrix: Annotated[
        bool, typer.Option("--no-imatrix", help="Quantize without the importance matrix of the calibration.")
    ] = False,
    force: ForceOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write GGUF files of a checkpoint, reopen each in llama.cpp and hold it against the checkpoint.

    A file that is too far from the checkpoint fails the export: nothing is left, and the exit status is 1.
    """
    prepare_torch(threads)
    from cfsp.records import record_to_json
    from exporters.gguf import export_gguf
    from exporters.record import ExportManifest

    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} is not a folder; `phoneready prune MODEL -o DIR` makes one")
    with show_progress() as progress:
        records = export_gguf(
            checkpoint,
            output,
            split_names(gguf),
            name=name,
            use_imatrix=not no_imatrix,
            n_threads=threads,
            force=force,
            progress=progress,
        )
    write_result(format_exports(records, output), record_to_json(ExportManifest(records)), as_json=json)


def format_exports(records: Sequence[Any], output: Path) -> str:
    """Size, stored types, and how close each file is to the checkpoint."""
    header = ["file", "size", "types", "max logit diff", "KL mean", "same top-1", "ppl ratio"]
    rows = []
    for record in records:
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(record.tensor_types.items()))
        p = record.parity
        parity = [f"{p.max_logit_diff:.2g}", f"{p.kl_mean:.4f}", f"{p.same_top1:.2%}", f"{p.ppl_ratio:.4f}"]
        rows.append([record.file, format_bytes(record.file_bytes), types, *parity])
    notes = [f"{record.file}: {warning}" for record in records for warning in record.warnings]
    parity = records[0].parity
    proof = (
        f"Held against the checkpoint in llama.cpp on {parity.text}, {parity.n_windows} windows of "
        f"{parity.seqlen} tokens; tokenization equal on {records[0].tokenizer_strings} strings."
    )
    return "\n".join([format_rows(header, rows), *notes, proof, f"Written to {output}."])
