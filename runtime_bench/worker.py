"""The fresh process in which one measurement is taken: `python -m runtime_bench.worker`.

Reads one request as JSON from stdin and writes one result as JSON to what was stdout when it began. The
engine's own chatter goes to stderr. An expected failure is a result with `error` set; a crash leaves no
result, and the parent reads the reason from the exit status.

Only the standard library and the engine are imported here, so that the peak memory is the engine's.
"""

from __future__ import annotations

import bisect
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.errors import PhonereadyError
from runtime_bench.counters import (
    current_rss_bytes,
    evict_from_page_cache,
    major_faults,
    page_cache_share,
    peak_rss_bytes,
    waited_ns,
)
from runtime_bench.engines import EngineFacts, Session, SessionSettings, Vocabulary, engine_spec
from runtime_bench.files import files_of
from runtime_bench.records.reported import Conditions, Contention, ProcessEnergy, Throttling
from runtime_bench.workload import Workload


@dataclass(frozen=True)
class WorkerRequest:
    """What one process is to measure."""

    path: str
    engine: str  # Key of ENGINES
    workload: Workload  # What is timed
    session: SessionSettings  # How the file is opened
    samples: int = 1  # Number of samples, at least
    warmup: bool = True  # Run the workload once, unrecorded, first
    seconds: float = 0.0  # Samples are taken until so much time has passed
    seed: int = 0  # Of the random tokens
    # `warm` reads the file once first, `cold` asks the system to forget it, `as_found` does neither
    page_cache: str = "as_found"
    energy: bool = False  # Read energy meters


@dataclass(frozen=True)
class WorkerResult:
    """What one process measured. None is: not known, or not reached."""

    samples_ns: list[int] = field(default_factory=list)  # Wall time of each sample, nanoseconds
    load_ns: int | None = None  # Wall time of opening the file
    page_cache_share: float | None = None  # Share of the file in the page cache just before it was opened
    baseline_rss_bytes: int | None = None  # Resident memory with the engine imported and nothing opened
    peak_rss_bytes: int | None = None  # Most resident memory of the whole process
    facts: EngineFacts | None = None  # The engine's facts
    error: str | None = None  # Why it failed, one line; None when it did not
    memory_verdict: str | None = None  # Under a memory limit: fits, thrashes or does not fit
    reread_bytes: int | None = None  # Pages of files that were dropped for the limit and read again
    throttling: Throttling | None = None  # How the processor was slowed down; None where it was not
    # Processor time of all threads in each sample, nanoseconds; empty where nothing tells
    cpu_ns: list[int] = field(default_factory=list)
    # How long all threads waited for a core in each sample, nanoseconds; empty where nothing tells
    waited_ns: list[int] = field(default_factory=list)
    contention: Contention | None = None  # What else used the machine's cores meanwhile
    # In each sample, how long the thread that decodes neither computed nor waited, be it for a core or for
    # another thread that waited for one: something kept it from running. None where pages were read from the
    # disk, and it waited for them; empty where nothing tells.
    held_ns: list[int | None] = field(default_factory=list)
    # When each sample began and ended, nanoseconds since the machine was started, by a clock that goes on
    # while the machine sleeps; empty where there is none
    spans_ns: list[tuple[int, int]] = field(default_factory=list)
    # How long samples were taken, from before the first one to the end of the last one; None where the
    # opening of the file was the sample
    lasted_ns: int | None = None
    conditions: Conditions | None = None  # What the machine went through meanwhile
    energy: ProcessEnergy | None = None  # What meters told of the samples; None where that was not asked for


@dataclass(frozen=True)
class Sample:
    """One sample, nanoseconds; the fields are those of WorkerResult."""

    wall_ns: int
    cpu_ns: int
    waited_ns: int | None
    held_ns: int | None
    span_ns: tuple[int, int] | None


