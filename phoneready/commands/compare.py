"""`phoneready compare`: benchmark records of one model against those of others."""

from __future__ import annotations

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
    files: dict[Path, list[BenchRecord]] = {}
    anchors: list[BenchRecord] = []
    for path in (base, *(new or ())):
        records = read_jsonl(path)
        anchors += [record for record in records if record.is_anchor]
        files[path] = [record for record in records if not record.is_anchor]
        if not files[path]:
            raise InputError(f"{path} holds no records of models")
    models = by_model(files[base])
    name = next(iter(models))
    if base_model is not None:
        named = [one for one in models if base_model in (one, Path(one).name, Path(one).stem)]
        if len(named) != 1:
            what = f"{base} has {'several models' if named else 'no model'} of that name"
            raise InputError(what, field="--base-model", value=base_model, allowed=", ".join(models))
        (name,) = named
    elif new and len(models) > 1:
        raise InputError(f"{base} has {len(models)} models", field="--base-model", allowed=", ".join(models))
    first = models.pop(name)
    others = [one for path in new for one in by_model(files[path]).values()] if new else [*models.values()]
    if not others:
        raise InputError(f"{base} has one model; give records to hold against it", field="NEW")
    rows = [row for other in others for row in compare_models(first, other, settings, anchors)]
    apart = [row for row in rows if isinstance(row, Incomparable)]
    if len(apart) == len(rows):
        telling = next((row for row in apart if row.base and row.new), apart[0])
        raise InputError(f"nothing is comparable: {incomparable_text(telling)}")
    write_result(format_comparison(rows, "json" if json else output), None, as_json=False)
    # What is not comparable was not held against anything.
    gate = (*fail_on, TOO_NOISY) if INCONCLUSIVE in fail_on else fail_on
    names = short_names(row.new for row in rows if row.new)
    caught = []
    for row in rows if gate else ():
        if isinstance(row, Incomparable):
            caught.append(incomparable_text(row))
        elif row.verdict in gate:
            caught.append(f"{names[row.new]} {row.test} with {row.n_threads} threads is {row.verdict}")
    if caught:
        raise LimitError(f"{len(caught)} of {len(rows)} rows: {'; '.join(caught)}")
