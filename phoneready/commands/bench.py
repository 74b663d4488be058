"""`phoneready bench`: measure exported files on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError, LimitError
from cfsp.settings import setting
from exporters.onnx.folder import find_graph, is_onnx
from phoneready.commands.options import JsonOption
from phoneready.console import note, quiet_libraries, show_progress, write_result
from runtime_bench.engines import ENGINES
from runtime_bench.measuring.measure import run_matrix
from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.presentation.record_table import format_table, speed_text
from runtime_bench.presentation.table import printable, short_names
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import against_the_first
from runtime_bench.records.jsonl import append_jsonl, check_appendable, record_to_line
from runtime_bench.targets.local import BROWSER_ENGINES
from runtime_bench.targets.table import ALL_DEVICES, TARGETS, every_target, open_target, parse_target
from runtime_bench.workload import BenchSettings

_AS_THEY_COME = "jsonl"
"""The format whose lines are written one by one."""
_PLACES = ", ".join(row.form for row in TARGETS.values())


def bench(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="GGUF files, .onnx files, folders of ONNX variants; measured in turns (A B A B)."
        ),
    ],
    settings: BenchSettings,
    on: tuple[str, ...] = setting(
        ("local",),
        f"Where: {_PLACES}; {ALL_DEVICES} for all that adb has, @FILE for a list. Options follow a target, "
        "as in constrained:400M,cores=0+1; see docs/targets.md.",
        metavar="TARGET",
    ),
    engine: str | None = setting(
        None,
        f"{', '.join(ENGINES)}; in a browser {', '.join(BROWSER_ENGINES.values())}.",
        shown="by the file",
    ),
    output: str = setting(
        "md",
        "md, json, jsonl or csv.",
        choices="runtime_bench.presentation.record_table:FORMATS",
        option="-o --output",
    ),
    anchor: Path | None = setting(
        None,
        "A file to measure in turns with the others: sessions of other days and machines are compared by it.",
        rare=True,
    ),
    record: Path | None = setting(None, "Append the records to a JSON Lines file."),
    json: JsonOption = False,
) -> None:
    """Measure loading, prompt processing, generation, time to first token and memory of exported files.

    Each sample is taken in a fresh process; several files take turns. A size of 0 leaves a workload out.
    Other machines are measured at the same time, this one after them.
    """
    quiet_libraries()

    output = "json" if json else output
    on = every_target(on)
    files = _graphs(files)
    anchor_file = _graphs([anchor])[0] if anchor else None
    if record is not None:
        check_appendable(record)
    measured = [*files, *([anchor_file] if anchor_file else [])]
    others = [path for path in measured if path.suffix.lower() != ".gguf"]
    for name in on if others else ():  # before it is opened: that may mean to build it
        if parse_target(name)[0].gguf_only:
            raise InputError(f"{name} runs only GGUF files", field="--on", value=str(others[0]))
    with show_progress() as progress:
        targets = [open_target(name, progress) for name in on]
    names = short_names(map(str, measured))

    def keep(row: BenchRecord) -> None:
        """A row as soon as it is complete: on the disk, and on stdout or, of several targets, on stderr."""
        if record is not None:
            append_jsonl(record, [row])
        if output == _AS_THEY_COME:
            sys.stdout.write(printable(record_to_line(row).rstrip("\n")) + "\n")
            sys.stdout.flush()
        elif len(targets) > 1:
            note(f"{row.target} {names[row.model_filename]} {row.test}: {row.failure or speed_text(row)}")

    with show_progress() as progress:
        records = run_matrix(
            files, settings, targets, progress, engine=engine, anchor=anchor_file, on_record=keep
        )
    if output != _AS_THEY_COME:
        text = format_table(records, output)
        if output == "md" and len(files) > 1:
            text += "\n" + format_comparison(against_the_first(records))
        write_result(text, None, as_json=False)
    _check_measured(records, several=len(targets) > 1)


def _graphs(paths: Sequence[Path]) -> list[Path]:
    """The files to measure, each once; of a folder of ONNX variants its graph."""

    files = [find_graph(str(path), last_logits=True) if is_onnx(str(path)) else path for path in paths]
    twice = next((path for position, path in enumerate(files) if path in files[:position]), None)
    if twice is not None:
        raise InputError("given twice", field="files", value=str(twice))
    return files


def _check_measured(records: Sequence[BenchRecord], *, several: bool) -> None:
    """Say why rows could not be measured, and raise LimitError for them."""

    failed = [record for record in records if not record.ok]
    names = short_names(record.model_filename for record in records)
    for row in failed if not several else ():  # of several targets each was told when it failed
        note(f"{names[row.model_filename]} {row.test}: {row.failure}")
    if failed:
        where = f" on {', '.join(dict.fromkeys(row.target for row in failed))}" if several else ""
        raise LimitError(f"{len(failed)} of {len(records)} rows could not be measured{where}")
