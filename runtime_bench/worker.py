"""The fresh process in which one measurement is taken: `python -m runtime_bench.worker`.

Reads one request as JSON from stdin and writes one result as JSON to what was stdout when it began. The
engine's own chatter goes to stderr. An expected failure is a result with `error` set; a crash leaves no
result, and the parent reads the reason from the exit status.

Only the standard library and the engine are imported here, so that the peak memory is the engine's.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.errors import PhonereadyError
from runtime_bench.engines import (
    EngineFacts,
    Session,
    SessionSettings,
    Vocabulary,
    open_session,
    prepare_engine,
)
from runtime_bench.files import files_of
from runtime_bench.memory import current_rss_bytes, evict_from_page_cache, page_cache_share, peak_rss_bytes
from runtime_bench.records.contention import Contention, waited_ns
from runtime_bench.records.throttling import Throttling
from runtime_bench.workload import Workload


@dataclass(frozen=True)
class WorkerRequest:
    """What one process is to measure.

    Attributes:
        path: The file.
        engine: Key of ENGINES.
        workload: What is timed.
        session: How the file is opened.
        samples: Number of samples.
        warmup: Run the workload once, unrecorded, first.
        seed: Of the random tokens.
        page_cache: `warm` reads the file once first, `cold` asks the system to forget it, `as_found` does
            neither.
    """

    path: str
    engine: str
    workload: Workload
    session: SessionSettings
    samples: int = 1
    warmup: bool = True
    seed: int = 0
    page_cache: str = "as_found"


@dataclass(frozen=True)
class WorkerResult:
    """What one process measured. None is: not known, or not reached.

    Attributes:
        samples_ns: Wall time of each sample, nanoseconds.
        load_ns: Wall time of opening the file.
        page_cache_share: Share of the file in the page cache just before it was opened.
        baseline_rss_bytes: Resident memory with the engine imported and nothing opened.
        peak_rss_bytes: Most resident memory of the whole process.
        facts: The engine's facts.
        error: Why it failed, one line; None when it did not.
        memory_verdict: Under a memory limit: fits, thrashes or does not fit.
        reread_bytes: Pages of files that were dropped for the limit and read again.
        throttling: How the processor was slowed down; None where it was not.
        cpu_ns: Processor time of all threads in each sample, nanoseconds; empty where nothing tells.
        waited_ns: How long all threads waited for a core in each sample, nanoseconds; empty where nothing tells.
        contention: What else used the machine's cores meanwhile.
    """

    samples_ns: list[int] = field(default_factory=list)
    load_ns: int | None = None
    page_cache_share: float | None = None
    baseline_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    facts: EngineFacts | None = None
    error: str | None = None
    memory_verdict: str | None = None
    reread_bytes: int | None = None
    throttling: Throttling | None = None
    cpu_ns: list[int] = field(default_factory=list)
    waited_ns: list[int] = field(default_factory=list)
    contention: Contention | None = None


@dataclass(frozen=True)
class _Sample:
    """One timing: by the clock on the wall, and in all threads of the processor and of waiting for it."""

    wall_ns: int
    cpu_ns: int
    waited_ns: int | None


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
    path = Path(request.path)
    prepare_engine(request.engine)
    files = files_of(path)
    prepare_page_cache(request.page_cache, files)
    # The weights are in the largest file.
    share = page_cache_share(max(files, key=lambda file: file.stat().st_size))
    baseline = current_rss_bytes()
    start = time.perf_counter_ns()
    session = open_session(request.engine, path, request.session)
    load_ns = time.perf_counter_ns() - start
    try:
        samples = _RUNNERS[request.workload.kind](session, request)
        facts = session.facts
        peak = peak_rss_bytes()
    finally:
        session.close()
    wall, cpu = [sample.wall_ns for sample in samples], [sample.cpu_ns for sample in samples]
    waited = [sample.waited_ns for sample in samples if sample.waited_ns is not None]
    return WorkerResult(
        wall or [load_ns], load_ns, share, baseline, peak, facts, cpu_ns=cpu, waited_ns=waited
    )


def prepare_page_cache(state: str, files: Sequence[Path]) -> None:
    """Bring files into the state that a request asks for; see `WorkerRequest.page_cache`."""
    for file in files:
        _PAGE_CACHE[state](file)


def main() -> None:
    """Serve one request."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as results:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        request = request_from_json(json.load(sys.stdin))
        try:
            result = measure(request)
        except (PhonereadyError, OSError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            result = WorkerResult(peak_rss_bytes=peak_rss_bytes(), error=reason)
        json.dump(asdict(result), results, allow_nan=False)


def _run_load(session: Session, request: WorkerRequest) -> list[_Sample]:
    """Nothing more to time: the opening was the sample."""
    return []


def _run_prompt(session: Session, request: WorkerRequest) -> list[_Sample]:
    """As llama-bench's pp: the whole prompt from an empty (or `n_depth` deep) context."""
    tokens = random_tokens(session, request, request.workload.n_prompt)
    return _timed(session, request, lambda: session.decode(tokens), lambda: session.decode(tokens))


def _run_generation(session: Session, request: WorkerRequest) -> list[_Sample]:
    """As llama-bench's tg: one token after another, drawn beforehand; sampling is not part of it."""
    tokens = [[token] for token in random_tokens(session, request, request.workload.n_gen)]

    def generate() -> None:
        for token in tokens:
            session.decode(token)

    return _timed(session, request, generate, lambda: session.decode(tokens[0]))


def _run_first_token(session: Session, request: WorkerRequest) -> list[_Sample]:
    """Tokenize a text, process its first n_prompt tokens, sample one."""
    count = request.workload.n_prompt
    text = text_of(session, count)

    def first_token() -> None:
        session.decode(session.tokenize(text)[:count])
        session.sample()

    return _timed(session, request, first_token, first_token)


_RUNNERS: MappingProxyType[str, Callable[[Session, WorkerRequest], list[_Sample]]] = MappingProxyType(
    {"load": _run_load, "pp": _run_prompt, "tg": _run_generation, "ttft": _run_first_token}
)


def _timed(
    session: Session, request: WorkerRequest, work: Callable[[], None], warmup: Callable[[], None]
) -> list[_Sample]:
    samples = []
    if request.warmup:
        session.clear()
        warmup()
    depth = request.workload.n_depth
    for _ in range(request.samples):
        session.clear()
        if depth:
            session.decode(random_tokens(session, request, depth))
        waited, start, cpu = waited_ns(), time.perf_counter_ns(), time.process_time_ns()
        work()
        wall, cpu = time.perf_counter_ns() - start, time.process_time_ns() - cpu
        samples.append(_Sample(wall, cpu, _waited_since(waited)))
    return samples


def _waited_since(before: int | None) -> int | None:
    """Threads that have ended meanwhile take what they waited with them."""
    now = waited_ns()
    return None if before is None or now is None else max(0, now - before)


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
    low, high = 1, count
    while len(session.tokenize(_first_words(words, high))) < count:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        enough = len(session.tokenize(_first_words(words, middle))) >= count
        low, high = (low, middle) if enough else (middle, high)
    return _first_words(words, high)


def _first_words(words: list[str], count: int) -> str:
    rounds = -(-count // len(words))
    return " ".join((words * rounds)[:count])


def _read_once(path: Path) -> None:
    with path.open("rb") as stream:
        while stream.read(1 << 22):
            pass


_PAGE_CACHE: MappingProxyType[str, Callable[[Path], None]] = MappingProxyType(
    {"as_found": lambda path: None, "warm": _read_once, "cold": evict_from_page_cache}
)


if __name__ == "__main__":
    main()
