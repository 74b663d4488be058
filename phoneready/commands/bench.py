"""`phoneready bench`: measure exported files on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfsp.errors import InputError, LimitError
from phoneready.commands.bench_targets import TARGETS, Limits, open_target
from phoneready.commands.options import DebugOption, JsonOption, SeedOption, split_numbers
from phoneready.console import note, quiet_libraries, show_progress, write_result

if TYPE_CHECKING:
    from runtime_bench.compare import Comparison
    from runtime_bench.record import BenchRecord

__all__ = ["bench"]


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
        str,
        typer.Option(
            "--on",
            help=f"Where: {', '.join(row.form for row in TARGETS.values())}; see docs/targets.md.",
            metavar="TARGET",
        ),
    ] = "local",
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
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure loading, prompt processing, generation, time to first token and memory of exported files.

    Each sample is taken in a fresh process; several files take turns. A size of 0 leaves a workload out.
    """
    quiet_libraries()
    from exporters.onnx.folder import find_graph, is_onnx
    from runtime_bench.comparison_table import format_comparison
    from runtime_bench.jsonl import append_jsonl
    from runtime_bench.measure import run_bench
    from runtime_bench.sweep_table import format_sweep
    from runtime_bench.table import FORMATS, format_table, short_names
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
    target = open_target(on, Limits(memory, tuple(cores or ()), device, score))
    files = [find_graph(str(path), last_logits=True) if is_onnx(str(path)) else path for path in files]
    with show_progress() as progress:
        records = run_bench(
            files,
            settings,
            progress,
            engine=engine,
            target=target,
            on_record=None if record is None else lambda row: append_jsonl(record, [row]),
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
            note(f"{names[row.model_filename]} {row.test}: {row.failure}")
        raise LimitError(f"{len(failed)} of {len(records)} rows could not be measured")


def _against_the_first(records: list[BenchRecord]) -> list[Comparison]:
    """Every file against the first one of its engine."""
    from runtime_bench.compare import by_model, compare

    rows = []
    for engine in dict.fromkeys(record.engine for record in records):
        base, *others = by_model([record for record in records if record.engine == engine]).values()
        rows += [row for other in others for row in compare(base, other)]
    return rows