MOST_SAMPLES = 10_000
"""What a record holds."""
Work = list[list[int]] | str
"""What is timed: pieces of tokens, decoded one by one, or a text whose first `n_prompt` tokens are processed and whose
next one is sampled."""


def request_from_json(payload: dict[str, Any]) -> WorkerRequest:
    """Rebuild a request from what `asdict` made of it."""
    nested = {
        "workload": Workload(**payload["workload"]),
        "session": SessionSettings(**payload["session"]),
    }
    return WorkerRequest(**(payload | nested))


def measure(request: WorkerRequest) -> WorkerResult:
    """Take the samples of a request in this process.

    Raises:
        PhonereadyError: Unknown engine, a file that does not open, or tokens that the engine refuses.
    """
    engine = engine_spec(request.engine)
    engine.require()
    adapter = engine.adapter
    adapter.prepare()
    share = prepare_page_cache(request)
    baseline = current_rss_bytes()
    start = time.perf_counter_ns()
    session = adapter.open_session(Path(request.path), request.session)
    load_ns = time.perf_counter_ns() - start
    try:
        work = work_of(session, request)
        samples, lasted_ns = ([], None) if work is None else _timed(session, request, work)
        whole = with_opening(request, load_ns, [one.wall_ns for one in samples])
        if request.workload.opens:
            # The clocks beside the wall's were not read while the file was opened.
            samples, lasted_ns = [], None
        return WorkerResult(
            samples_ns=whole,
            load_ns=load_ns,
            page_cache_share=share,
            baseline_rss_bytes=baseline,
            facts=_on_cores(session.facts),
            peak_rss_bytes=peak_rss_bytes(),
            cpu_ns=[one.cpu_ns for one in samples],
            waited_ns=[one.waited_ns for one in samples if one.waited_ns is not None],
            # Without what threads waited, null would say that they waited for the disk.
            held_ns=[one.held_ns for one in samples if one.waited_ns is not None],
            spans_ns=[one.span_ns for one in samples if one.span_ns is not None],
            lasted_ns=lasted_ns,
        )
    finally:
        session.close()


def with_opening(request: WorkerRequest, load_ns: int, samples_ns: Sequence[int]) -> list[int]:
    """The samples, with the time of opening the file where the workload times that, too."""
    if not request.workload.opens:
        return list(samples_ns)
    return [load_ns + sum(samples_ns)]


def _on_cores(facts: EngineFacts) -> EngineFacts:
    """The facts, with the cores that this process might use."""
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    return replace(facts, settings=replace(facts.settings, cores=cores))


def prepare_page_cache(request: WorkerRequest) -> float | None:
    """Bring the files into the state that a request asks for; returns the share of the weights that is in memory."""
    files = files_of(Path(request.path))
    for file in files:
        _PAGE_CACHE[request.page_cache](file)
    # The weights are in the largest file.
    return page_cache_share(max(files, key=lambda file: file.stat().st_size))


