"""What an engine is asked about texts, for a judgement of what it runs: how likely they are, and what it writes.

Texts travel as token ids. Questions lie in a file, one a line; a process that opens the model once answers them all.
The native runner reads and answers the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from cfsp.errors import InputError
from runtime_bench.counters import peak_rss_bytes
from runtime_bench.engines import AnsweringSession, EngineFacts, SessionSettings, engine_spec


@dataclass(frozen=True)
class Scoring:
    """How likely are continuations of one context?"""

    context: tuple[int, ...]  # Token ids, at least one
    continuations: tuple[tuple[int, ...], ...]  # Token ids of each, at least one each


@dataclass(frozen=True)
class Writing:
    """What comes after prompts, greedily?"""

    prompts: tuple[tuple[int, ...], ...]  # Token ids, at least one each
    max_new_tokens: int  # Most tokens of a continuation
    # A continuation ends with the token that brings one of these into its text
    stop_strings: tuple[str, ...] = ()
    # Tokens that end a text, and are not part of it, beside those that the engine knows as such
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spelling:
    """Which tokens is a text to the engine's own tokenizer, begun as the model wants a sequence begun?"""

    text: str


Question = Scoring | Writing | Spelling


@dataclass(frozen=True)
class Answer:
    """What one question was answered; the fields of the other kinds are empty."""

    log_likelihoods: tuple[float, ...] = ()  # Of Scoring, ln p of each continuation, nats
    greedy: tuple[bool, ...] = ()  # Of Scoring, whether each token of a continuation is the likeliest
    written: tuple[tuple[int, ...], ...] = ()  # Of Writing, the continuations
    ids: tuple[int, ...] = ()  # Of Spelling, the tokens


@dataclass(frozen=True)
class AnswerRequest:
    """What one process is to answer."""

    path: str
    engine: str  # Key of ENGINES
    session: SessionSettings  # How the file is opened
    questions: str  # File that `write_questions` wrote


@dataclass(frozen=True)
class AnswerResult:
    """What one process answered."""

    answers: tuple[Answer, ...] = ()  # One for each question, in their order
    facts: EngineFacts | None = None  # What the engine says about itself; None where there are no answers
    peak_rss_bytes: int | None = None  # Most resident memory of the whole process
    error: str | None = None  # Why there are none, one line; None where there are


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write them to a file, one a line."""
    lines = (json.dumps(asdict(question), separators=(",", ":")) + "\n" for question in questions)
    path.write_text("".join(lines), encoding="utf-8")


def answer_all(payload: Mapping[str, Any]) -> AnswerResult:
    """Answer a request, as `asdict` made it, in this process.

    Raises:
        PhonereadyError: Unknown engine, a file that does not open, or tokens that the engine refuses.
    """
    request = AnswerRequest(**{**payload, "session": SessionSettings(**payload["session"])})
    spec = engine_spec(request.engine)
    spec.require()
    if not spec.answers:
        raise InputError(f"{request.engine} says nothing of probabilities", field="engine")
    session = cast(AnsweringSession, spec.adapter.open_session(Path(request.path), request.session))
    try:
        with Path(request.questions).open(encoding="utf-8") as lines:
            answers = tuple(_answer(session, json.loads(line)) for line in lines)
        return AnswerResult(answers, session.facts, peak_rss_bytes())
    finally:
        session.close()


def _answer(session: AnsweringSession, asked: dict[str, Any]) -> Answer:
    key = next(key for key in _ANSWERS if key in asked)
    return _ANSWERS[key](session, asked)


def _score(session: AnsweringSession, asked: dict[str, Any]) -> Answer:
    likelihoods, greedy = zip(*session.score(asked["context"], asked["continuations"]), strict=True)
    return Answer(log_likelihoods=likelihoods, greedy=greedy)


def _write(session: AnsweringSession, asked: dict[str, Any]) -> Answer:
    return Answer(written=tuple(map(tuple, session.write(**asked))))


def _spell(session: AnsweringSession, asked: dict[str, Any]) -> Answer:
    return Answer(ids=tuple(session.tokenize(asked["text"])))


_ANSWERS: Mapping[str, Callable[[AnsweringSession, dict[str, Any]], Answer]] = MappingProxyType(
    {"continuations": _score, "prompts": _write, "text": _spell}
)
"""What a question has, which says what is asked."""
