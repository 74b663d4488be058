"""A file on another target as a `cfsp.evaluation.LanguageModel`, and the same held against this machine's engine.

Requests are made here, of token ids, and run there, in the engine that `bench` measures. Distributions of a whole
vocabulary do not travel: of a text comes back how likely it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Protocol, TypeVar

import torch

from cfsp.errors import InputError, PhonereadyError
from cfsp.evaluation.language_model import Branches, LanguageModel, Score, check_length
from cfsp.text.choosing import Chooser
from cfsp.text.encoding import encode
from exporters.outline import FileOutline
from phoneready.evaluation.evaluation_record import HeldAgainstHere, Place
from runtime_bench.engines import EngineFacts, SessionSettings
from runtime_bench.questions import Answer, AnswerRequest, AnswerResult, Question, Scoring, Spelling, Writing
from runtime_bench.questions import write_questions as write_to
from runtime_bench.targets import Answering

T = TypeVar("T")
SPELLED = (
    "The lighthouse stood on a rock above the sea.",
    "  two spaces,\n\ta tab; 12,345.67 and x != y",
    "Ce n'est pas là-bas, sagte er; 東京 и Москва 🙂",
)
"""Texts that both tokenizers cut."""


class AnsweringTarget(Answering, Protocol):
    """A `runtime_bench.targets.Target` that can be asked."""

    @property
    def name(self) -> str: ...


class FarLanguageModel:
    """An exported file, run by its engine on a target.

    Args:
        reference: The file as it was given.
        runtime: What runs it.
        outline: What it says without being run.
        target: Where.
        session: How it is opened there.
        cache_type: Of keys and values, where one was asked for.
        timeout_s: How long one process may take.
    """

    gives_logits = False

    def __init__(
        self,
        reference: str,
        runtime: str,
        outline: FileOutline,
        target: AnsweringTarget,
        session: SessionSettings,
        *,
        cache_type: str | None,
        timeout_s: float,
    ) -> None:
        self.name, self.runtime, self.cache_type = reference, runtime, cache_type
        self.sha256: str | None = outline.sha256
        self.source_sha256, self.tokenizer = outline.source_sha256, outline.tokenizer
        self.vocab_size, self.context_length = outline.vocab_size, outline.context_length
        self.target, self.session = target, session
        self.stated_sampling = outline.stated_sampling
        self.facts: EngineFacts | None = None
        self.same_tokens: bool | None = None
        self._outline, self._timeout_s = outline, timeout_s

    def close(self) -> None:
        """Nothing is open there between questions."""

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Raise InputError: these do not travel."""
        raise InputError(
            f"{self.target.name} does not give the logits of texts", allowed="tasks, answers, bits per byte"
        )

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """See `LanguageModel`; all items in one process there."""
        for item in items:
            longest = len(item.context) + max(map(len, item.continuations), default=1) - 1
            check_length(self, longest, "a context with its continuation")
        answers = self._ask([Scoring(item.context, item.continuations) for item in items])
        scores = [list(map(Score, one.log_likelihoods, one.greedy)) for one in answers]
        if [len(one) for one in scores] != [len(item.continuations) for item in items]:
            raise PhonereadyError(f"{self.target.name}: some continuations were not scored")
        return scores

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_strings: Sequence[str] = (),
        choosers: Sequence[Chooser] = (),
    ) -> list[list[int]]:
        """See `LanguageModel`; all prompts in one process there. Raises InputError for choosers, which need logits."""
        if choosers:
            raise InputError(
                f"{self.target.name} does not give the logits of texts", allowed="greedy answers"
            )
        check_length(self, max(map(len, prompts), default=0) + max_new_tokens, "a prompt with its answer")
        ids, ends = tuple(map(tuple, prompts)), self._outline.ends
        (answer,) = self._ask([Writing(ids, max_new_tokens, tuple(stop_strings), ends)])
        if len(answer.written) != len(ids):
            raise PhonereadyError(f"{self.target.name}: some prompts were not answered")
        return [list(tokens) for tokens in answer.written]

    def place(self, held: HeldAgainstHere | None) -> Place | None:
        """Where the answers came from; None before there was any."""
        if self.facts is None:
            return None
        return Place(
            target=self.target.name,
            n_threads=self.session.n_threads,
            backends=self.facts.backends,
            asked_backend=self.session.backend,
            versions=self.facts.versions,
            system_info=self.facts.system_info,
            cache_type=self.facts.settings.cache_type,
            same_tokens=self.same_tokens,
            held=held,
        )

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers to questions; the first time the tokenizer there is looked at, too."""
        spelled = SPELLED if self.same_tokens is None else ()
        result = self._answered([*map(Spelling, spelled), *questions])
        spellings, answers = result.answers[: len(spelled)], result.answers[len(spelled) :]
        if len(answers) != len(questions):
            raise PhonereadyError(f"{self.target.name}: some questions were not answered")
        self.facts = self._heeded(result.facts)
        if spelled:
            ours = [tuple(encode(self.tokenizer, text, add_special_tokens=True)) for text in spelled]
            self.same_tokens = ours == [one.ids for one in spellings]
        return list(answers)

    def _heeded(self, facts: EngineFacts | None) -> EngineFacts | None:
        asked, had = self.session.cache_type, facts.settings.cache_type if facts else None
        if asked not in (None, had):
            raise PhonereadyError(
                f"{self.target.name}: a cache of {asked} was asked for, and there was {had}"
            )
        return facts

    def _answered(self, questions: Sequence[Question]) -> AnswerResult:
        with tempfile.TemporaryDirectory(prefix="phoneready-questions-") as folder:
            file = Path(folder) / "questions.jsonl"
            write_to(file, questions)
            request = AnswerRequest(str(self._outline.path), self.runtime, self.session, str(file))
            result = self.target.answer(request, self._timeout_s)
        if result.error is not None:
            where = f"{self.target.name}: "
            raise PhonereadyError(where + result.error.removeprefix(where))
        return result


@dataclass
class HeldModel:
    """A model elsewhere, whose first answers are held against the same file's in the same engine here.

    Attributes:
        far: The model elsewhere; it is what is judged.
        here: The same here; None where nothing is held against it.
        most: Questions, and texts, to hold against it.
    """

    far: FarLanguageModel
    here: LanguageModel | None
    most: int
    differences: list[float] = field(default_factory=list)
    other_choice: list[bool] = field(default_factory=list)
    other_text: list[bool] = field(default_factory=list)
    gives_logits = False

    def __post_init__(self) -> None:
        far = self.far
        self.name, self.runtime, self.cache_type = far.name, far.runtime, far.cache_type
        self.sha256, self.source_sha256, self.tokenizer = far.sha256, far.source_sha256, far.tokenizer
        self.vocab_size, self.context_length = far.vocab_size, far.context_length
        self.stated_sampling = far.stated_sampling
        self.next_token_logits = far.next_token_logits

    def close(self) -> None:
        """Let both go; may be called twice."""
        self.far.close()
        if self.here is not None:
            self.here.close()

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """See `LanguageModel`."""
        scores = self.far.score(items)
        part = self._first(items, self.other_choice)
        if self.here is not None and part:
            for there, here in zip(scores, self.here.score(part), strict=False):
                pairs = [(a.log_likelihood, b.log_likelihood) for a, b in zip(there, here, strict=True)]
                self.differences += [abs(a - b) for a, b in pairs]
                self.other_choice.append(_chosen(there) != _chosen(here))
        return scores

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_strings: Sequence[str] = (),
        choosers: Sequence[Chooser] = (),
    ) -> list[list[int]]:
        """See `LanguageModel`."""
        written = self.far.generate(prompts, max_new_tokens, stop_strings=stop_strings, choosers=choosers)
        part = self._first(prompts, self.other_text)
        if self.here is not None and part:
            here = self.here.generate(part, max_new_tokens, stop_strings=stop_strings)
            self.other_text += [ours != theirs for ours, theirs in zip(written, here, strict=False)]
        return written

    def place(self) -> Place | None:
        """Where it was judged, and how that compares."""
        if self.here is None:
            return self.far.place(None)
        held = HeldAgainstHere(
            n_choices=len(self.other_choice),
            n_other_choices=sum(self.other_choice),
            max_difference=max(self.differences, default=None),
            mean_difference=fmean(self.differences) if self.differences else None,
            n_texts=len(self.other_text),
            n_other_texts=sum(self.other_text),
        )
        return self.far.place(held)

    def _first(self, asked: Sequence[T], held: Sequence[bool]) -> Sequence[T]:
        """Those of a call that belong to the first of all."""
        return asked[: max(0, self.most - len(held))]


def _chosen(scores: Sequence[Score]) -> tuple[int, bool]:
    """What counts as the answer to a question: the likeliest choice, or of a single one whether it was foreseen."""
    likelihoods = [score.log_likelihood for score in scores]
    return likelihoods.index(max(likelihoods)), len(scores) == 1 and scores[0].is_greedy
