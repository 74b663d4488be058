"""Measure files against each other: interleaved, each sample's process fresh, nothing left out.

For each thread count and workload, round follows round and each round runs every file once (A B A B), each time in a
new process that opens the file, warms up and takes `samples_per_process` samples. The default of one costs a start of
Python, a load and a warm-up a sample, and gives as many independent loads and peaks of memory as timings.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from runtime_bench.engines import EngineFacts, SessionSettings, check_cache, size_of
from runtime_bench.measuring.text_check import TextCheck, check_text
from runtime_bench.records import summary
from runtime_bench.records.bench_record import MEMORY_VERDICTS, BenchRecord, Environment
from runtime_bench.records.fairness import CAP_LIMIT
from runtime_bench.records.reported import Conditions
from runtime_bench.targets import LOCAL, Target
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import REGIMES, BenchSettings, Workload, workloads_of

logger = logging.getLogger(__name__)
NOMINAL_C = 45.0
"""Above this a thermal zone is not nominal."""
_POLL_S = 2.0


@dataclass
class Row:
    """One file, workload and thread count while it is measured, in the order taken."""

    request: WorkerRequest  # To each process, but for the number of its samples
    sha256: str
    check: TextCheck
    results: list[WorkerResult] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)  # For each sample the number of its process
    started: str | None = None  # UTC time at which the first process began

    @property
    def failure(self) -> str | None:
        """Why a process failed, the first that did."""
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
    anchor: Path | None = None,
    on_record: Callable[[BenchRecord], None] = lambda record: None,
    done: Sequence[BenchRecord] = (),
) -> list[BenchRecord]:
    """Measure every workload on every file.

    A row whose samples spread too widely (p90 / p50 over `settings.spread_limit`) is set aside and measured once more,
    together with the same row of the other files; its record says so.

    Args:
        files: Exported model files.
        settings: What to measure and how often.
        progress: Told after each process.
        engine: Key of ENGINES; each file's default one on the target unless given.
        target: Where to measure.
        anchor: A file that takes turns with the others, by which other sessions can be compared with this one.
        on_record: Called with each record as soon as it is complete.
        done: Rows measured before on this target. Rows that all files have are not measured again; if one fails now,
            the earlier one stands.

    Returns:
        One record for each thread count, workload and file, in this order, the anchor last. Rows that could not be
        measured have the reason.

    Raises:
        InputError: No file, a file that does not exist, an anchor that is one of the files, an engine that cannot run
            there, or nothing to measure.
    """
    workloads = workloads_of(settings)
    engines = _check(files, settings, target, engine, anchor)
    paths = [*files, *([anchor] if anchor else [])]
    seen = [look_at(path, settings) for path in paths]
    session, machine = uuid.uuid4().hex, target.environment()
    known = {
        (one.n_threads, one.timed, one.model_filename, one.file_sha256): one
        for one in done
        if machine.cpu_model in (None, one.cpu_info)  # a machine that is away may be the one that it was
    }
    cores = machine.cpus_usable or max((one.n_threads for one in done), default=None)
    groups = [(threads, workload) for threads in settings.threads(cores) for workload in workloads]
    before = {
        group: [known.get((*group, str(path), sha256)) for path, (sha256, _) in zip(paths, seen, strict=True)]
        for group in groups
    }
    total = sum(len(shares(settings, group[1])) for group in groups if None in before[group]) * len(paths)
    numbers, taken = itertools.count(), 0

    def interleave(rows: Sequence[Row]) -> None:
        """A B A B; a file that failed is not tried again."""
        nonlocal taken
        tried = [row for row in rows if row.failure is None]
        for samples in shares(settings, rows[0].request.workload):
            for row in tried:
                if row.failure is None:
                    _run_once(target, settings, row, samples, next(numbers))
                taken += 1
                progress("measuring", taken, total)

    records = []
    for threads, workload in groups:
        rows = before[threads, workload]
        if None in rows:
            environment, regime = target.environment(), REGIMES[workload.regime]
            session_settings = SessionSettings(
                workload.n_ctx,
                threads,
                settings.n_batch,
                settings.n_ubatch,
                settings.cache_type,
                settings.backend,
            )
            first = [
                Row(
                    WorkerRequest(
                        path=str(path),
                        engine=name,
                        workload=workload,
                        session=session_settings,
                        warmup=settings.warmup and regime.warmup and not workload.opens,
                        seconds=settings.sustained_s if regime.lasting else 0.0,
                        seed=settings.seed,
                        energy=settings.energy and workload.is_rate,
                        page_cache=regime.page_cache or ("warm" if workload.opens else "as_found"),
                    ),
                    *look,
                )
                for path, name, look in zip(paths, engines, seen, strict=True)
            ]
            interleave(first)
            last = first
            steady = not regime.lasting  # else the spread is what was asked for
            spreads = (summary.spread(row.samples_ns) or 1.0 for row in first if row.failure is None)
            if steady and any(spread > settings.spread_limit for spread in spreads):
                logger.info("%s: samples spread widely, measuring once more", workload.test)
                last = [row if row.failure else Row(row.request, row.sha256, row.check) for row in first]
                again = sum(row.failure is None for row in last)
                total += again * len(shares(settings, workload))
                interleave(last)
            anchor_sha256 = seen[-1][0] if anchor else None
            now = [
                _record_of(row, old, session, settings, target, environment, anchor_sha256, path is anchor)
                for path, row, old in zip(paths, last, first, strict=True)
            ]
            rows = [old if old and not new.ok else new for old, new in zip(rows, now, strict=True)]
        for record in filter(None, rows):
            records.append(record)
            on_record(record)
    return records


def run_matrix(
    files: Sequence[Path],
    settings: BenchSettings,
    targets: Sequence[Target],
    progress: Progress = no_progress,
    *,
    engine: str | None = None,
    anchor: Path | None = None,
    on_record: Callable[[BenchRecord], None] = lambda record: None,
) -> list[BenchRecord]:
    """`run_bench` on every target; what cannot be measured is a failed row, and the rest goes on.

    Other machines are measured at the same time, each in a thread that does little but wait. This machine's own targets
    follow one by one: nothing else is done here while it is measured. `on_record` is called from one thread at a time.

    Returns:
        The records of each target, in the order of the targets.

    Raises:
        InputError: As `run_bench` does, before anything is measured.
    """
    from runtime_bench.targets.remote import Remote

    for target in targets:
        _check(files, settings, target, engine, anchor)
    for path in [*files, *([anchor] if anchor else [])]:
        look_at(path, settings)  # in turn, before the threads want them
    lock = threading.Lock()

    def keep(record: BenchRecord) -> None:
        with lock:
            on_record(record)

    def measure(target: Target) -> list[BenchRecord]:
        def report(description: str, done: int, total: int) -> None:
            progress(description if len(targets) == 1 else f"{target.name} {description}", done, total)

        if isinstance(target, Remote):
            target.progress = report
        return run_bench(files, settings, report, engine=engine, target=target, anchor=anchor, on_record=keep)

    remotes = [target for target in targets if isinstance(target, Remote)]
    with ThreadPoolExecutor(max(1, len(remotes))) as pool:
        futures = {id(remote): pool.submit(measure, remote) for remote in remotes}
        try:
            by_target = {key: future.result() for key, future in futures.items()}
        except BaseException:  # Ctrl-C among them: what runs elsewhere is ended before anybody waits for it
            for remote in remotes:
                remote.stop()
            raise
    for target in targets:
        if id(target) not in by_target:
            by_target[id(target)] = measure(target)
    return [record for target in targets for record in by_target[id(target)]]


def _check(
    files: Sequence[Path], settings: BenchSettings, target: Target, engine: str | None, anchor: Path | None
) -> list[str]:
    """The engine of each file and of the anchor, if all can be measured there. Raises InputError: something
    that is asked for cannot be there, or a file is not there; PhonereadyError: an engine is not installed, or
    never runs there."""
    if not files:
        raise InputError("no file to measure", allowed="one or more exported model files")
    if anchor in files:
        raise InputError(
            "is measured already", field="--set anchor", value=str(anchor), allowed="another file"
        )
    paths = [*files, *([anchor] if anchor else [])]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise InputError(f"no such file: {', '.join(missing)}")
    engines = [engine or target.default_engine(path) for path in paths]
    for name in engines:
        target.require(name)
        check_cache(name, settings.cache_type)
    if settings.sustained_s and not target.lasts:
        raise InputError(
            f"{target.name} takes samples by number, not for a given time",
            field="--sustained",
            value=settings.sustained_s,
            allowed="another place",
        )
    return engines


def look_at(path: Path, settings: BenchSettings) -> tuple[str, TextCheck]:
    """SHA-256 of a file and, if it is asked for, what it writes; once as long as the file does not change.
    Raises InputError: it cannot be read."""
    try:
        status = path.stat()
        asked = (settings.timeout_s, settings.cache_type) if settings.check_text else None
        return _hash(path, status.st_size, status.st_mtime_ns), _write(
            path, status.st_size, status.st_mtime_ns, asked
        )
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error


@functools.lru_cache
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(path)


@functools.lru_cache
def _write(path: Path, size: int, mtime_ns: int, asked: tuple[float, str | None] | None) -> TextCheck:
    check = check_text(path, *asked) if asked else TextCheck()
    if check.problem:
        logger.warning("%s: its text could not be checked: %s", path.name, check.problem)
    return check


def shares(settings: BenchSettings, workload: Workload) -> list[int]:
    """How many samples each round takes in its process; of what is not warm a process has one.

    If a regime wants several of each process, the last one takes as many as the others, even if that makes more than
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


