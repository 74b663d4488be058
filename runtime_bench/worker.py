"""The fresh process that takes one measurement, or answers questions about texts: `python -m runtime_bench.worker`.

Reads one request as JSON from stdin and writes one result as JSON to what was stdout when it began. The engine's own
chatter goes to stderr. An expected failure is a result with `error` set; a crash leaves no result, and the parent reads
the reason from the exit status. The native runner and Chromium's worker read and answer the same.

Only the standard library and the engine are imported here, so that the peak memory is the engine's.
"""

from __future__ import annotations

import bisect
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from cfsp.errors import InputError, PhonereadyError
from runtime_bench.counters import (
    current_rss_bytes,
    evict_from_page_cache,
    major_faults,
    page_cache_share,
    peak_rss_bytes,
    waited_ns,
)
from runtime_bench.engines import (
    AnsweringSession,
    EngineFacts,
    Session,
    SessionSettings,
    Vocabulary,
    engine_spec,
    files_of,
)
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
    """What one process measured. None: not known or not reached. Lists have an entry a sample; empty: nothing tells."""

    samples_ns: list[int] = field(default_factory=list)  # Wall time
    load_ns: int | None = None  # Wall time of opening the file
    page_cache_share: float | None = None  # Share of the file in the page cache just before it was opened
    baseline_rss_bytes: int | None = None  # Resident memory with the engine imported and nothing opened
    peak_rss_bytes: int | None = None  # Most resident memory of the whole process
    facts: EngineFacts | None = None
    error: str | None = None  # Why it failed, one line; None if it did not
    memory_verdict: str | None = None  # Under a memory limit: fits, thrashes or does not fit
    reread_bytes: int | None = None  # Pages of files that were dropped for the limit and read again
    throttling: Throttling | None = None  # How a page was slowed down
    cpu_ns: list[int] = field(default_factory=list)  # Processor time of all threads
    waited_ns: list[int] = field(default_factory=list)  # How long all threads waited for a core
    contention: Contention | None = None  # What else used the machine's cores meanwhile
    # How long the thread that decodes neither computed nor waited, be it for a core or for another thread that waited
    # for one: something kept it from running. None if pages were read from the disk, and it waited for them.
    held_ns: list[int | None] = field(default_factory=list)
    # Begin and end, since the machine was started, by a clock that goes on while the machine sleeps
    spans_ns: list[tuple[int, int]] = field(default_factory=list)
    # From before the first sample to the end of the last one; None if the opening of the file was the sample
    lasted_ns: int | None = None
    conditions: Conditions | None = None  # What the machine went through meanwhile
    energy: ProcessEnergy | None = None  # What meters told of the samples


@dataclass(frozen=True)
class AnswerRequest:
    """What one process is to answer."""

    path: str
    engine: str  # Key of ENGINES
    session: SessionSettings  # How the file is opened
    questions: str  # File that `write_questions` wrote


@dataclass(frozen=True)
class Answer:
    """What one question was answered; the fields of the other kinds are empty."""

    log_likelihoods: tuple[float, ...] = ()  # ln p of each continuation, nats
    greedy: tuple[bool, ...] = ()  # Whether each token of a continuation is the likeliest
    written: tuple[tuple[int, ...], ...] = ()  # Continuations of prompts
    ids: tuple[int, ...] = ()  # Tokens of a text


@dataclass(frozen=True)
class AnswerResult:
    """What one process answered."""

    answers: tuple[Answer, ...] = ()  # One for each question, in their order
    facts: EngineFacts | None = None
    peak_rss_bytes: int | None = None  # Most resident memory of the whole process
    error: str | None = None  # Why there are no answers, one line


Question = Mapping[str, Any]
"""Of three kinds, known by their keys; tokens are ids, at least one each.

`context`, `continuations`: how likely is each continuation of the context?
`prompts`, `max_new_tokens`, `stop_strings`, `ends`: what comes after each prompt, greedily? A continuation ends with
the token that brings a stop string into its text, or before one of `ends` or of what the engine knows as an end.
`text`: which tokens is it to the engine's own tokenizer, begun as the model wants a sequence begun?
"""


