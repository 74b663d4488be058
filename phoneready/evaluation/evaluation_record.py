"""What is judged, and the record of a judgement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import PositiveFloat, PositiveInt

from cfsp.errors import InputError
from cfsp.evaluation.divergence import Divergence
from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.task_results import TaskResult
from cfsp.text.choosing import Sampling
from cfsp.validation import Seed, Share, WhereSet


@dataclass(frozen=True)
class ModelIdentity:
    """Which model, and what ran it.

    Attributes:
        reference: As it was given.
        runtime: A name in `phoneready.evaluation.models.RUNTIMES`.
        sha256: Hash of its weights' file or files, where known.
        source_sha256: Hash of the dense model's weights that it was made from, where it says so.
        cache_type: Type of its keys and values where one was asked for; else they are those of proofs.
        rounded: 16 bits that its weights were rounded to when they were read.
    """

    reference: str
    runtime: str = "torch"
    sha256: str | None = None
    source_sha256: str | None = None
    cache_type: Annotated[str | None, WhereSet] = None
    rounded: Annotated[str | None, WhereSet] = None


@dataclass(frozen=True)
class Vocabularies:
    """Two that differ, so that predictions are not compared token by token.

    Attributes:
        tokens: Size of the model's.
        against_tokens: Size of the reference model's.
        is_part: Whether all of the model's tokens are among the reference's: divergence is then taken over them, where
            tokens of the reference end; else it is not.
    """

    tokens: PositiveInt
    against_tokens: PositiveInt
    is_part: bool


@dataclass(frozen=True)
class TextResult:
    """Figures on one text.

    Attributes:
        kind: `text` or `chats`.
        source: The reference.
        seqlen: Tokens in a window.
        n_tokens: Predicted tokens; the reference model's where there is a divergence.
        windows_sha256: Hash of the token ids.
        perplexity: Of the model.
        divergence: From the reference model, where there is one of the same vocabulary, or of a larger one that has
            all of the model's tokens; perplexities are then a token of the reference's.
        n_bytes: Bytes of text that the predicted tokens spell.
        bits_per_byte: Of the model, which figures of other vocabularies may be compared with.
        against_bits_per_byte: The reference model's, on the same bytes.
        tokens_per_byte: Tokens that the model's tokenizer needs for a byte of these.
        against_tokens_per_byte: The reference model's.
    """

    kind: str
    source: str
    seqlen: int
    n_tokens: int
    windows_sha256: str
    perplexity: PositiveFloat
    divergence: Divergence | None = None
    n_bytes: int | None = None
    bits_per_byte: float | None = None
    against_bits_per_byte: float | None = None
    tokens_per_byte: float | None = None
    against_tokens_per_byte: float | None = None


@dataclass(frozen=True)
class Degeneration:
    """How many of the answers are degenerate; see cfsp.text.degeneration.

    Attributes:
        prompts_sha256: Hash of the prompts.
        n_prompts: Their number.
        max_new_tokens: Longest answer.
        share: Share of degenerate answers.
        by_reason: Reason -> share.
        reasons: Reason of each answer, None for a good one.
        against_share: The reference model's share.
        against_by_reason: The reference model's by reason.
        against_reasons: The reference model's reasons.
        difference_points: share minus against_share in percentage points.
    """

    prompts_sha256: str
    n_prompts: int
    max_new_tokens: int
    share: Share
    by_reason: Mapping[str, float]
    reasons: tuple[str | None, ...]
    against_share: float | None = None
    against_by_reason: Mapping[str, float] = field(default_factory=dict)
    against_reasons: tuple[str | None, ...] = ()
    difference_points: float | None = None


@dataclass(frozen=True)
class SampledAnswers:
    """Answers to the same prompts that were sampled, of both models with the same settings by the same numbers.

    Attributes:
        settings: How.
        seed: Of the numbers.
        degeneration: Of these answers.
        answers: The model's.
        against_answers: The reference model's.
    """

    settings: Sampling
    seed: Seed
    degeneration: Degeneration
    answers: tuple[str, ...]
    against_answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class MetricResult:
    """A figure of an own metric.

    Attributes:
        name: `module:function`, with `.key` behind it where the function returns several.
        value: The figure.
        higher_is_better: Direction, where the function states it.
        unit: Where the function states it.
    """

    name: str
    value: float
    higher_is_better: bool | None = None
    unit: str = ""


@dataclass(frozen=True)
class Place:
    """Where a model was judged, when not on this machine; what its engine does not say is None.

    Attributes:
        target: As `bench --on` has it.
        n_threads: Threads there.
        backends: What computed there.
        asked_backend: What was to compute, where something was asked for.
        versions: Of the engine there.
        system_info: The engine's own line about the machine.
        cache_type: Of keys and values there.
        same_tokens: Whether the tokenizer there cuts texts as the one here does, whose ids were used.
    """

    target: str
    n_threads: PositiveInt
    backends: str | None
    asked_backend: str | None
    versions: Mapping[str, str]
    system_info: str | None
    cache_type: str | None
    same_tokens: bool | None


@dataclass(frozen=True)
class Evaluation:
    """A model judged.

    Attributes:
        model: What was judged.
        against: The reference model, where there is one.
        seed: Seed of sampled chats and answers.
        texts: One entry a text.
        prompts: Questions.
        answers: The model's, greedy.
        against_answers: The reference model's, greedy.
        degeneration: Of the answers, where there are any.
        tasks: Results of tasks.
        against_tasks: The reference model's, in the same order.
        metrics: Own metrics.
        vocabularies: Of both, where they differ.
        place: Where the model ran, when not on this machine.
        sampled: Sampled answers, where they were asked for.
        warnings: What was asked for and has had no effect.
    """

    KIND: ClassVar[str] = "evaluation"
    SCHEMA_VERSION: ClassVar[int] = 2

    model: ModelIdentity
    against: ModelIdentity | None
    seed: Seed
    texts: tuple[TextResult, ...]
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    against_answers: tuple[str, ...] = ()
    degeneration: Degeneration | None = None
    tasks: tuple[TaskResult, ...] = ()
    against_tasks: tuple[TaskResult, ...] = ()
    metrics: tuple[MetricResult, ...] = ()
    vocabularies: Annotated[Vocabularies | None, WhereSet] = None
    place: Annotated[Place | None, WhereSet] = None
    sampled: Annotated[SampledAnswers | None, WhereSet] = None
    warnings: Annotated[tuple[str, ...], WhereSet] = ()

    def __post_init__(self) -> None:
        for of in self.answer_sets.values():
            why = of.degeneration
            if why and tuple(map(len, (of.answers, of.against_answers))) != tuple(
                map(len, (why.reasons, why.against_reasons))
            ):
                raise InputError("reasons are not one for each answer", field="degeneration")

    @property
    def answer_sets(self) -> Mapping[str, Evaluation | SampledAnswers]:
        """What to add to the name of whoever answered -> what has the answers: this record the greedy ones."""
        return {"": self} | ({", sampled": self.sampled} if self.sampled else {})


def text_name(kind: str, reference: str) -> str:
    """What a text is called: kind and source without folders, as the same file may lie elsewhere."""
    return f"{kind} {reference if ':' in reference else Path(reference).name}"


def repeated_text(text: Iterable[str], chats: Iterable[str]) -> str | None:
    """A name that two of the references have, so that their figures could not be told apart."""
    names = [*(text_name("text", one) for one in text), *(text_name("chats", one) for one in chats)]
    return next((name for position, name in enumerate(names) if name in names[:position]), None)


def identity_of(model: LanguageModel) -> ModelIdentity:
    """The identity of an opened model."""
    from cfsp.evaluation.torch_model import TorchLanguageModel  # with transformers; records are read without

    hashes = model.sha256, model.source_sha256
    rounded = model.loaded.source.rounded if isinstance(model, TorchLanguageModel) else None
    return ModelIdentity(model.name, model.runtime, *hashes, model.cache_type, rounded)