def _run_once(target: Target, settings: BenchSettings, row: Row, samples: int, number: int) -> None:
    """One process of a row; what keeps it from beginning as it should is its failure."""
    time.sleep(settings.delay_s)
    request, path = replace(row.request, samples=samples), Path(row.request.path)
    row.started = row.started or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    why = wait_nominal(target, settings.cooldown_timeout_s) if settings.cooldown_timeout_s else None
    result = WorkerResult(error=why) if why else target.run(request, settings.timeout_s + request.seconds)
    asked = request.session.cache_type
    if asked and result.facts and (found := result.facts.settings.cache_type) != asked:
        found = found or "one that it does not name"
        why = f"a cache of {asked} was asked for, and {request.engine} had {found}"
        result = WorkerResult(error=why)
    lasted = result.lasted_ns
    if not result.error and request.seconds and lasted is None:
        result = replace(result, error="what measures there takes samples by number, not for a given time")
    elif not result.error and request.seconds and lasted is not None and lasted < request.seconds * 1e9:
        number_taken = f"{len(result.samples_ns)} samples, which are all that a record holds"
        why = (
            f"{number_taken}, took {lasted / 1e9:.1f} of {request.seconds:g} s: more tokens make longer ones"
        )
        result = replace(result, error=why)
    row.results.append(result)
    row.sequence += [number] * len(result.samples_ns)
    if result.error:
        logger.warning("%s: %s %s failed: %s", target.name, path.name, request.workload.test, result.error)


