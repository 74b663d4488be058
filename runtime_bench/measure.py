"""Measure files against each other: interleaved, each sample's process fresh, nothing left out.

For each thread count and workload, round follows round and each round runs every file once (A B A B), each
time in a new process that opens the file, warms up, and takes `samples_per_process` samples. With the default
of one, each sample costs a start of Python, a load and a warm-up: for a file of some hundred megabytes about
as much time as the sample itself, and it makes loads and peaks of memory as many independent samples as there
are timings.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cfsp.errors import InputError
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from runtime_bench import summary
from runtime_bench.engines import EngineFacts, SessionSettings
from runtime_bench.files import files_of
from runtime_bench.record import BenchRecord, Environment
from runtime_bench.targets import LOCAL, VERDICTS, Target
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings, Workload, workloads_of

__all__ = ["run_bench"]

logger = logging.getLogger(__name__)

_NO_FACTS = EngineFacts(None, None, None, None, None, {}, None)


@dataclass(frozen=True)
class _Session:
    """What all rows of one call share."""

    files: tuple[Path, ...]
    hashes: tuple[str, ...]
    engines: tuple[str, ...]
    settings: BenchSettings
    target: Target
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class _Row:
    """Results of one file, workload and thread count, in the order taken."""

    results: list[WorkerResult] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    started: str | None = None

    @property
    def failure(self) -> str | None:
        return next((r.error for r in self.results if r.error), None)

    @property
    def samples_ns(self) -> list[int]:
        return [ns for result in self.results for ns in result.samples_ns]


def run_bench(
    files: Sequence[Path],
    settings: BenchSettings,
    progress: Progress = no_progress,
    *,
    engine: str | None = None,
    target: Target = LOCAL,
    on_record: Callable[[BenchRecord], None] | None = None,
) -> list[BenchRecord]:
    """Measure every workload on every file.

    A row whose samples spread too widely (p90 / p50 over `settings.spread_limit`) is set aside and measured
    once more, together with the same row of the other files, so that the comparison stays interleaved; its
    record says so.

    Args:
        files: Exported model files.
        settings: What to measure and how often.
        progress: Told after each process.
        engine: Name of an engine; each file's default one on the target unless given.
        target: Where to measure.
        on_record: Called with each record as soon as it is complete, so that an interrupted session loses
            little.

    Returns:
        One record for each thread count, workload and file, in this order. A row that could not be measured
        is there, with the reason.

    Raises:
        InputError: No file, a file that does not exist, an engine that cannot run there, or nothing to measure.
    """
    workloads = workloads_of(settings)
    _check_files(files)
    engines = tuple(engine or target.default_engine(path) for path in files)
    for name in engines:
        target.require(name)
    session = _Session(tuple(files), _hash_all(files), engines, settings, target)
    counts = settings.threads(target.environment().cpus_usable)
    groups = [(threads, workload) for threads in counts for workload in workloads]
    processes = sum(len(_shares(settings, workload)) for _, workload in groups)
    counter = _Counter(progress, processes * len(files))
    records = []
    for threads, workload in groups:
        for record in _measure_group(session, workload, threads, counter):
            records.append(record)
            if on_record is not None:
                on_record(record)
    return records


@dataclass
class _Counter:
    """Numbers the processes of a session and reports them."""

    progress: Progress
    total: int
    sequence: int = 0
    done: int = 0

    def next_number(self) -> int:
        self.sequence += 1
        return self.sequence - 1

    def step(self) -> None:
        self.done += 1
        self.progress("measuring", self.done, self.total)


def _measure_group(
    session: _Session, workload: Workload, threads: int, counter: _Counter
) -> list[BenchRecord]:
    """One workload on all files."""
    environment = session.target.environment()
    rows = _interleave(session, workload, threads, counter)
    first: list[_Row] | None = None
    if any(_too_wide(row, session.settings) for row in rows):
        logger.info("%s: samples spread widely, measuring once more", workload.test)
        again = sum(row.failure is None for row in rows)
        counter.total += again * len(_shares(session.settings, workload))
        first, rows = rows, _interleave(session, workload, threads, counter, skip=rows)
    return [
        _record(session, index, workload, threads, row, first[index] if first else None, environment)
        for index, row in enumerate(rows)
    ]


def _interleave(
    session: _Session,
    workload: Workload,
    threads: int,
    counter: _Counter,
    skip: Sequence[_Row] = (),
) -> list[_Row]:
    """A B A B; a file that failed is not tried again. Rows in `skip` that failed already are kept as they
    are."""
    rows = [row if row.failure else _Row() for row in skip] or [_Row() for _ in session.files]
    tried = [index for index, row in enumerate(rows) if row.failure is None]
    for samples in _shares(session.settings, workload):
        for index in tried:
            if rows[index].failure is None:
                _measure_once(session, index, workload, threads, samples, rows[index], counter.next_number())
            counter.step()
    return rows


def _measure_once(
    session: _Session,
    index: int,
    workload: Workload,
    threads: int,
    samples: int,
    row: _Row,
    number: int,
) -> None:
    settings = session.settings
    if settings.delay_s:
        time.sleep(settings.delay_s)
    row.started = row.started or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    request = WorkerRequest(
        path=str(session.files[index]),
        engine=session.engines[index],
        workload=workload,
        session=SessionSettings(workload.n_ctx, threads, settings.n_batch, settings.n_ubatch),
        samples=samples,
        warmup=settings.warmup,
        seed=settings.seed,
        page_cache=_page_cache(settings, workload),
    )
    result = session.target.run(request, settings.timeout_s)
    row.results.append(result)
    row.sequence += [number] * len(result.samples_ns)
    if result.error:
        logger.warning("%s %s failed: %s", session.files[index].name, workload.test, result.error)


def _record(
    session: _Session,
    index: int,
    workload: Workload,
    threads: int,
    row: _Row,
    first: _Row | None,
    environment: Environment,
) -> BenchRecord:
    settings, path = session.settings, session.files[index]
    facts = next((r.facts for r in row.results if r.facts), _NO_FACTS)
    versions = environment.versions | facts.versions
    opened = [r for r in row.results if r.load_ns]
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
        samples_per_process=_shares(settings, workload)[0],
        environment=replace(environment, versions=versions, system_info=facts.system_info),
        samples_ns=tuple(row.samples_ns),
        sequence=tuple(row.sequence),
        load_samples_ns=tuple(r.load_ns for r in opened if r.load_ns),
        page_cache=_page_cache(settings, workload),
        page_cache_shares=tuple(r.page_cache_share for r in opened),
        baseline_rss_bytes=min((r.baseline_rss_bytes for r in opened if r.baseline_rss_bytes), default=None),
        peak_rss_samples_bytes=tuple(r.peak_rss_bytes for r in row.results if r.peak_rss_bytes),
        quarantined_ns=tuple(first.samples_ns) if first is not None and first is not row else (),
        spread_limit=settings.spread_limit,
        memory_limit_bytes=session.target.memory_limit_bytes,
        memory_verdict=max(
            (r.memory_verdict for r in row.results if r.memory_verdict), key=VERDICTS.index, default=None
        ),
        reread_bytes=max((r.reread_bytes for r in row.results if r.reread_bytes is not None), default=None),
    )


def _page_cache(settings: BenchSettings, workload: Workload) -> str:
    if workload.kind != "load":
        return "as_found"
    return "cold" if settings.cold_load else "warm"


def _too_wide(row: _Row, settings: BenchSettings) -> bool:
    width = summary.spread(row.samples_ns)
    return row.failure is None and width is not None and width > settings.spread_limit


def _shares(settings: BenchSettings, workload: Workload) -> list[int]:
    """How many samples each round takes in its process; a process opens its file but once, so one load
    each."""
    most = 1 if workload.kind == "load" else settings.samples_per_process
    full, rest = divmod(settings.repetitions, most)
    return [most] * full + ([rest] if rest else [])


def _check_files(files: Sequence[Path]) -> None:
    if not files:
        raise InputError("no file to measure", allowed="one or more exported model files")
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise InputError(f"no such file: {', '.join(missing)}")


def _hash_all(files: Sequence[Path]) -> tuple[str, ...]:
    try:
        known = {path: sha256_file(path) for path in dict.fromkeys(files)}
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    return tuple(known[path] for path in files)
