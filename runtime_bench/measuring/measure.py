"""Measure files against each other: interleaved, each sample's process fresh, nothing left out.

For each thread count and workload, round follows round and each round runs every file once (A B A B), each
time in a new process that opens the file, warms up, and takes `samples_per_process` samples. With the default
of one, each sample costs a start of Python, a load and a warm-up: for a file of some hundred megabytes about
as much time as the sample itself, and it makes loads and peaks of memory as many independent samples as there
are timings.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cfsp.errors import InputError, PhonereadyError
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from runtime_bench.engines import check_cache
from runtime_bench.measuring.nominal import wait_nominal
from runtime_bench.measuring.rows import MeasuredFile, Row, Session, record_of, row_of, shares
from runtime_bench.measuring.text_check import TextCheck, check_text
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.targets import LOCAL, Target
from runtime_bench.targets.transport import StoppedError
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import REGIMES, BenchSettings, Workload, workloads_of

logger = logging.getLogger(__name__)


def run_bench(
    files: Sequence[Path],
    settings: BenchSettings,
    progress: Progress = no_progress,
    *,
    engine: str | None = None,
    target: Target = LOCAL,
    anchor: Path | None = None,
    on_record: Callable[[BenchRecord], None] = lambda record: None,
    seen: Mapping[Path, SeenFile] | None = None,
    done: Sequence[BenchRecord] = (),
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
        anchor: A file that takes turns with the others, by which other sessions can be compared with this one.
        on_record: Called with each record as soon as it is complete, so that an interrupted session loses
            little.
        seen: What `look_at` saw of the files, where that was done before.
        done: Rows that were measured before on this target. Where all files have theirs, they are not measured again;
            where one fails now, the earlier one stands.

    Returns:
        One record for each thread count, workload and file, in this order, the anchor last. A row that could not be
        measured is there, with the reason.

    Raises:
        InputError: No file, a file that does not exist, an anchor that is one of the files, an engine that cannot run
            there, or nothing to measure.
    """
    workloads = workloads_of(settings)
    check_files(files, anchor)
    files = [*files, anchor] if anchor else files
    engines = engines_on(target, files, settings, engine)
    seen = look_at(files, settings) if seen is None else seen
    measured = tuple(
        MeasuredFile(path, seen[path].sha256, engine, seen[path].check)
        for path, engine in zip(files, engines, strict=True)
    )
    session = Session(measured, settings, target, measured[-1] if anchor else None)
    machine = target.environment()
    known = {
        (one.n_threads, one.timed, one.model_filename, one.file_sha256): one
        for one in done
        if machine.cpu_model in (None, one.cpu_info)  # a machine that is away may be the one that it was
    }
    cores = machine.cpus_usable or max((one.n_threads for one in done), default=None)
    groups = [(threads, workload) for threads in settings.threads(cores) for workload in workloads]
    before = {
        group: [known.get((*group, str(file.path), file.sha256)) for file in measured] for group in groups
    }
    processes = sum(len(shares(settings, group[1])) for group in groups if None in before[group])
    counter = _Counter(progress, processes * len(files))
    records = []
    for threads, workload in groups:
        rows = before[threads, workload]
        if None in rows:
            now = _measure_group(session, workload, threads, counter)
            rows = [old if old and not new.ok else new for old, new in zip(rows, now, strict=True)]
        for record in filter(None, rows):
            records.append(record)
            on_record(record)
    return records


@dataclass(frozen=True)
class SeenFile:
    """What is seen of a file on this machine, wherever it is measured."""

    sha256: str
    check: TextCheck  # What it writes; empty where that was not asked for


def look_at(files: Sequence[Path], settings: BenchSettings) -> dict[Path, SeenFile]:
    """Hash each file and, where that is asked for, let it write.

    Raises:
        InputError: A file cannot be read.
    """
    try:
        return {path: SeenFile(sha256_file(path), _check_text(path, settings)) for path in files}
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error


def _check_text(path: Path, settings: BenchSettings) -> TextCheck:
    check = check_text(path, settings.timeout_s, settings.cache_type) if settings.check_text else TextCheck()
    if check.problem:
        logger.warning("%s: its text could not be checked: %s", path.name, check.problem)
    return check


@dataclass
class _Counter:
    """Numbers the processes of a session and reports them."""

    progress: Progress
    total: int
    numbers: Iterator[int] = field(default_factory=itertools.count)
    done: int = 0

    def step(self) -> None:
        self.done += 1
        self.progress("measuring", self.done, self.total)


def _measure_group(
    session: Session, workload: Workload, threads: int, counter: _Counter
) -> list[BenchRecord]:
    environment = session.target.environment()
    rows = first = [row_of(session, file, workload, threads) for file in session.files]
    _interleave(session, rows, counter)
    steady = not REGIMES[workload.regime].lasting  # else the spread is what was asked for
    if steady and any(row.failure is None and row.spread > session.settings.spread_limit for row in rows):
        logger.info("%s: samples spread widely, measuring once more", workload.test)
        rows = [row if row.failure else Row(row.file, row.request) for row in first]
        again = sum(row.failure is None for row in rows)
        counter.total += again * len(shares(session.settings, workload))
        _interleave(session, rows, counter)
    return [record_of(session, row, before, environment) for row, before in zip(rows, first, strict=True)]


