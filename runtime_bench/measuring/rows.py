"""One row of a session while it is measured, and the record that it becomes."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from runtime_bench.engines import EngineFacts, SessionSettings
from runtime_bench.files import size_of
from runtime_bench.measuring.text_check import TextCheck
from runtime_bench.records import summary
from runtime_bench.records.bench_record import MEMORY_VERDICTS, BenchRecord, Environment
from runtime_bench.targets import Target
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import REGIMES, BenchSettings, Workload

T = TypeVar("T")


@dataclass(frozen=True)
class MeasuredFile:
    """A file that takes its turns."""

    path: Path
    sha256: str
    engine: str  # What it runs in
    check: TextCheck  # What it writes; empty where that was not asked for


@dataclass(frozen=True)
class Session:
    """What all rows of one call share."""

    files: tuple[MeasuredFile, ...]  # In the order in which they take turns
    settings: BenchSettings  # What to measure
    target: Target  # Where
    anchor: MeasuredFile | None = None  # Which of the files is the session's anchor
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # Of the session


@dataclass
class Row:
    """Results of one file, workload and thread count, in the order taken."""

    file: MeasuredFile
    request: WorkerRequest  # What each process is asked for, but for the number of its samples
    results: list[WorkerResult] = field(default_factory=list)  # Of the processes
    sequence: list[int] = field(default_factory=list)  # For each sample the number of its process
    started: str | None = None  # UTC time at which the first process began

    @property
    def failure(self) -> str | None:
        """Why a process failed, the first that did."""
        return next((r.error for r in self.results if r.error), None)

    @property
    def samples_ns(self) -> list[int]:
        """All samples."""
        return [ns for result in self.results for ns in result.samples_ns]

    @property
    def spread(self) -> float:
        """p90 / p50 of the samples; 1 where there are too few to tell."""
        return summary.spread(self.samples_ns) or 1.0

    def of_each_sample(self, found: Iterable[list[T]]) -> tuple[T, ...]:
        """Times beside the samples of all processes; empty unless every sample has one."""
        times = tuple(chain.from_iterable(found))
        return times if len(times) == len(self.samples_ns) else ()


def row_of(session: Session, file: MeasuredFile, workload: Workload, threads: int) -> Row:
    """A row of which nothing is measured yet."""
    settings, regime = session.settings, REGIMES[workload.regime]
    request = WorkerRequest(
        path=str(file.path),
        engine=file.engine,
        workload=workload,
        session=SessionSettings(
            workload.n_ctx,
            threads,
            settings.n_batch,
            settings.n_ubatch,
            settings.cache_type,
            settings.backend,
        ),
        warmup=settings.warmup and regime.warmup and not workload.opens,
        seconds=settings.sustained_s if regime.lasting else 0.0,
        seed=settings.seed,
        energy=settings.energy and workload.is_rate,
        page_cache=regime.page_cache or ("warm" if workload.opens else "as_found"),
    )
    return Row(file, request)


def record_of(session: Session, row: Row, first: Row, environment: Environment) -> BenchRecord:
    """The record of one row."""
    check, results = row.file.check, row.results
    return replace(
        _with_memory(_without_samples(session, row, environment), results),
        samples_ns=tuple(row.samples_ns),
        cpu_samples_ns=row.of_each_sample([ns for ns in r.cpu_ns if ns > 0] for r in results),
        waited_samples_ns=row.of_each_sample(r.waited_ns for r in results),
        held_samples_ns=row.of_each_sample(r.held_ns for r in results),
        sequence=tuple(row.sequence),
        quarantined_ns=() if first is row else tuple(first.samples_ns),
        throttling=next((r.throttling for r in results if r.throttling), None),
        contention=tuple(r.contention for r in results),
        conditions=tuple(r.conditions for r in results),
        energy=tuple(r.energy for r in results) if row.request.energy else (),
        text_sample=check.texts[0] if check.texts else None,
        degenerate=check.degenerate,
    )


def with_more(record: BenchRecord, more: BenchRecord, offset: int) -> BenchRecord:
    """A row with samples of rounds that followed its own."""

    def each(name: str, n: int, n_more: int) -> tuple[Any, ...]:
        """What is known of each sample or process; empty unless it is of all."""
        known, added = getattr(record, name), getattr(more, name)
        return (*known, *added) if (len(known), len(added)) == (n, n_more) else ()

    samples = (len(record.samples_ns), len(more.samples_ns))
    processes = (len(set(record.rounds)), len(set(more.rounds)))
    joined: dict[str, Any] = {name: each(name, *samples) for name in _OF_SAMPLES}
    joined |= {name: each(name, *processes) for name in _OF_PROCESSES}
    return replace(
        record, sequence=(*record.sequence, *(number + offset for number in more.sequence)), **joined
    )


_OF_SAMPLES = ("samples_ns", "cpu_samples_ns", "waited_samples_ns", "held_samples_ns")
_OF_PROCESSES = (
    *("load_samples_ns", "page_cache_shares", "peak_rss_samples_bytes", "contention", "conditions", "energy"),
)


def _with_memory(record: BenchRecord, results: Sequence[WorkerResult]) -> BenchRecord:
    """The record with what loading took, and the memory that was held."""
    opened = [result for result in results if result.load_ns]
    verdicts = [result.memory_verdict for result in results if result.memory_verdict]
    return replace(
        record,
        load_samples_ns=tuple(r.load_ns for r in opened if r.load_ns),
        page_cache_shares=tuple(r.page_cache_share for r in opened),
        baseline_rss_bytes=min((r.baseline_rss_bytes for r in opened if r.baseline_rss_bytes), default=None),
        peak_rss_samples_bytes=tuple(r.peak_rss_bytes for r in results if r.peak_rss_bytes),
        memory_verdict=max(verdicts, key=MEMORY_VERDICTS.index, default=None),
        reread_bytes=max((r.reread_bytes for r in results if r.reread_bytes is not None), default=None),
    )


def _without_samples(session: Session, row: Row, environment: Environment) -> BenchRecord:
    """The record before its samples: what was measured, where and how."""
    settings, request, workload = session.settings, row.request, row.request.workload
    facts = next((result.facts for result in row.results if result.facts), EngineFacts())
    return BenchRecord(
        kind=session.target.kind,
        target=session.target.name,
        engine=request.engine,
        status="failed" if row.failure else "ok",
        failure=row.failure,
        session=session.id,
        workload=workload.kind,
        test=workload.test,
        model_filename=request.path,
        model_type=facts.model_type,
        model_size=facts.model_size,
        model_n_params=facts.model_n_params,
        file_size_bytes=size_of(row.file.path),
        file_sha256=row.file.sha256,
        n_prompt=workload.n_prompt,
        n_gen=workload.n_gen,
        n_depth=workload.n_depth,
        regime=workload.regime,
        n_batch=request.session.n_batch,
        n_ubatch=request.session.n_ubatch,
        n_threads=request.session.n_threads,
        backends=facts.backends,
        build_commit=facts.build_commit,
        engine_settings=replace(facts.settings, asked_backend=settings.backend),
        cpu_info=environment.cpu_model,
        test_time=row.started,
        warmup=request.warmup,
        samples_per_process=max(shares(settings, workload)[0], *(len(r.samples_ns) for r in row.results), 1),
        sustained_s=request.seconds or None,
        anchor_sha256=session.anchor.sha256 if session.anchor else None,
        is_anchor=row.file is session.anchor,
        environment=replace(
            environment, versions=environment.versions | facts.versions, system_info=facts.system_info
        ),
        page_cache=request.page_cache,
        spread_limit=settings.spread_limit,
        memory_limit_bytes=session.target.memory_limit_bytes,
    )


def shares(settings: BenchSettings, workload: Workload) -> list[int]:
    """How many samples each round takes in its process; of what is not warm a process has one.

    Where a regime wants several of each process, the last one takes as many as the others, though that makes more than
    were asked for.
    """
    regime = REGIMES[workload.regime]
    if regime.lasting:
        return [1]
    most = max(settings.samples_per_process, regime.least_samples)
    if workload.opens or not regime.warmup:
        most = 1
    portions = summary.portions(settings.repetitions, most)
    return portions if regime.least_samples == 1 else [most] * len(portions)
