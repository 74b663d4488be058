"""`phoneready compare`: benchmark records of one model against those of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cfsp.errors import InputError, LimitError
from cfsp.settings import setting
from phoneready.commands.options import JsonOption
from phoneready.console import quiet_libraries, write_result
from runtime_bench.presentation.comparison_table import format_comparison, incomparable_text
from runtime_bench.presentation.table import short_names
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import (
    INCONCLUSIVE,
    TOO_NOISY,
    Compared,
    ComparisonSettings,
    Incomparable,
    by_model,
)
from runtime_bench.records.compare import compare as compare_models
from runtime_bench.records.jsonl import read_jsonl


def compare(
    base: Annotated[Path, typer.Argument(help="Records of the base, as `bench --record` writes them.")],
    settings: ComparisonSettings,
    new: Annotated[
        list[Path] | None,
        typer.Argument(help="Records held against it.", show_default="the other models in BASE"),
    ] = None,
    base_model: str | None = setting(
        None, "Which model of BASE is the base: its file's name or path.", metavar="NAME", shown="the first"
    ),
    output: str = setting(
        "md",
        "md, json or csv.",
        choices="runtime_bench.presentation.comparison_table:COMPARISON_FORMATS",
        option="-o --format",
    ),
    fail_on: tuple[str, ...] = setting(
        (),
        "Gate: exit 1 where a row has one of these verdicts: slower, inconclusive (too noisy to tell included), "
        "faster, no difference, too noisy to tell.",
        choices="runtime_bench.records.compare:VERDICTS",
        metavar="VERDICT,...",
    ),
    json: JsonOption = False,
) -> None:
    """Compare benchmark records: ratio of speeds with an interval, memory, size, and a verdict a row.

    Only what was measured alike is compared: numbers of one kind, on one target and processor, in one engine, with one
    workload and thread count. Rows that are not comparable are named with the reason; without any row that is, or with
    --fail-on, they are an error.
    """
    quiet_libraries()

    output = "json" if json else output
    files = {path: _read(path) for path in (base, *(new or ()))}
    anchors = [record for records in files.values() for record in records if record.is_anchor]
    first, others = _sides(files, base, new or [], base_model)
    rows = [row for other in others for row in compare_models(first, other, settings, anchors)]
    apart = [row for row in rows if isinstance(row, Incomparable)]
    if len(apart) == len(rows):
        telling = next((row for row in apart if row.base and row.new), apart[0])
        raise InputError(f"nothing is comparable: {incomparable_text(telling)}")
    write_result(format_comparison(rows, output), None, as_json=False)
    _check(rows, fail_on)


def _sides(
    files: Mapping[Path, list[BenchRecord]], base: Path, new: list[Path], base_model: str | None
) -> tuple[list[BenchRecord], list[list[BenchRecord]]]:
    """Records of the base, and of each model held against it.

    Raises:
        InputError: A file without records, no such model, or nothing to hold against the base.
    """

    models = by_model(_measured(files[base]))
    name = next(iter(models)) if base_model is None else _find(base_model, models, base)
    if base_model is None and new and len(models) > 1:
        raise InputError(f"{base} has {len(models)} models", field="--base-model", allowed=", ".join(models))
    first = models.pop(name)
    others = (
        [records for path in new for records in by_model(_measured(files[path])).values()]
        if new
        else [*models.values()]
    )
    if not others:
        raise InputError(f"{base} has one model; give records to hold against it", field="NEW")
    return first, others


def _measured(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """Records of the models themselves; anchors are no models of a comparison."""
    return [record for record in records if not record.is_anchor]


def _read(path: Path) -> list[BenchRecord]:

    records = read_jsonl(path)
    if not _measured(records):
        raise InputError(f"{path} holds no records of models")
    return records


def _find(name: str, models: dict[str, list[BenchRecord]], path: Path) -> str:
    files = [file for file in models if name in (file, Path(file).name, Path(file).stem)]
    if len(files) != 1:
        what = "several models" if files else "no model"
        raise InputError(
            f"{path} has {what} of that name", field="--base-model", value=name, allowed=", ".join(models)
        )
    return files[0]


def _check(rows: list[Compared], gate: tuple[str, ...]) -> None:
    """Hold the verdicts against the gate; what is not comparable was not held against anything.

    Raises:
        LimitError: Names every row with a verdict of the gate, and with a gate every one that has none.
    """

    gate = (*gate, TOO_NOISY) if INCONCLUSIVE in gate else gate
    names = short_names(row.new for row in rows if row.new)
    caught = []
    for row in rows if gate else ():
        if isinstance(row, Incomparable):
            caught.append(incomparable_text(row))
        elif row.verdict in gate:
            caught.append(f"{names[row.new]} {row.test} with {row.n_threads} threads is {row.verdict}")
    if caught:
        raise LimitError(f"{len(caught)} of {len(rows)} rows: {'; '.join(caught)}")
