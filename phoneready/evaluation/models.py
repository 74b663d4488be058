"""Opening a model for judgement: here, in the runtime that it is meant for, or in the engine of a target.

To a target go token ids, from it come likelihoods and tokens; logits do not travel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import InputError, PhonereadyError
from cfsp.progress import Progress, no_progress
from exporters.families import FAMILIES
from runtime_bench.engines import SessionSettings
from runtime_bench.targets.table import TARGETS, open_target, parse_target
from runtime_bench.worker import Answer, AnswerRequest, Question, write_questions

if TYPE_CHECKING:
    import torch

    from cfsp.evaluation.language_model import Branches, LanguageModel, Score
    from exporters.family import FileOutline
    from phoneready.evaluation.evaluation_record import Place
    from phoneready.evaluation.settings import EvaluationSettings

BY_RUNTIME = {family.runtime: family for family in FAMILIES.values()}
"""Runtime -> the family of exports whose files it runs."""
TORCH = "torch"  # the runtime of all else
HERE = "local"
PLACES = ", ".join(row.form for name, row in TARGETS.items() if row.answers or name == HERE)
TIMEOUT_S = 3600.0  # for one process on a target
_SPELLED = (
    "The lighthouse stood on a rock above the sea.",
    "  two spaces,\n\ta tab; 12,345.67 and x != y",
    "Ce n'est pas là-bas, sagte er; 東京 и Москва 🙂",
)
"""Texts on which the tokenizer of a target is compared with the one here."""
_JUDGED = "--text, --chats, --tasks, --prompts"


@dataclass(frozen=True)
class OpenSettings:
    """How to open a model: the longest window that will be run, threads outside torch (None: torch's number), torch's
    device (None: the CPU), the type of keys and values (None: that of proofs), and `cfsp.precision.DTYPES`."""

    seqlen: int = 1024
    threads: int | None = None
    device: torch.device | None = None
    cache_type: str | None = None
    dtype: str = "auto"


def runtime_for(reference: str, chosen: str | None = None) -> str:
    """The runtime for a reference; raises InputError if `chosen` is unknown."""
    if chosen is None:
        return next((name for name, family in BY_RUNTIME.items() if family.claims(reference)), TORCH)
    runtimes = (*BY_RUNTIME, TORCH)
    if chosen not in runtimes:
        raise InputError("unknown runtime", field="runtime", value=chosen, allowed=", ".join(runtimes))
    return chosen


def own_cache(runtime: str) -> str | None:
    """The type of keys and values that phones run with if nothing is asked for; None for that of proofs."""
    return BY_RUNTIME[runtime].own_cache if runtime in BY_RUNTIME else None


def check_place(on: str, backend: str | None, settings: EvaluationSettings) -> None:
    """Raise InputError for what a place has no use for, or cannot do, before anything is opened."""
    if on == HERE:
        if backend is not None:
            raise InputError("--set backend is for another place: give --on TARGET, too")
        return
    if not parse_target(on)[0].answers:
        raise InputError("cannot be asked about texts", field="--on", value=on, allowed=PLACES)
    if settings.metrics:
        why = "--set metrics needs the probability of every token, which do not travel"
        raise InputError(why, field="--on", value=on, allowed=_JUDGED)
    if not (settings.tasks or settings.prompts or settings.sources):
        raise InputError("nothing to judge", field="--on", value=on, allowed=_JUDGED)


@contextmanager
def open_language_model(
    reference: str,
    runtime: str,
    settings: OpenSettings,
    *,
    on: str = HERE,
    backend: str | None = None,
    progress: Progress = no_progress,
) -> Iterator[LanguageModel]:
    """Open a model for the time of a `with` block, here or, an exported file, on a target."""
    from cfsp.evaluation.tasks import MAX_CONTEXT

    family, cache_type = BY_RUNTIME.get(runtime), settings.cache_type
    if family:
        family.check_cache(cache_type)
        family.check_claim(reference)
    elif cache_type is not None:
        raise InputError("torch keeps keys and values as it computes them", field="cache_type")
    if on != HERE:
        if family is None:
            kinds = ", ".join(one.title for one in BY_RUNTIME.values())
            raise InputError("no exported file", field="model", value=reference, allowed=kinds)
        target = open_target(on, progress)
        target.require(runtime)
        outline = family.outline(reference, MAX_CONTEXT)
        session = SessionSettings(
            n_ctx=outline.context_length,
            n_threads=settings.threads or target.environment().cpus_usable or 1,
            n_batch=outline.n_batch,
            n_ubatch=outline.n_batch,
            cache_type=cache_type or outline.cache_type,
            backend=backend,
            n_seq=outline.n_seq,
        )
        yield RemoteLanguageModel(reference, runtime, outline, target, session, cache_type)
        return
    model: LanguageModel
    if family:
        n_tokens = max(settings.seqlen, MAX_CONTEXT)
        model = family.open_model(reference, n_tokens, settings.threads, cache_type)
    else:
        from cfsp.devices import CPU
        from cfsp.evaluation.torch_model import TorchLanguageModel
        from cfsp.models.reference import load_model

        loaded = load_model(
            reference,
            device=settings.device or CPU,
            dtype=settings.dtype,
            may_stream=True,
            progress=progress,
        )
        model = TorchLanguageModel(loaded)
    try:
        if settings.seqlen > model.context_length:
            raise InputError(
                "longer than the model's context",
                field="seqlen",
                value=settings.seqlen,
                allowed=f"up to {model.context_length}",
            )
        yield model
    finally:
        model.close()


class RemoteLanguageModel:
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
        self.target, self.session, self._outline = target, session, outline
        self.place: Place | None = None  # where the answers came from, once there was one

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
        answers = self._ask(
            [{"context": item.context, "continuations": item.continuations} for item in items]
        )
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
        asked = {"prompts": list(map(list, prompts)), "max_new_tokens": max_new_tokens}
        (answer,) = self._ask([asked | {"stop_strings": list(stop_strings), "ends": self._outline.ends}])
        if len(answer.written) != len(prompts):
            raise PhonereadyError(f"{self.target.name}: some prompts were not answered")
        return [list(tokens) for tokens in answer.written]

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers to questions; the first time the tokenizer there is checked, too."""
        from cfsp.text.tokens import encode
        from phoneready.evaluation.evaluation_record import Place

        name, spelled = self.target.name, () if self.place else _SPELLED
        with tempfile.TemporaryDirectory(prefix="phoneready-questions-") as folder:
            file = Path(folder) / "questions.jsonl"
            write_questions(file, [*({"text": text} for text in spelled), *questions])
            request = AnswerRequest(str(self._outline.path), self.runtime, self.session, str(file))
            result = self.target.answer(request, TIMEOUT_S)
        if result.error is not None:
            raise PhonereadyError(f"{name}: {result.error.removeprefix(f'{name}: ')}")
        spellings, answers = result.answers[: len(spelled)], result.answers[len(spelled) :]
        if len(answers) != len(questions):
            raise PhonereadyError(f"{name}: some questions were not answered")
        session, facts = self.session, result.facts
        asked, had = session.cache_type, facts.settings.cache_type if facts else None
        if asked not in (None, had):
            raise PhonereadyError(f"{name}: a cache of {asked} was asked for, and there was {had}")
        if facts and not self.place:
            ours = [tuple(encode(self.tokenizer, text, add_special_tokens=True)) for text in spelled]
            self.place = Place(
                target=name,
                n_threads=session.n_threads,
                backends=facts.backends,
                asked_backend=session.backend,
                versions=facts.versions,
                system_info=facts.system_info,
                cache_type=had,
                same_tokens=ours == [one.ids for one in spellings],
            )
        return list(answers)
