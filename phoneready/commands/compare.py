"""`phoneready compare`: benchmark records of one model against those of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfsp.errors import InputError, LimitError
from cfsp.files import PAGE, refuse_existing
from phoneready.commands.options import DebugOption, JsonOption, SeedOption, split_names
from phoneready.console import note, quiet_libraries, write_result

if TYPE_CHECKING:
    from runtime_bench.records.compare import Comparison
    from runtime_bench.records.record import BenchRecord


def compare(
    base: Annotated[Path, typer.Argument(help="Records of the base, as `bench --record` writes them.")],
    new: Annotated[
        list[Path] | None,
        typer.Argument(help="Records held against it.", show_default="the other models in BASE"),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            help="Which model of BASE is the base: its file's name or path.",
            show_default="the first",
            metavar="NAME",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Relative change that counts as a difference.")
    ] = 0.03,
    confidence: Annotated[float, typer.Option("--confidence", help="Confidence of the interval.")] = 0.95,
    output: Annotated[str, typer.Option("--format", "-o", help="md, json or csv.")] = "md",
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            help="Gate: exit 1 where a row has one of these verdicts: slower, inconclusive, faster, no difference.",
            metavar="VERDICT,...",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Write size against speed against quality, one point a model, to this HTML file."
        ),
    ] = None,
    quality: Annotated[
        list[Path] | None,
        typer.Option(
            "--quality", help="Evaluation of a measured file, from `eval --save`; repeatable.", metavar="FILE"
        ),
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare benchmark records: ratio of speeds with an interval, memory, size, and a verdict a row.

    Only what was measured alike is compared: numbers of one kind, on one target and processor, in one engine, with one
    workload and thread count. A row without partner is an error.
    """
    quiet_libraries()
    from runtime_bench.presentation.comparison_table import COMPARISON_FORMATS, format_comparison
    from runtime_bench.records import compare as comparison

    output = "json" if json else output
    if output not in COMPARISON_FORMATS:
        raise InputError(
            "unknown format", field="--format", value=output, allowed=", ".join(COMPARISON_FORMATS)
        )
    gate = _verdicts(fail_on or [])
    if quality and plot is None:
        raise InputError("is for the plot", field="--quality", allowed="with --plot FILE.html")
    first, others = _sides(base, new or [], base_model)
    rows = [
        row
        for other in others
        for row in comparison.compare(first, other, threshold=threshold, confidence=confidence, seed=seed)
    ]
    if plot is not None:
        refuse_existing(plot, force=True, like=PAGE)
        _write_plot(plot, [first, *others], quality or [])
    write_result(format_comparison(rows, output), None, as_json=False)
    _check(rows, gate)


def _verdicts(names: list[str]) -> tuple[str, ...]:
    from runtime_bench.records.compare import VERDICTS

    gate = split_names(names)
    unknown = sorted(set(gate) - set(VERDICTS))
    if unknown:
        raise InputError("unknown verdict", field="--fail-on", value=unknown, allowed=", ".join(VERDICTS))
    return gate


def _sides(
    base: Path, new: list[Path], base_model: str | None
) -> tuple[list[BenchRecord], list[list[BenchRecord]]]:
    """Records of the base, and of each model held against it.

    Raises:
        InputError: A file without records, no such model, or nothing to hold against the base.
    """
    from runtime_bench.records.compare import by_model

    models = by_model(_read(base))
    name = next(iter(models)) if base_model is None else _find(base_model, models, base)
    if base_model is None and new and len(models) > 1:
        raise InputError(f"{base} has {len(models)} models", field="--base-model", allowed=", ".join(models))
    first = models.pop(name)
    others = (
        [records for path in new for records in by_model(_read(path)).values()] if new else [*models.values()]
    )
    if not others:
        raise InputError(f"{base} has one model; give records to hold against it", field="NEW")
    return first, others


def _read(path: Path) -> list[BenchRecord]:
    from runtime_bench.records.jsonl import read_jsonl

    records = read_jsonl(path)
    if not records:
        raise InputError(f"{path} holds no records")
    return records


def _find(name: str, models: dict[str, list[BenchRecord]], path: Path) -> str:
    found = [file for file in models if name in (file, Path(file).name, Path(file).stem)]
    if len(found) != 1:
        what = "several models" if found else "no model"
        raise InputError(
            f"{path} has {what} of that name", field="--base-model", value=name, allowed=", ".join(models)
        )
    return found[0]


def _write_plot(path: Path, models: list[list[BenchRecord]], quality: list[Path]) -> None:
    from cfsp.files import write_text
    from cfsp.records import read_record
    from phoneready.evaluation.record import Evaluation
    from phoneready.report.comparison_page import render_comparison
    from phoneready.report.model_points import point_groups, quality_of

    found = quality_of([read_record(Evaluation, file) for file in quality])
    groups = point_groups([record for records in models for record in records], found)
    write_text(path, render_comparison(groups, found))
    note(f"{path}: size against speed against quality")


def _check(rows: list[Comparison], gate: tuple[str, ...]) -> None:
    """Hold the verdicts against the gate.

    Raises:
        LimitError: Names every row with a verdict of the gate.
    """
    from runtime_bench.presentation.table import short_names

    names = short_names(row.new for row in rows)
    caught = [
        f"{names[row.new]} {row.test} with {row.n_threads} threads is {row.verdict}"
        for row in rows
        if row.verdict in gate
    ]
    if caught:
        raise LimitError(f"{len(caught)} of {len(rows)} rows: {'; '.join(caught)}")
