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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cfsp.errors import InputError
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from runtime_bench.engines import SessionSettings
from runtime_bench.measuring.rows import Row, Session, page_cache_wish, record_of, shares
from runtime_bench.measuring.text_check import TextCheck, check_text
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.thermal import heat_around
from runtime_bench.targets import LOCAL, Target
from runtime_bench.worker import WorkerRequest
from runtime_bench.workload import BenchSettings, Workload, workloads_of

logger = logging.getLogger(__name__)


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
    session = Session(
        tuple(files), _hash_all(files), engines, _check_texts(files, settings), settings, target
    )
    counts = settings.threads(target.environment().cpus_usable)
    groups = [(threads, workload) for threads in counts for workload in workloads]
    processes = sum(len(shares(settings, workload)) for _, workload in groups)
    counter = _Counter(progress, processes * len(files))
    records = []
    for threads, workload in groups:
        for record in _measure_group(session, workload, threads, counter):
            records.append(record)
            if on_record is not None:
                on_record(record)
    return records


def _check_texts(files: Sequence[Path], settings: BenchSettings) -> tuple[TextCheck | None, ...]:
    """What each file writes, once a file; None where nobody asked."""
    if not settings.check_text:
        return (None,) * len(files)
    found = {path: check_text(path, settings.timeout_s) for path in dict.fromkeys(files)}
    for path, check in found.items():
        if check.problem:
            logger.warning("%s: its text could not be checked: %s", path.name, check.problem)
    return tuple(found[path] for path in files)


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
    session: Session, workload: Workload, threads: int, counter: _Counter
) -> list[BenchRecord]:
    """One workload on all files."""
    environment = session.target.environment()
    rows = _interleave(session, workload, threads, counter)
    first: list[Row] | None = None
    if any(_too_wide(row, session.settings) for row in rows):
        logger.info("%s: samples spread widely, measuring once more", workload.test)
        again = sum(row.failure is None for row in rows)
        counter.total += again * len(shares(session.settings, workload))
        first, rows = rows, _interleave(session, workload, threads, counter, skip=rows)
    return [
        record_of(session, index, workload, threads, row, first[index] if first else None, environment)
        for index, row in enumerate(rows)
    ]


def _interleave(
    session: Session,
    workload: Workload,
    threads: int,
    counter: _Counter,
    skip: Sequence[Row] = (),
) -> list[Row]:
    """A B A B; a file that failed is not tried again. Rows in `skip` that failed already are kept as they
    are."""
    rows = [row if row.failure else Row() for row in skip] or [Row() for _ in session.files]
    tried = [index for index, row in enumerate(rows) if row.failure is None]
    before = session.target.environment()
    for samples in shares(session.settings, workload):
        for index in tried:
            if rows[index].failure is None:
                _measure_once(session, index, workload, threads, samples, rows[index], counter.next_number())
                after = session.target.environment()
                rows[index].heat.append(heat_around(before, after))
                before = after
            counter.step()
    return rows


def _measure_once(
    session: Session,
    index: int,
    workload: Workload,
    threads: int,
    samples: int,
    row: Row,
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
        page_cache=page_cache_wish(settings, workload),
    )
    result = session.target.run(request, settings.timeout_s)
    row.results.append(result)
    row.sequence += [number] * len(result.samples_ns)
    if result.error:
        logger.warning("%s %s failed: %s", session.files[index].name, workload.test, result.error)


def _too_wide(row: Row, settings: BenchSettings) -> bool:
    width = summary.spread(row.samples_ns)
    return row.failure is None and width is not None and width > settings.spread_limit


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
