"""`eval --on TARGET`: token ids go to the engine there that `bench` measures, likelihoods and tokens come back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import InputError, PhonereadyError
from cfsp.progress import Progress, no_progress
from runtime_bench.engines import EngineFacts, SessionSettings
from runtime_bench.questions import Answer, AnswerRequest, Question, Scoring, Spelling, Writing
from runtime_bench.questions import write_questions as write_to
from runtime_bench.targets.table import TARGETS, open_target, parse_target

if TYPE_CHECKING:
    import torch

    from cfsp.evaluation.language_model import Branches, Score
    from exporters.family import FileOutline
    from phoneready.evaluation.evaluation_record import Place
    from phoneready.evaluation.models import OpenSettings
    from phoneready.evaluation.settings import EvaluationSettings

HERE = "local"
TIMEOUT_S = 3600.0
"""For one process there."""
_SPELLED = (
    "The lighthouse stood on a rock above the sea.",
    "  two spaces,\n\ta tab; 12,345.67 and x != y",
    "Ce n'est pas là-bas, sagte er; 東京 и Москва 🙂",
)
"""Texts on which the two tokenizers are compared."""
_JUDGED = "--text, --chats, --tasks, --prompt, --prompts"

PLACES = ", ".join(row.form for name, row in TARGETS.items() if row.answers or name == HERE)


def check_place(on: str, backend: str | None, settings: EvaluationSettings) -> None:
    """Raise InputError for what a place has no use for, or cannot do, before anything is opened."""
    if on == HERE:
        if backend is not None:
            raise InputError("--backend is for another place: give --on TARGET, too")
        return
    if not parse_target(on)[0].answers:
        raise InputError("cannot be asked about texts", field="--on", value=on, allowed=PLACES)
    if settings.metrics:
        why = "--metric needs the probability of every token, which do not travel"
        raise InputError(why, field="--on", value=on, allowed=_JUDGED)
    if not (settings.tasks or settings.prompts or settings.sources):
        raise InputError("nothing to judge", field="--on", value=on, allowed=_JUDGED)


class FarLanguageModel:
    """A `LanguageModel` whose exported file is run by its engine on a target (one that is `Answering`)."""

    gives_logits = False

    def __init__(
        self,
        reference: str,
        runtime: str,
        outline: FileOutline,
        target: Any,
        session: SessionSettings,
        cache_type: str | None,
    ) -> None:
        self.name, self.runtime, self.cache_type = reference, runtime, cache_type
        self.sha256: str | None = outline.sha256
        self.source_sha256, self.tokenizer = outline.source_sha256, outline.tokenizer
        self.vocab_size, self.context_length = outline.vocab_size, outline.context_length
        self.target, self.session = target, session
        self.facts: EngineFacts | None = None
        self.same_tokens: bool | None = None
        self._outline = outline

    def close(self) -> None:
        """Between questions nothing is open there."""

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Raise InputError: logits do not travel."""
        why = f"{self.target.name} does not give the logits of texts"
        raise InputError(why, allowed="tasks, answers, bits per byte")

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """See `LanguageModel`; all items in one process there."""
        from cfsp.evaluation.language_model import Score, check_length

        for item in items:
            longest = len(item.context) + max(map(len, item.continuations), default=1) - 1
            check_length(self, longest, "a context with its continuation")
        answers = self._ask([Scoring(item.context, item.continuations) for item in items])
        scores = [list(map(Score, one.log_likelihoods, one.greedy)) for one in answers]
        if [len(one) for one in scores] != [len(item.continuations) for item in items]:
            raise PhonereadyError(f"{self.target.name}: some continuations were not scored")
        return scores

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop_strings: Sequence[str] = ()
    ) -> list[list[int]]:
        """See `LanguageModel`; all prompts in one process there."""
        from cfsp.evaluation.language_model import check_length

        check_length(self, max(map(len, prompts), default=0) + max_new_tokens, "a prompt with its answer")
        ids, ends = tuple(map(tuple, prompts)), self._outline.ends
        (answer,) = self._ask([Writing(ids, max_new_tokens, tuple(stop_strings), ends)])
        if len(answer.written) != len(ids):
            raise PhonereadyError(f"{self.target.name}: some prompts were not answered")
        return [list(tokens) for tokens in answer.written]

    def place(self) -> Place | None:
        """Where the answers came from; None before there was any."""
        from phoneready.evaluation.evaluation_record import Place

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
        )

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers to questions; the first time the tokenizer there is checked, too."""
        from cfsp.text.tokens import encode

        name, spelled = self.target.name, _SPELLED if self.same_tokens is None else ()
        with tempfile.TemporaryDirectory(prefix="phoneready-questions-") as folder:
            file = Path(folder) / "questions.jsonl"
            write_to(file, [*map(Spelling, spelled), *questions])
            request = AnswerRequest(str(self._outline.path), self.runtime, self.session, str(file))
            result = self.target.answer(request, TIMEOUT_S)
        if result.error is not None:
            raise PhonereadyError(f"{name}: {result.error.removeprefix(f'{name}: ')}")
        spellings, answers = result.answers[: len(spelled)], result.answers[len(spelled) :]
        if len(answers) != len(questions):
            raise PhonereadyError(f"{name}: some questions were not answered")
        asked, had = self.session.cache_type, result.facts.settings.cache_type if result.facts else None
        if asked not in (None, had):
            raise PhonereadyError(f"{name}: a cache of {asked} was asked for, and there was {had}")
        self.facts = result.facts
        if spelled:
            ours = [tuple(encode(self.tokenizer, text, add_special_tokens=True)) for text in spelled]
            self.same_tokens = ours == [one.ids for one in spellings]
        return list(answers)


@contextmanager
def open_elsewhere(
    reference: str,
    runtime: str,
    on: str,
    backend: str | None,
    opening: OpenSettings,
    *,
    progress: Progress = no_progress,
) -> Iterator[FarLanguageModel]:
    """Open an exported file on a target for the time of a `with` block.

    Raises:
        InputError: No exported file, or the target cannot run it.
        PhonereadyError: The target's program cannot be built.
    """
    from cfsp.evaluation.tasks import MAX_CONTEXT
    from phoneready.evaluation.models import BY_RUNTIME, check_cache

    family = BY_RUNTIME.get(runtime)
    if family is None:
        kinds = ", ".join(one.title for one in BY_RUNTIME.values())
        raise InputError("no exported file", field="model", value=reference, allowed=kinds)
    family.check_claim(reference)
    check_cache(runtime, opening.cache_type)
    target = open_target(on, progress)
    target.require(runtime)
    outline = family.outline(reference, MAX_CONTEXT)
    session = SessionSettings(
        n_ctx=outline.context_length,
        n_threads=opening.threads or target.environment().cpus_usable or 1,
        n_batch=outline.n_batch,
        n_ubatch=outline.n_batch,
        cache_type=opening.cache_type or outline.cache_type,
        backend=backend,
        n_seq=outline.n_seq,
    )
    yield FarLanguageModel(reference, runtime, outline, target, session, opening.cache_type)
