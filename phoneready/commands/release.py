"""`phoneready release`: everything, from a model reference to proven files and a report."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError
from cfsp.records import record_to_json
from cfsp.settings import setting
from phoneready.commands.options import SET
from phoneready.console import ReadOptions, note, prepare_torch, show_progress, warn, write_result
from phoneready.figures.gate import badge, check_verdicts, verdict_rows


def release(
    config: Annotated[
        Path | None,
        typer.Argument(help="release.toml; without it the demo.", show_default=False, metavar="CONFIG"),
    ] = None,
    output: Path = setting(
        Path("release"), "Release folder; continued when it holds a release.", option="-o --output"
    ),
    settings: tuple[str, ...] = SET,
    explain: bool = setting(False, "Say why each stage would run, and run nothing."),
    label: str | None = setting(None, "What `phoneready history` is to call this run, such as a version."),
    *,
    how: ReadOptions,
) -> None:
    """Prune, evaluate, export, prove and measure a model, and hold it against budgets; write reports and a manifest.

    Without CONFIG this is the demo: SmolLM2-135M-Instruct, fetched with pip, pruned with text sampled from itself.
    A run that was interrupted goes on where it was; a second run does only what has changed. Exit status: 0 all budgets
    are met, 1 one is missed, 2 something cannot be used, 3 one could not be decided and none is missed.
    """
    prepare_torch(how.threads)
    from phoneready.publish.publish import PAGE_FILE
    from phoneready.release.results import read_figures
    from phoneready.releasing import explain_release, fitted, run_release
    from phoneready.report.report import (
        beaten,
        details,
        headline,
        losses_table,
        quality_text,
        speed_tables,
        verdict_table,
    )
    from phoneready.settings.release import load_config
    from phoneready.tracking import LiveRun, log_release

    chosen = fitted(load_config(config, settings))
    warn(chosen.warnings)
    if explain:
        reasons = explain_release(chosen, output, how.threads)
        lines = [f"{name:<14} {why or 'done before'}" for name, why in reasons.items()]
        write_result("\n".join(lines), reasons, as_json=how.json)
        return
    live = LiveRun(chosen.tracking, label, note) if chosen.tracking else None
    with live or nullcontext():
        manifest, verdicts = run_release(
            chosen,
            output,
            show=lambda name, state: note(f"{name:<14} {state}"),
            progress=partial(live.progress, show_progress) if live else show_progress,
            threads=how.threads,
            label=label,
            tell=lambda line: note(f"{'':<14} {line}"),
        )
    not_logged = None
    if chosen.tracking is not None and live is not None:
        try:
            run = log_release(chosen.tracking, output, live)
            note(f"logged as run {run} of experiment {chosen.tracking.experiment}")
        except InputError as error:  # it must not hide the gate's verdict
            not_logged = error
    figures = read_figures(chosen, output)
    best = figures.shipped[0]
    prompt, answer = figures.answers.prompts[0], figures.answers.answers[best.file][0]
    lines = [
        headline(figures),
        details(figures),
        *beaten(figures),
        *([verdict_table(figures, *pair) for pair in figures.pairs] or speed_tables(figures)),
        losses_table(figures).markdown(),
        quality_text(figures),
        f"{best.file} answers:\n  Q: {prompt}\n  A: {' '.join(answer.split())}\n",
        *([verdict_rows(verdicts.verdicts)] if verdicts.verdicts else []),
        f"Report: {output / PAGE_FILE}",
        badge(verdicts),
    ]
    write_result("\n".join(lines), record_to_json(manifest), as_json=how.json)
    if not_logged is not None:
        note(f"warning: {not_logged}")
    check_verdicts(verdicts.verdicts)
    if not_logged is not None:
        raise not_logged
