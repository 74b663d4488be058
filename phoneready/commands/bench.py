"""`phoneready bench`: measure exported files on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfsp.errors import InputError, LimitError, PhonereadyError
from phoneready.commands.options import (
    DebugOption,
    JsonOption,
    RemoteFolderOption,
    SeedOption,
    SshConfigOption,
    split_numbers,
)
from phoneready.console import note, quiet_libraries, show_progress, write_result
from runtime_bench.targets.table import TARGETS, TargetOptions, find_row, open_targets

if TYPE_CHECKING:
    from runtime_bench.records.compare import Comparison
    from runtime_bench.records.record import BenchRecord
    from runtime_bench.targets import Target


def bench(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="GGUF files, .onnx files, folders of ONNX variants; measured in turns (A B A B)."
        ),
    ],
    n_prompt: Annotated[
        list[str], typer.Option("-p", "--n-prompt", help="Prompt sizes of pp.", metavar="N,...")
    ] = ["512"],  # noqa: B006
    n_gen: Annotated[
        list[str], typer.Option("-n", "--n-gen", help="Generated tokens of tg.", metavar="N,...")
    ] = ["128"],  # noqa: B006
    ttft: Annotated[
        list[str], typer.Option("--ttft", help="Prompt sizes of time to first token.", metavar="N,...")
    ] = ["128"],  # noqa: B006
    depth: Annotated[
        list[str], typer.Option("-d", "--n-depth", help="Tokens in the context before.", metavar="N,...")
    ] = ["0"],  # noqa: B006
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="llama.cpp, onnxruntime or onnxruntime-genai; in a browser wllama or onnxruntime-web.",
            show_default="by the file",
        ),
    ] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Samples of each row.", min=1)] = 5,
    threads: Annotated[
        list[str] | None,
        typer.Option("-t", "--threads", help="Thread counts.", metavar="N,...", show_default="all cores"),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="md, json, jsonl or csv.")] = "md",
    no_warmup: Annotated[
        bool, typer.Option("--no-warmup", help="Also count the first run of a process.")
    ] = False,
    delay: Annotated[
        float, typer.Option("--delay", help="Seconds to pause before each process.", min=0)
    ] = 0.0,
    cold: Annotated[
        bool, typer.Option("--cold", help="Load from the disk: have the file forgotten before each load.")
    ] = False,
    no_text_check: Annotated[
        bool,
        typer.Option(
            "--no-text-check", help="Do not let each file write first; degenerate text voids speeds."
        ),
    ] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="Append the records to a JSON Lines file.")
    ] = None,
    on: Annotated[
        list[str],
        typer.Option(
            "--on",
            help=f"Where: {', '.join(row.form for row in TARGETS.values())}; see docs/targets.md. May be repeated.",
            metavar="TARGET",
        ),
    ] = ["local"],  # noqa: B006
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", help="Memory that a constrained run may use, as 400M or 2G.", metavar="SIZE"
        ),
    ] = None,
    cores: Annotated[
        list[str] | None,
        typer.Option("--cores", help="Cores that a constrained run may use, as 0,1.", metavar="N,..."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="Take limits from this device's profile: memory, or the score of its browser.",
            metavar="NAME",
        ),
    ] = None,
    score: Annotated[
        float | None,
        typer.Option("--score", help="Slow the browser's page down to this score.", metavar="NUMBER"),
    ] = None,
    runner: Annotated[
        Path | None,
        typer.Option(
            "--runner",
            help="Native program to measure GGUF files with on other machines.",
            show_default="built here once",
        ),
    ] = None,
    ndk: Annotated[
        Path | None,
        typer.Option("--ndk", help="Folder of the Android NDK, to build that program with.", metavar="DIR"),
    ] = None,
    remote_folder: RemoteFolderOption = None,
    ssh_config: SshConfigOption = None,
    clean: Annotated[
        bool, typer.Option("--clean", help="Afterwards remove what was pushed to other machines.")
    ] = False,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure loading, prompt processing, generation, time to first token and memory of exported files.

    Each sample is taken in a fresh process; several files take turns. A size of 0 leaves a workload out.
    Other machines are measured at the same time, this one after them.
    """
    quiet_libraries()
    from exporters.onnx.folder import find_graph, is_onnx
    from runtime_bench.measuring.matrix import run_matrix
    from runtime_bench.presentation.comparison_table import format_comparison
    from runtime_bench.presentation.record_table import FORMATS, format_table
    from runtime_bench.presentation.sweep_table import format_sweep
    from runtime_bench.presentation.table import short_names
    from runtime_bench.records.jsonl import append_jsonl, check_appendable
    from runtime_bench.workload import BenchSettings

    output = "json" if json else output
    if output not in FORMATS:
        raise InputError("unknown format", field="--output", value=output, allowed=", ".join(FORMATS))
    settings = BenchSettings(
        n_prompt=split_numbers(n_prompt, "--n-prompt"),
        n_gen=split_numbers(n_gen, "--n-gen"),
        ttft=split_numbers(ttft, "--ttft"),
        n_depth=split_numbers(depth, "--n-depth"),
        repetitions=repetitions,
        n_threads=split_numbers(threads or [], "--threads"),
        warmup=not no_warmup,
        cold_load=cold,
        delay_s=delay,
        check_text=not no_text_check,
        seed=seed,
    )
    options = TargetOptions(
        memory, split_numbers(cores or [], "--cores"), device, score, runner, ndk, remote_folder, ssh_config
    )
    files = [find_graph(str(path), last_logits=True) if is_onnx(str(path)) else path for path in files]
    twice = next((path for position, path in enumerate(files) if path in files[:position]), None)
    if twice is not None:
        raise InputError("given twice", field="files", value=str(twice))
    if record is not None:
        check_appendable(record)
    others = [path for path in files if path.suffix.lower() != ".gguf"]
    for name in on if others else ():
        # Before it is opened: that may mean to build it.
        if find_row(name)[0].gguf_only:
            raise InputError(f"{name} runs GGUF files alone", field="--on", value=str(others[0]))
    with show_progress() as progress:
        targets = open_targets(on, options, progress)
    with show_progress() as progress, _cleaned(targets if clean else []):
        records = run_matrix(
            files,
            settings,
            targets,
            progress,
            engine=engine,
            on_record=lambda row: None if record is None else append_jsonl(record, [row]),
        )
    text = format_table(records, output)
    if output == "md" and len(settings.n_threads) > 1:
        text += "\n" + format_sweep(records)
    if output == "md" and len(files) > 1:
        text += "\n" + format_comparison(_against_the_first(records))
    write_result(text, None, as_json=False)
    failed = [r for r in records if not r.ok]
    if failed:
        names = short_names(row.model_filename for row in records)
        for row in failed:
            where = f"{row.target} " if len(targets) > 1 else ""
            note(f"{where}{names[row.model_filename]} {row.test}: {row.failure}")
        raise LimitError(f"{len(failed)} of {len(records)} rows could not be measured")


def _against_the_first(records: list[BenchRecord]) -> list[Comparison]:
    """Every file against the first one of its engine on its target."""
    from runtime_bench.records.compare import by_model, compare

    rows = []
    for place in dict.fromkeys((record.target, record.engine) for record in records):
        base, *others = by_model([r for r in records if (r.target, r.engine) == place]).values()
        rows += [row for other in others for row in compare(base, other)]
    return rows


@contextmanager
def _cleaned(targets: Sequence[Target]) -> Iterator[None]:
    """At the end, interrupted or not, remove what was pushed; a machine that does not answer any more is told of."""
    from runtime_bench.targets.remote import Remote

    try:
        yield
    finally:
        for target in targets:
            try:
                if isinstance(target, Remote):
                    target.clean()
            except PhonereadyError as error:
                note(str(error))
