"""One row of a session while it is measured, and the record that it becomes."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime_bench.engines import EngineFacts
from runtime_bench.files import files_of
from runtime_bench.measuring.text_check import TextCheck
from runtime_bench.records.bench_record import MEMORY_VERDICTS, BenchRecord, Environment
from runtime_bench.records.thermal import Heat
from runtime_bench.targets import Target
from runtime_bench.worker import WorkerResult
from runtime_bench.workload import BenchSettings, Workload

_NO_FACTS = EngineFacts(None, None, None, None, None, {}, None)


@dataclass(frozen=True)
class Session:
    """What all rows of one call share.

    Attributes:
        files: In the order in which they take turns.
        hashes: Of each.
        engines: Of each.
        checks: What each writes; None where that was not asked for.
        settings: What to measure.
        target: Where.
        id: Of the session.
    """

    files: tuple[Path, ...]
    hashes: tuple[str, ...]
    engines: tuple[str, ...]
    checks: tuple[TextCheck | None, ...]
    settings: BenchSettings
    target: Target
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Row:
    """Results of one file, workload and thread count, in the order taken."""

    results: list[WorkerResult] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    heat: list[Heat] = field(default_factory=list)
    started: str | None = None

    @property
    def failure(self) -> str | None:
        """Why a process failed, the first that did."""
        return next((r.error for r in self.results if r.error), None)

    @property
    def facts(self) -> EngineFacts:
        """What the engine said, the first time that it did."""
        return next((r.facts for r in self.results if r.facts), _NO_FACTS)

    @property
    def opened(self) -> list[WorkerResult]:
        """Results of the processes that opened the file."""
        return [r for r in self.results if r.load_ns]

    @property
    def samples_ns(self) -> list[int]:
        """All samples."""
        return [ns for result in self.results for ns in result.samples_ns]

    @property
    def cpu_ns(self) -> list[int]:
        """Processor time of all samples; empty unless every one has it."""
        found = [ns for result in self.results for ns in result.cpu_ns if ns > 0]
        return found if len(found) == len(self.samples_ns) else []

    @property
    def waited_ns(self) -> list[int]:
        """How long each sample waited for a core; empty unless every one tells."""
        found = [ns for result in self.results for ns in result.waited_ns]
        return found if len(found) == len(self.samples_ns) else []

    @property
    def memory_verdict(self) -> str | None:
        """The worst under a limit of memory."""
        verdicts = [r.memory_verdict for r in self.results if r.memory_verdict]
        return max(verdicts, key=MEMORY_VERDICTS.index, default=None)


def record_of(
    session: Session,
    index: int,
    workload: Workload,
    threads: int,
    row: Row,
    first: Row | None,
    environment: Environment,
) -> BenchRecord:
    """The record of one row.

    Args:
        session: What all rows share.
        index: Of the file.
        workload: What was timed.
        threads: Threads.
        row: What was measured.
        first: What was measured before, where the row was measured once more.
        environment: The machine before the first sample.
    """
    check = session.checks[index] or TextCheck()
    results, opened = row.results, row.opened
    return replace(
        _without_samples(session, index, workload, threads, row, environment),
        samples_ns=tuple(row.samples_ns),
        cpu_samples_ns=tuple(row.cpu_ns),
        waited_samples_ns=tuple(row.waited_ns),
        sequence=tuple(row.sequence),
        load_samples_ns=tuple(r.load_ns for r in opened if r.load_ns),
        page_cache_shares=tuple(r.page_cache_share for r in opened),
        baseline_rss_bytes=min((r.baseline_rss_bytes for r in opened if r.baseline_rss_bytes), default=None),
        peak_rss_samples_bytes=tuple(r.peak_rss_bytes for r in results if r.peak_rss_bytes),
        quarantined_ns=tuple(first.samples_ns) if first is not None and first is not row else (),
        memory_verdict=row.memory_verdict,
        reread_bytes=max((r.reread_bytes for r in results if r.reread_bytes is not None), default=None),
        throttling=next((r.throttling for r in results if r.throttling), None),
        contention=tuple(r.contention for r in results),
        clock_caps=tuple(heat.clock_cap for heat in row.heat),
        hottest_c=tuple(heat.hottest_c for heat in row.heat),
        text_sample=check.texts[0] if check.texts else None,
        degenerate=check.degenerate,
    )


def _without_samples(
    session: Session, index: int, workload: Workload, threads: int, row: Row, environment: Environment
) -> BenchRecord:
    """The record before its samples: what was measured, where and how."""
    settings, path, facts = session.settings, session.files[index], row.facts
    versions = environment.versions | facts.versions
    return BenchRecord(
        kind=session.target.kind,
        target=session.target.name,
        engine=session.engines[index],
        status="failed" if row.failure else "ok",
        failure=row.failure,
        session=session.id,
        workload=workload.kind,
        test=workload.test,
        model_filename=str(path),
        model_type=facts.model_type,
        model_size=facts.model_size,
        model_n_params=facts.model_n_params,
        file_size_bytes=sum(file.stat().st_size for file in files_of(path)),
        file_sha256=session.hashes[index],
        n_prompt=workload.n_prompt,
        n_gen=workload.n_gen,
        n_depth=workload.n_depth,
        n_batch=settings.n_batch,
        n_ubatch=settings.n_ubatch,
        n_threads=threads,
        backends=facts.backends,
        build_commit=facts.build_commit,
        cpu_info=environment.cpu_model,
        test_time=row.started,
        warmup=settings.warmup and workload.kind != "load",
        samples_per_process=shares(settings, workload)[0],
        environment=replace(environment, versions=versions, system_info=facts.system_info),
        page_cache=page_cache_wish(settings, workload),
        spread_limit=settings.spread_limit,
        memory_limit_bytes=session.target.memory_limit_bytes,
    )


def page_cache_wish(settings: BenchSettings, workload: Workload) -> str:
    """What is done to the page cache before a file is opened; see `WorkerRequest.page_cache`."""
    if workload.kind != "load":
        return "as_found"
    return "cold" if settings.cold_load else "warm"


def shares(settings: BenchSettings, workload: Workload) -> list[int]:
    """How many samples each round takes in its process; a process opens its file but once, so one load
    each."""
    most = 1 if workload.kind == "load" else settings.samples_per_process
    full, rest = divmod(settings.repetitions, most)
    return [most] * full + ([rest] if rest else [])
