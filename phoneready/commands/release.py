"""`phoneready release`: everything, from a model reference to proven files and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfsp.errors import InputError
from cfsp.records import record_to_json
from cfsp.settings import setting
from exporters.onnx import VARIANTS
from phoneready.commands.options import SET, JsonOption, ThreadsOption, TrustOption
from phoneready.console import note, prepare_torch, show_progress, warn, write_result
from phoneready.figures.gate_files import badge, check_verdicts, verdict_rows
from phoneready.figures.verdict import Verdicts
from phoneready.settings.schema import ReleaseConfig

if TYPE_CHECKING:
    from phoneready.release.results import ReleaseFigures


def release(
    config: Annotated[
        Path | None,
        typer.Argument(help="release.toml; without it the demo.", show_default=False, metavar="CONFIG"),
    ] = None,
    output: Path = setting(
        Path("release"), "Release folder; continued when it holds a release.", option="-o --output"
    ),
    onnx: tuple[str, ...] = setting(
        (),
        f"ONNX variants beside the GGUF files: {', '.join(VARIANTS)}.",
        metavar="VARIANT,...",
        shown="the configuration's",
    ),
    settings: tuple[str, ...] = SET,
    explain: bool = setting(False, "Say why each stage would run, and run nothing."),
    label: str | None = setting(None, "What `phoneready history` is to call this run, such as a version."),
    trust_remote_code: TrustOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Prune, evaluate, export, prove and measure a model, and hold it against budgets; write reports and a manifest.

    Without CONFIG this is the demo: SmolLM2-135M-Instruct, fetched with pip, pruned with text sampled from itself.
    A run that was interrupted goes on where it was; a second run does only what has changed. Exit status: 0 all budgets
    are met, 1 one is missed, 2 something cannot be used, 3 one could not be decided and none is missed.
    """
    prepare_torch(threads)
    from phoneready.recipe import explain_release, run_release
    from phoneready.release.results import read_figures
    from phoneready.settings.release import load_config, with_variants

    chosen = load_config(config, settings, trust_remote_code=trust_remote_code)
    if onnx:
        chosen = with_variants(chosen, onnx)
    warn(chosen.warnings)
    if explain:
        reasons = explain_release(chosen, output, threads)
        lines = [f"{name:<14} {why or 'done before'}" for name, why in reasons.items()]
        write_result("\n".join(lines), reasons, as_json=json)
        return
    manifest, verdicts = run_release(
        chosen,
        output,
        show=lambda name, state: note(f"{name:<14} {state}"),
        progress=show_progress,
        threads=threads,
        label=label,
        tell=lambda line: note(f"{'':<14} {line}"),
    )
    not_logged = _track(chosen, output, label)
    summary = _summary(read_figures(chosen, output), verdicts, output)
    write_result(summary, record_to_json(manifest), as_json=json)
    if not_logged is not None:
        note(f"warning: {not_logged}")
    check_verdicts(verdicts)
    if not_logged is not None:
        raise not_logged


def _summary(figures: ReleaseFigures, verdicts: Verdicts, folder: Path) -> str:
    """The outcome in words and tables, an answer of the first file, and what the budgets say."""
    from phoneready.publish.publish import PAGE_FILE
    from phoneready.report.report import beaten, headline, quality_text, verdict_table
    from phoneready.report.tables import losses_table

    best = figures.pruned[0]
    prompt, answer = figures.answers.prompts[0], figures.answers.answers[best.file][0]
    lines = [
        headline(figures),
        *beaten(figures),
        *(verdict_table(figures, d, p) for d, p in figures.pairs),
        losses_table(figures).markdown(),
        quality_text(figures),
    ]
    lines += [f"{best.file} answers:\n  Q: {prompt}\n  A: {' '.join(answer.split())}\n"]
    lines += [verdict_rows(verdicts)] if verdicts.verdicts else []
    return "\n".join([*lines, f"Report: {folder / PAGE_FILE}", badge(verdicts)])


def _track(config: ReleaseConfig, folder: Path, label: str | None) -> InputError | None:
    """Log the release where the configuration says; what keeps it from that must not hide the gate's verdict."""
    if config.tracking is None:
        return None
    from phoneready.tracking.mlflow_log import log_release

    try:
        run = log_release(config.tracking, folder, label=label)
    except InputError as error:
        return error
    note(f"logged as run {run} of experiment {config.tracking.experiment}")
    return None