def _interleave(session: Session, rows: Sequence[Row], counter: _Counter) -> None:
    """A B A B; a file that failed is not tried again."""
    tried = [row for row in rows if row.failure is None]
    for samples in shares(session.settings, rows[0].request.workload):
        for row in tried:
            if row.failure is None:
                _measure_once(session, row, samples, next(counter.numbers))
            counter.step()


def _measure_once(session: Session, row: Row, samples: int, number: int) -> None:
    if session.settings.delay_s:
        time.sleep(session.settings.delay_s)
    why = _not_ready(session, row)
    row.started = row.started or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if why is None:
        request = replace(row.request, samples=samples)
        timeout_s = session.settings.timeout_s + request.seconds
        result = _for_so_long(request, _as_asked(request, session.target.run(request, timeout_s)))
    else:
        result = WorkerResult(error=why)
    row.results.append(result)
    row.sequence += [number] * len(result.samples_ns)
    if result.error:
        what = row.file.path.name, row.request.workload.test
        logger.warning("%s: %s %s failed: %s", session.target.name, *what, result.error)


def _not_ready(session: Session, row: Row) -> str | None:
    """Why a process of a row cannot begin as it should; None where it can."""
    try:
        if REGIMES[row.request.workload.regime].pushed:
            session.target.forget(row.file.path)
    except StoppedError:
        raise
    except PhonereadyError as error:
        return f"no first run: {error}"
    return wait_nominal(session.target, session.settings) if session.settings.wait_nominal_s else None


def _as_asked(request: WorkerRequest, result: WorkerResult) -> WorkerResult:
    """The result; a failure where an engine did not heed the type of cache that it was asked for."""
    asked = request.session.cache_type
    if asked is None or result.facts is None or result.facts.settings.cache_type == asked:
        return result
    found = result.facts.settings.cache_type or "one that it does not name"
    return WorkerResult(error=f"a cache of {asked} was asked for, and {request.engine} had {found}")


def _for_so_long(request: WorkerRequest, result: WorkerResult) -> WorkerResult:
    """The result; a failure where samples were to be taken for a time and were not."""
    if result.error or not request.seconds:
        return result
    if result.lasted_ns is None:
        return replace(result, error="what measures there takes samples by number, not for a given time")
    if result.lasted_ns < request.seconds * 1e9:
        taken = f"{len(result.samples_ns)} samples, which are all that a record holds"
        why = f"{taken}, took {result.lasted_ns / 1e9:.1f} of {request.seconds:g} s: more tokens make longer ones"
        return replace(result, error=why)
    return result


def engines_on(
    target: Target, files: Sequence[Path], settings: BenchSettings, engine: str | None = None
) -> tuple[str, ...]:
    """The engine of each file on a target, checked before anything is measured.

    Raises:
        InputError: Something that is asked for cannot be there.
        PhonereadyError: An engine is not installed, or never runs there.
    """
    engines = tuple(engine or target.default_engine(path) for path in files)
    for name in engines:
        target.require(name)
        check_cache(name, settings.cache_type)
    _check_target(settings, target)
    return engines


def _check_target(settings: BenchSettings, target: Target) -> None:
    """Refuse what a target cannot do; one of an earlier version may lack what `Target` has got since.

    Raises:
        InputError: A regime that wants files pushed, a time that samples are taken for, or a wait until it is nominal.
    """
    if settings.sustained_s and not getattr(target, "lasts", True):
        raise InputError(
            f"{target.name} takes samples by number, not for a given time",
            field="--sustained",
            value=settings.sustained_s,
            allowed="another place",
        )
    if settings.wait_nominal_s and not hasattr(target, "conditions"):
        raise InputError(
            f"nobody can look at {target.name}",
            field="--wait-nominal",
            value=settings.wait_nominal_s,
            allowed="a target with `conditions`",
        )
    pushed = [name for name in settings.regimes if REGIMES[name].pushed]
    if pushed and not getattr(target, "pushes", False):
        raise InputError(
            f"no file is pushed to {target.name}",
            field="--regime",
            value=pushed[0],
            allowed="--on ssh:HOST, --on adb:SERIAL",
        )


def check_files(files: Sequence[Path], anchor: Path | None) -> None:
    """Raise InputError for no file, one that does not exist, or an anchor that is one of the files."""
    if anchor in files:
        raise InputError("is measured already", field="--anchor", value=str(anchor), allowed="another file")
    if not files:
        raise InputError("no file to measure", allowed="one or more exported model files")
    missing = [str(path) for path in (*files, anchor) if path and not path.is_file()]
    if missing:
        raise InputError(f"no such file: {', '.join(missing)}")
