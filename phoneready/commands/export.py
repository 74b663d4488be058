"""`phoneready export`: a checkpoint as GGUF files and ONNX folders, each proven against the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cfsp.errors import InputError
from cfsp.files import claim_output
from cfsp.units import parse_bytes
from phoneready.commands.options import (
    TEXT_HELP,
    DebugOption,
    ForceOption,
    JsonOption,
    SeedOption,
    ThreadsOption,
    split_names,
    text_references,
)
from phoneready.console import format_bytes, format_rows, prepare_torch, show_progress, write_result


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder, pruned or dense.", metavar="DIR")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to create.", show_default=False)],
    gguf: Annotated[
        list[str] | None,
        typer.Option(
            "--gguf",
            help="f32, f16, Q8_0, Q5_K_M, Q4_K_M, Q4_0, IQ4_NL; as A,B.",
            metavar="QUANT,...",
            show_default="Q4_0 without --onnx",
        ),
    ] = None,
    onnx: Annotated[
        list[str] | None,
        typer.Option(
            "--onnx",
            help="fp32, fp16, int8, int8-dynamic, int4, int4-mixed, int4-b128, portable; as A,B.",
            metavar="VARIANT,...",
            show_default="none",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Stem of GGUF files, name of graphs.", show_default="the model's name"),
    ] = None,
    no_imatrix: Annotated[
        bool, typer.Option("--no-imatrix", help="Quantize without the importance matrix of the calibration.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            help=f"Text that 4-bit ONNX variants are rounded for; repeatable. `self`, `none`, {TEXT_HELP}.",
            metavar="REF",
            show_default="self",
        ),
    ] = None,
    mixed_size: Annotated[
        str | None,
        typer.Option(
            "--mixed-size",
            help="Most that `int4-mixed` may take, such as 80M.",
            metavar="SIZE",
            show_default="1.1 times what GGUF's Q4_0 takes",
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            "--opset",
            help="ONNX opset of the graphs; older runtimes want an older one.",
            metavar="N",
            show_default="21",
        ),
    ] = None,
    ort: Annotated[
        bool, typer.Option("--ort", help="Write each ONNX variant as one .ort file, too.")
    ] = False,
    seed: SeedOption = 0,
    force: ForceOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint as GGUF files or ONNX folders, reopen each in its runtime and hold it against the checkpoint.

    With both kinds the output has a folder for each. What is too far from the checkpoint fails the export: nothing
    is left, and the exit status is 1.
    """
    prepare_torch(threads)
    from cfsp.records import record_to_json
    from exporters.record import ExportManifest
    from phoneready.exporting import ExportRequest, export_checkpoint

    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} is not a folder; `phoneready prune MODEL -o DIR` makes one")
    request = ExportRequest(
        quants=split_names(gguf or ([] if onnx else ["Q4_0"])),
        variants=split_names(onnx or []),
        name=name,
        use_imatrix=not no_imatrix,
        calibration=text_references(calibration or []),
        seed=seed,
        n_threads=threads,
        ort=ort,
        opset=opset,
        mixed_bytes=parse_bytes(mixed_size, "--mixed-size") if mixed_size else None,
    )
    with claim_output(output), show_progress() as progress:
        records = export_checkpoint(checkpoint, output, request, force=force, progress=progress)
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
    return "\n".join([format_rows(header, rows), *notes, *_proofs(records), f"Written to {output}."])


def _proofs(records: Sequence[Any]) -> list[str]:
    """How each kind of file was proven, once a kind."""
    lines = []
    for kind in dict.fromkeys(record.format for record in records):
        first = next(record for record in records if record.format == kind)
        parity = first.parity
        line = (
            f"Held against the checkpoint in {first.runtime}, on {parity.text}, {parity.n_windows} windows of "
            f"{parity.seqlen} tokens"
        )
        strings = first.tokenizer_strings
        lines.append(line + (f"; tokenization equal on {strings} strings." if strings else "."))
    return lines