class Sample(NamedTuple):
    """One sample; the fields are those of WorkerResult."""

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
    """Take the samples of a request in this process. Raises PhonereadyError: unknown engine, a file that does
    not open, or tokens that the engine refuses."""
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
        cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
        facts = session.facts
        return WorkerResult(
            samples_ns=whole,
            load_ns=load_ns,
            page_cache_share=share,
            baseline_rss_bytes=baseline,
            facts=replace(facts, settings=replace(facts.settings, cores=cores)),
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
    """The samples, with the time of opening the file if the workload times that, too."""
    return [load_ns + sum(samples_ns)] if request.workload.opens else list(samples_ns)


def prepare_page_cache(request: WorkerRequest) -> float | None:
    """Bring the files into the state that a request asks for; returns the share of the weights that is in memory."""
    files = files_of(Path(request.path))
    for file in files:
        if request.page_cache == "cold":
            evict_from_page_cache(file)
        elif request.page_cache == "warm":
            with file.open("rb") as stream:
                while stream.read(1 << 22):
                    pass
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
    """What a request's workload times; None if the opening of the file was the sample.

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

    def do(work: Work) -> None:
        if isinstance(work, str):
            session.decode(session.tokenize(work)[: request.workload.n_prompt])
            session.sample()
            return
        for piece in work:
            session.decode(piece)

    samples: list[Sample] = []
    if request.warmup:
        session.clear()
        do(warmup_of(work))
    depth = request.workload.n_depth
    began, passed = time.perf_counter_ns(), 0
    while len(samples) < request.samples or (passed < request.seconds * 1e9 and len(samples) < MOST_SAMPLES):
        session.clear()
        if depth:
            session.decode(random_tokens(session, request, depth))
        # What takes long to look up is looked up before the clocks and after them.
        waited_before, faults_before, before = waited_ns(), major_faults(), _clocks()
        do(work)
        after, waited_after, faults_after = _clocks(), waited_ns(), major_faults()
        wall, cpu, own = (now - then for then, now in zip(before[:3], after[:3], strict=True))
        waited, held = None, None
        if waited_before is not None and waited_after is not None:
            # Threads that have ended meanwhile take what they waited with them.
            waited = max(0, waited_after - waited_before)
            held = max(0, wall - own - waited) if faults_before == faults_after else None
        span = None if before[3] is None or after[3] is None else (before[3], after[3])
        samples.append(Sample(wall, cpu, waited, held, span))
        passed = time.perf_counter_ns() - began
    return samples, passed


def _clocks() -> tuple[int, int, int, int | None]:
    """Nanoseconds on the wall, of the processor for all threads and for this one, and since the machine was started."""
    boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else None
    return time.perf_counter_ns(), time.process_time_ns(), time.thread_time_ns(), boot


def random_tokens(session: Vocabulary, request: WorkerRequest, count: int) -> list[int]:
    """Tokens drawn by the request's seed, begun as the model wants a sequence begun."""
    rng = random.Random(request.seed)
    tokens = [rng.randrange(session.n_vocab) for _ in range(count)]
    if session.bos is not None:
        tokens[0] = session.bos
    return tokens


def text_of(session: Vocabulary, count: int) -> str:
    """English text of at least `count` tokens and hardly more: tokens beyond them would be timed, too."""
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


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write them to a file, one a line."""
    lines = (json.dumps(question, separators=(",", ":")) + "\n" for question in questions)
    path.write_text("".join(lines), encoding="utf-8")


def answer_all(payload: Mapping[str, Any]) -> AnswerResult:
    """Answer an AnswerRequest, as `asdict` made it, in this process. Raises PhonereadyError: unknown engine,
    a file that does not open, or tokens that the engine refuses."""
    request = AnswerRequest(**{**payload, "session": SessionSettings(**payload["session"])})
    spec = engine_spec(request.engine)
    spec.require()
    if not spec.answers:
        raise InputError(f"{request.engine} says nothing of probabilities", field="engine")
    session = cast(AnsweringSession, spec.adapter.open_session(Path(request.path), request.session))
    answers = []
    try:
        with Path(request.questions).open(encoding="utf-8") as lines:
            for asked in map(json.loads, lines):
                if "continuations" in asked:
                    scores = session.score(asked["context"], asked["continuations"])
                    likelihoods, greedy = zip(*scores, strict=True)
                    answers.append(Answer(log_likelihoods=likelihoods, greedy=greedy))
                elif "prompts" in asked:
                    answers.append(Answer(written=tuple(map(tuple, session.write(**asked)))))
                else:
                    answers.append(Answer(ids=tuple(session.tokenize(asked["text"]))))
        return AnswerResult(tuple(answers), session.facts, peak_rss_bytes())
    finally:
        session.close()


if __name__ == "__main__":
    serve(
        lambda asked: answer_all(asked) if "questions" in asked else measure(request_from_json(asked)),
        lambda reason: WorkerResult(peak_rss_bytes=peak_rss_bytes(), error=reason),
    )
