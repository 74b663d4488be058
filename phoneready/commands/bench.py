"""`phoneready bench`: measure exported files on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError, LimitError, PhonereadyError
from cfsp.settings import as_read, no_effect, setting
from exporters.onnx.folder import find_graph, is_onnx
from phoneready.commands.options import JsonOption, given_options
from phoneready.console import note, quiet_libraries, show_progress, warn, write_result
from runtime_bench.engines import ENGINES
from runtime_bench.measuring.matrix import run_matrix
from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.presentation.markup import printable
from runtime_bench.presentation.record_table import format_depths, format_sweep, format_table, speed_text
from runtime_bench.presentation.table import short_names
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Compared, by_model, compare
from runtime_bench.records.jsonl import append_jsonl, check_appendable, record_to_line
from runtime_bench.targets import Target
from runtime_bench.targets.browser import BROWSER_ENGINES
from runtime_bench.targets.names import ALL_DEVICES, every_target
from runtime_bench.targets.remote import Remote
from runtime_bench.targets.table import READS as TARGET_READS
from runtime_bench.targets.table import TARGETS, TargetOptions, find_row, open_targets
from runtime_bench.workload import READS, BenchSettings

_AS_THEY_COME = "jsonl"
"""The format whose lines are written one by one."""
_PLACES = ", ".join(row.form for row in TARGETS.values())


def bench(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="GGUF files, .onnx files, folders of ONNX variants; measured in turns (A B A B)."
        ),
    ],
    settings: BenchSettings,
    options: TargetOptions,
    on: tuple[str, ...] = setting(
        ("local",),
        f"Where: {_PLACES}; {ALL_DEVICES} for all that adb has, @FILE for a list; see docs/targets.md.",
        metavar="TARGET",
    ),
    at_once: int | None = setting(
        None, "Most other machines to measure at the same time.", ge=1, metavar="N", shown="all"
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
    ),
    record: Path | None = setting(None, "Append the records to a JSON Lines file."),
    clean: bool = setting(False, "Afterwards remove what was pushed to other machines."),
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
    _check_places(on, [*files, *([anchor_file] if anchor_file else [])])
    settings, unread = as_read(settings, READS)
    options, untaken = as_read(options, TARGET_READS, on)
    with show_progress() as progress:
        targets = open_targets(on, options, progress)
    far = any(isinstance(target, Remote) for target in targets)
    alone = () if far else given_options(context, ("at_once", "clean"))
    warn((*unread, *untaken, *(no_effect(name, "without --on and another machine") for name in alone)))
    names = short_names(map(str, filter(None, [*files, anchor_file])))
    with show_progress() as progress, _cleaned(targets if clean else []):
        records = run_matrix(
            files,
            settings,
            targets,
            progress,
            engine=engine,
            anchor=anchor_file,
            on_record=lambda row: _keep(row, record, output, names if len(targets) > 1 else {}),
            at_once=at_once,
        )
    if output != _AS_THEY_COME:
        write_result(_format(records, output, settings, several=len(files) > 1), None, as_json=False)
    _check_measured(records, several=len(targets) > 1)


def _keep(row: BenchRecord, record: Path | None, output: str, names: Mapping[str, str]) -> None:
    """A row as soon as it is complete: on the disk, and on stdout, or, where files have names for it, on stderr."""
    if record is not None:
        append_jsonl(record, [row])
    if output == _AS_THEY_COME:
        sys.stdout.write(printable(record_to_line(row).rstrip("\n")) + "\n")
        sys.stdout.flush()
    elif names:
        note(f"{row.target} {names[row.model_filename]} {row.test}: {row.failure or speed_text(row)}")


def _graphs(paths: Sequence[Path]) -> list[Path]:
    """The files to measure, each once; of a folder of ONNX variants its graph."""

    files = [find_graph(str(path), last_logits=True) if is_onnx(str(path)) else path for path in paths]
    twice = next((path for position, path in enumerate(files) if path in files[:position]), None)
    if twice is not None:
        raise InputError("given twice", field="files", value=str(twice))
    return files


def _check_places(names: Sequence[str], files: Sequence[Path]) -> None:
    """Refuse files for a target that cannot run them before it is opened: that may mean to build it."""
    others = [path for path in files if path.suffix.lower() != ".gguf"]
    for name in names if others else ():
        if find_row(name)[0].gguf_only:
            raise InputError(f"{name} runs GGUF files alone", field="--on", value=str(others[0]))


def _format(records: list[BenchRecord], output: str, settings: BenchSettings, *, several: bool) -> str:

    text = format_table(records, output)
    if output == "md" and len(settings.n_threads) > 1:
        text += "\n" + format_sweep(records)
    if output == "md" and len(settings.n_depth) > 1:
        text += "\n" + format_depths(records)
    if output == "md" and several:
        text += "\n" + format_comparison(_against_the_first(records))
    return text


def _check_measured(records: Sequence[BenchRecord], *, several: bool) -> None:
    """Say why rows could not be measured, and raise LimitError for them."""

    failed = [record for record in records if not record.ok]
    names = short_names(record.model_filename for record in records)
    for row in failed if not several else ():  # of several targets each was told when it failed
        note(f"{names[row.model_filename]} {row.test}: {row.failure}")
    if failed:
        where = f" on {', '.join(dict.fromkeys(row.target for row in failed))}" if several else ""
        raise LimitError(f"{len(failed)} of {len(records)} rows could not be measured{where}")


def _against_the_first(records: list[BenchRecord]) -> list[Compared]:
    """Every file against the first one of its engine on its target."""

    rows = []
    models = [record for record in records if not record.is_anchor]
    for place in dict.fromkeys((record.target, record.engine) for record in models):
        base, *others = by_model([r for r in models if (r.target, r.engine) == place]).values()
        rows += [row for other in others for row in compare(base, other)]
    return rows


@contextmanager
def _cleaned(targets: Sequence[Target]) -> Iterator[None]:
    """At the end, interrupted or not, remove what was pushed; a machine that does not answer any more is told of."""

    try:
        yield
    finally:
        for target in targets:
            try:
                if isinstance(target, Remote):
                    target.clean()
            except PhonereadyError as error:
                note(str(error))