def serve(answer: Callable[[Any], Any], failed: Callable[[str], Any]) -> None:
    """Serve one request: read it as JSON from stdin, and write the answer as JSON to what was stdout."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as results:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        payload = json.load(sys.stdin)
        try:
            result = answer(payload)
        except (PhonereadyError, OSError, MemoryError) as error:
            result = failed(" ".join(str(error).split()) or type(error).__name__)
        json.dump(asdict(result), results, allow_nan=False)


def work_of(session: Vocabulary, request: WorkerRequest) -> Work | None:
    """What a request's workload times; None where the opening of the file was the sample.

    As llama-bench's, pp is the whole prompt at once from an empty (or `n_depth` deep) context, and tg one token after
    another, drawn beforehand: sampling is not part of it.
    """
    workload = request.workload
    if workload.kind == "load":
        return None
    if workload.kind in ("ttft", "start"):
        return text_of(session, workload.n_prompt)
    if workload.kind == "pp":
        return [random_tokens(session, request, workload.n_prompt)]
    return [[token] for token in random_tokens(session, request, workload.n_gen)]


def warmup_of(work: Work) -> Work:
    """As much of it as warms an engine up."""
    return work if isinstance(work, str) else work[:1]


def _timed(session: Session, request: WorkerRequest, work: Work) -> tuple[list[Sample], int]:
    """The samples, and for how long they were taken."""
    samples: list[Sample] = []
    if request.warmup:
        session.clear()
        _do(session, request, warmup_of(work))
    depth = request.workload.n_depth
    began, passed = time.perf_counter_ns(), 0
    while len(samples) < request.samples or (passed < request.seconds * 1e9 and len(samples) < MOST_SAMPLES):
        session.clear()
        if depth:
            session.decode(random_tokens(session, request, depth))
        samples.append(_sample(lambda: _do(session, request, work)))
        passed = time.perf_counter_ns() - began
    return samples, passed


@dataclass(frozen=True)
class _Times:
    """What clocks show, nanoseconds: on the wall, of the processor for all threads and for this one, and since the
    machine was started."""

    wall: int
    cpu: int
    own: int
    boot: int | None


def _times() -> _Times:
    boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else None
    return _Times(time.perf_counter_ns(), time.process_time_ns(), time.thread_time_ns(), boot)


def _sample(work: Callable[[], None]) -> Sample:
    """Do the work and time it; what takes long to look up is looked up before the clocks and after them."""
    waited_before, faults_before, before = waited_ns(), major_faults(), _times()
    work()
    after, waited_after, faults_after = _times(), waited_ns(), major_faults()
    wall, waited, held = after.wall - before.wall, None, None
    if waited_before is not None and waited_after is not None:
        # Threads that have ended meanwhile take what they waited with them.
        waited = max(0, waited_after - waited_before)
        if faults_before == faults_after:
            held = max(0, wall - (after.own - before.own) - waited)
    span = None if before.boot is None or after.boot is None else (before.boot, after.boot)
    return Sample(wall, after.cpu - before.cpu, waited, held, span)


def _do(session: Session, request: WorkerRequest, work: Work) -> None:
    if isinstance(work, str):
        session.decode(session.tokenize(work)[: request.workload.n_prompt])
        session.sample()
        return
    for piece in work:
        session.decode(piece)


def random_tokens(session: Vocabulary, request: WorkerRequest, count: int) -> list[int]:
    """Tokens drawn by the request's seed, begun as the model wants a sequence begun."""
    rng = random.Random(request.seed)
    tokens = [rng.randrange(session.n_vocab) for _ in range(count)]
    if session.bos is not None:
        tokens[0] = session.bos
    return tokens


def text_of(session: Vocabulary, count: int) -> str:
    """English text of at least `count` tokens and hardly more: what would be tokenized in vain is timed as
    well."""
    from pydoc_data.topics import topics

    words = " ".join(topics[key] for key in sorted(topics)).split(" ")

    def beginning(n_words: int) -> str:
        return " ".join(islice(cycle(words), n_words))

    def n_tokens(n_words: int) -> int:
        return len(session.tokenize(beginning(n_words)))

    most = count
    while n_tokens(most) < count:
        most *= 2
    return beginning(bisect.bisect_left(range(most), count, lo=1, key=n_tokens))


def _read_once(path: Path) -> None:
    with path.open("rb") as stream:
        while stream.read(1 << 22):
            pass


_PAGE_CACHE: MappingProxyType[str, Callable[[Path], None]] = MappingProxyType(
    {"as_found": lambda path: None, "warm": _read_once, "cold": evict_from_page_cache}
)


def _served(payload: dict[str, Any]) -> Any:
    """A measurement, or answers to questions."""
    if "questions" in payload:
        from runtime_bench.questions import answer_all

        return answer_all(payload)
    return measure(request_from_json(payload))


if __name__ == "__main__":
    serve(_served, lambda reason: WorkerResult(peak_rss_bytes=peak_rss_bytes(), error=reason))