def wait_nominal(target: Target, limit_s: float) -> str | None:
    """Wait until a target is nominal, `limit_s` at most; why it is not even then, None if it is."""
    deadline, is_told = time.monotonic() + limit_s, False
    while (why := not_nominal(target.conditions())) is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            return f"not nominal after {limit_s:g} s: {why}"
        if not is_told:
            logger.warning("%s: waiting until it is nominal: %s", target.name, why)
            is_told = True
        time.sleep(min(_POLL_S, left))
    return None


def not_nominal(conditions: Conditions) -> str | None:
    """What keeps a machine from being nominal by its last look; None if nothing does, or nothing tells."""

    def last(name: str) -> Any:
        return next((value for value in reversed(getattr(conditions, name)) if value is not None), None)

    cap, heat, status = map(last, ("caps", "hottest_c", "thermal_status"))
    found = []
    if cap is not None and cap < 1 - CAP_LIMIT:
        found.append(f"clocks are capped at {cap:.0%}")
    if heat is not None and heat > NOMINAL_C:
        found.append(f"a thermal zone has {heat:.1f} °C, above {NOMINAL_C:g}")
    if status:
        found.append(f"the system's thermal status is {status}")
    return ", ".join(found) or None


def _record_of(
    row: Row,
    first: Row,
    session: str,
    settings: BenchSettings,
    target: Target,
    environment: Environment,
    anchor_sha256: str | None,
    is_anchor: bool,
) -> BenchRecord:
    """The record of a row; `first` is what was set aside for it, or the row itself."""
    request, workload, results = row.request, row.request.workload, row.results
    facts = next((result.facts for result in results if result.facts), EngineFacts())
    opened = [result for result in results if result.load_ns]
    verdicts = [result.memory_verdict for result in results if result.memory_verdict]

    def of_each_sample(times: Iterable[list[Any]]) -> tuple[Any, ...]:
        """Times beside the samples of all processes; empty unless every sample has one."""
        found = tuple(chain.from_iterable(times))
        return found if len(found) == len(row.samples_ns) else ()

    return BenchRecord(
        kind=target.kind,
        target=target.name,
        engine=request.engine,
        status="failed" if row.failure else "ok",
        failure=row.failure,
        session=session,
        workload=workload.kind,
        test=workload.test,
        model_filename=request.path,
        model_type=facts.model_type,
        model_size=facts.model_size,
        model_n_params=facts.model_n_params,
        file_size_bytes=size_of(Path(request.path)),
        file_sha256=row.sha256,
        n_prompt=workload.n_prompt,
        n_gen=workload.n_gen,
        n_depth=workload.n_depth,
        regime=workload.regime,
        n_batch=request.session.n_batch,
        n_ubatch=request.session.n_ubatch,
        n_threads=request.session.n_threads,
        backends=facts.backends,
        engine_settings=replace(facts.settings, asked_backend=settings.backend),
        cpu_info=environment.cpu_model,
        test_time=row.started,
        warmup=request.warmup,
        samples_per_process=max(shares(settings, workload)[0], *(len(r.samples_ns) for r in results), 1),
        sustained_s=request.seconds or None,
        anchor_sha256=anchor_sha256,
        is_anchor=is_anchor,
        environment=replace(
            environment, versions=environment.versions | facts.versions, system_info=facts.system_info
        ),
        page_cache=request.page_cache,
        spread_limit=settings.spread_limit,
        memory_limit_bytes=target.memory_limit_bytes,
        samples_ns=tuple(row.samples_ns),
        cpu_samples_ns=of_each_sample([ns for ns in r.cpu_ns if ns > 0] for r in results),
        waited_samples_ns=of_each_sample(r.waited_ns for r in results),
        held_samples_ns=of_each_sample(r.held_ns for r in results),
        sequence=tuple(row.sequence),
        quarantined_ns=() if first is row else tuple(first.samples_ns),
        load_samples_ns=tuple(r.load_ns for r in opened if r.load_ns),
        page_cache_shares=tuple(r.page_cache_share for r in opened),
        baseline_rss_bytes=min((r.baseline_rss_bytes for r in opened if r.baseline_rss_bytes), default=None),
        peak_rss_samples_bytes=tuple(r.peak_rss_bytes for r in results if r.peak_rss_bytes),
        memory_verdict=max(verdicts, key=MEMORY_VERDICTS.index, default=None),
        reread_bytes=max((r.reread_bytes for r in results if r.reread_bytes is not None), default=None),
        throttling=next((r.throttling for r in results if r.throttling), None),
        contention=tuple(r.contention for r in results),
        conditions=tuple(r.conditions for r in results),
        energy=tuple(r.energy for r in results) if request.energy else (),
        text_sample=row.check.texts[0] if row.check.texts else None,
        degenerate=row.check.degenerate,
    )


_OF_SAMPLES = ("samples_ns", "cpu_samples_ns", "waited_samples_ns", "held_samples_ns")
_OF_PROCESSES = (
    *("load_samples_ns", "page_cache_shares", "peak_rss_samples_bytes", "contention", "conditions", "energy"),
)


def with_more(record: BenchRecord, more: BenchRecord, offset: int) -> BenchRecord:
    """A row with samples of rounds that followed its own."""
    samples = len(record.samples_ns), len(more.samples_ns)
    processes = len(set(record.rounds)), len(set(more.rounds))
    joined: dict[str, Any] = {"sequence": (*record.sequence, *(number + offset for number in more.sequence))}
    for name in (*_OF_SAMPLES, *_OF_PROCESSES):
        known, added = getattr(record, name), getattr(more, name)
        is_whole = (len(known), len(added)) == (samples if name in _OF_SAMPLES else processes)
        joined[name] = (*known, *added) if is_whole else ()  # empty unless it is known of all
    return replace(record, **joined)
