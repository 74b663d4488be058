"""`phoneready release`: everything, from a model reference to proven files and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phoneready.commands.options import DebugOption, JsonOption, ThreadsOption, split_names
from phoneready.console import note, prepare_torch, show_progress, write_result

__all__ = ["release"]


def release(
    config: Annotated[
        Path | None,
        typer.Argument(help="release.toml; without it the demo.", show_default=False, metavar="CONFIG"),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Release folder; continued when it holds a release.")
    ] = Path("release"),
    onnx: Annotated[
        list[str] | None,
        typer.Option(
            "--onnx",
            help="ONNX variants beside the GGUF files: fp32, fp16, int8, int4, int4-b128.",
            metavar="VARIANT,...",
            show_default="the configuration's",
        ),
    ] = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune, evaluate, export, prove and measure a model; write a report and a manifest.

    Without CONFIG this is the demo: SmolLM2-135M-Instruct, fetched with pip, pruned with text sampled from itself.
    A run that was interrupted goes on where it was; a second run does only what has changed.
    """
    prepare_torch(threads)
    from cfsp.records import record_to_json
    from phoneready.pipeline.config import load_config, with_variants
    from phoneready.pipeline.manifest import REPORT_FILE, read_figures
    from phoneready.pipeline.release import run_release
    from phoneready.pipeline.report import headline, quality_table, verdict_table

    settings = load_config(config)
    if onnx:
        settings = with_variants(settings, split_names(onnx))
    manifest = run_release(
        settings,
        output,
        show=lambda name, state: note(f"{name:<14} {state}"),
        progress=show_progress,
        threads=threads,
    )
    figures = read_figures(settings, output)
    tables = [verdict_table(figures, d, p) for d, p in zip(figures.dense, figures.pruned, strict=True)]
    best = figures.pruned[0]
    lines = [headline(figures), *tables, quality_table(figures)]
    prompt, answer = figures.answers.prompts[0], figures.answers.answers[best.file][0]
    lines += [f"{best.file} answers:\n  Q: {prompt}\n  A: {' '.join(answer.split())}\n"]
    lines += [f"Report: {output / REPORT_FILE}"]
    write_result("\n".join(lines), record_to_json(manifest), as_json=json)
