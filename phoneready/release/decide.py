"""More rounds if the samples leave a budget on a speed open, until it is decided or the time is over.

Looking again until something is decided errs more often than looking once. So there are LOOKS at most, each after twice
the rounds of the one before, and each is surer in proportion (Bonferroni). `benchmarks/measuring_on.py` simulates it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cfsp.errors import PhonereadyError
from cfsp.progress import Progress
from phoneready.figures.figures import DENSE, INCONCLUSIVE, PRUNED, FigureSet, select
from phoneready.figures.gate import differing, judge
from phoneready.release.results import benchmark_figures
from phoneready.release.stages import stage_folder
from phoneready.release.steps import BENCH_FILE, Steps, bench_named, bench_stage
from runtime_bench.measuring.measure import with_more
from runtime_bench.records.bench_record import BenchRecord, MeasuredOn
from runtime_bench.records.fairness import has_speed
from runtime_bench.records.jsonl import append_jsonl, read_jsonl
from runtime_bench.targets import Target
from runtime_bench.targets.table import open_target

logger = logging.getLogger(__name__)
LOOKS = 5
"""The first at the samples that the configuration asks for; sixteen times as many are the most."""
_Turns = tuple[int, ...]
"""Places in the records of rows that take turns."""


def measure_on(
    steps: Steps, place: str, baseline: FigureSet | None, output: Path, progress: Progress
) -> None:
    """Write the records of a place, with more rounds of those that a budget on speeds leaves open."""
    records = read_jsonl(stage_folder(steps.folder, bench_stage(place)) / BENCH_FILE)
    limit = steps.config.bench.decide_s
    for turns, _ in list(_limited(steps, place, baseline, records)):
        for row in turns:
            records[row] = replace(records[row], measured_on=MeasuredOn(LOOKS))
    began, failed = time.monotonic(), set[_Turns]()

    def left() -> float:
        return limit - (time.monotonic() - began)

    def told(description: str, done: int, total: int) -> None:
        progress("measuring on for open budgets, seconds", int(limit - max(left(), 0)), max(int(limit), 1))

    def still_open() -> list[_Turns]:
        found = _limited(steps, place, baseline, records)
        return [turns for turns in dict.fromkeys(t for t, is_open in found if is_open) if turns not in failed]

    try:
        target = open_target(place) if still_open() else None
    except PhonereadyError as error:
        logger.warning("%s: not measured on: %s", place, error)
        target = None
    for _ in range(LOOKS - 1 if target else 0):
        for turns in still_open():
            wanted = 2 * len(set(records[turns[0]].rounds))
            while len(set(records[turns[0]].rounds)) < wanted and left() > 0:
                assert target is not None
                if why := _one_round(steps, target, records, turns, told):
                    logger.warning("%s %s: not measured on: %s", place, records[turns[0]].test, why)
                    failed.add(turns)
                    break
    for row in {row for turns in still_open() for row in turns} if left() <= 0 else ():
        found = records[row].measured_on
        assert found is not None
        records[row] = replace(records[row], measured_on=replace(found, time_over=True))
    append_jsonl(output / BENCH_FILE, records)


def _limited(
    steps: Steps, place: str, baseline: FigureSet | None, records: Sequence[BenchRecord]
) -> Iterator[tuple[_Turns, bool]]:
    """Of each figure that a budget on speeds limits: the rows that take turns, whether more samples can decide it.

    Dense and pruned take turns, and beside an anchor all files do.
    """
    config, items = steps.config, {a.name: (a.role, a.item) for a in steps.artifacts()}
    figures = FigureSet("", None, 0, tuple(benchmark_figures(config, place, records, items)))
    ours = figures.by_key(PRUNED)
    references = {"dense": figures.by_key(DENSE), "baseline": baseline.by_key(PRUNED) if baseline else {}}
    for budget in config.speed_budgets(place):
        for key in select(budget, ours):
            turns = tuple(
                row
                for row, one in enumerate(records)
                if one.test == key.metric
                and key.n_threads in (None, one.n_threads)
                and (config.bench.anchor or items[one.model_filename][1] == key.item)
            )
            figure, reference = ours[key], references.get(budget.relative_to or "", {}).get(key)
            verdict = judge(budget, figure, reference)
            can_tell = (
                figure.value is not None
                and all(has_speed(records[row]) for row in turns)
                and (
                    budget.relative_to is None
                    or (
                        reference is not None and bool(reference.samples) and not differing(figure, reference)
                    )
                )
            )
            yield turns, verdict.outcome == INCONCLUSIVE and can_tell


def _one_round(
    steps: Steps, target: Target, records: list[BenchRecord], turns: _Turns, progress: Progress
) -> str | None:
    """Add a round's samples to the rows, none if something slowed one of them; why, if one failed."""
    began, bench, rows = time.monotonic(), steps.config.bench, [records[row] for row in turns]
    timed, threads = rows[0].timed, rows[0].n_threads
    sizes: dict[str, Any] = {"n_prompt": (), "n_gen": (), "ttft": (), "load": timed.kind == "load"}
    field = {"pp": "n_prompt", "tg": "n_gen", "ttft": "ttft"}.get(timed.kind)
    if field is not None:
        sizes[field] = (timed.n_gen if timed.kind == "tg" else timed.n_prompt,)
    settings = replace(
        bench.settings(steps.config.seed),
        n_threads=(threads,),
        repetitions=1 if timed.opens else bench.samples_per_process,
        check_text=False,
        spread_limit=1e9,  # every sample counts
        **sizes,
    )
    files = {a.name: a.path for a in steps.artifacts()} | {
        one.model_filename: Path(str(bench.anchor)) for one in rows if one.is_anchor
    }
    names = {str(files[one.model_filename]): one.model_filename for one in rows if not one.is_anchor}
    try:
        more = bench_named(names, bench, settings, target, progress)
        why = next((one.failure for one in more if not one.ok), None)
    except PhonereadyError as error:
        more, why = [], str(error)
    if why is not None:
        return why
    offset = 1 + max(number for one in rows for number in one.sequence)
    longer = [with_more(row, added, offset) for row, added in zip(rows, more, strict=True)]
    if not all(map(has_speed, longer)):
        logger.info("%s %s: something slowed a round, which does not count", target.name, timed.test)
        return None
    for place, row in zip(turns, longer, strict=True):
        found = row.measured_on or MeasuredOn(LOOKS)
        seconds = round(found.seconds + time.monotonic() - began, 3)
        records[place] = replace(row, measured_on=replace(found, seconds=seconds))
    return None
