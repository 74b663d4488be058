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
    """Which model, by its reference and its weights' hash, and what ran it; `rounded`: the 16 bits it was read in.

    `source_sha256` is of the dense model's weights that it was made from, `cache_type` of keys and values, where one
    was asked for: else they are as in proofs.
    """

    reference: str
    runtime: str = "torch"
    sha256: str | None = None
    source_sha256: str | None = None
    cache_type: Annotated[str | None, WhereSet] = None
    rounded: Annotated[str | None, WhereSet] = None


@dataclass(frozen=True)
class Vocabularies:
    """Sizes of two that differ; `is_part`: all of the model's tokens are among the reference's. Divergence is then
    taken over them, where tokens of the reference end; else there is none."""

    tokens: PositiveInt
    against_tokens: PositiveInt
    is_part: bool


@dataclass(frozen=True)
class TextResult:
    """Figures on one text, `text` or `chats`, in windows of `seqlen` tokens.

    With a reference model of the same vocabulary, or of a larger one that has all of the model's tokens, there is a
    divergence, and tokens and perplexities are the reference's. Bits per byte of the text, and tokens that each
    tokenizer needs for one, may be compared with those of other vocabularies.
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
    """How many of the answers are degenerate (cfsp.text.degeneration), as shares, also by reason, and in percentage
    points beside the reference model's; `reasons` are of each answer, None for a good one."""

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
    """Sampled answers to the same prompts, of both models with the same settings and random numbers."""

    settings: Sampling
    seed: Seed
    degeneration: Degeneration
    answers: tuple[str, ...]
    against_answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class MetricResult:
    """A figure of an own metric, `module:function[.key]`; direction and unit if the function states them."""

    name: str
    value: float
    higher_is_better: bool | None = None
    unit: str = ""


@dataclass(frozen=True)
class Place:
    """Where a model was judged, if not on this machine; what its engine does not say is None.

    `same_tokens`: whether the tokenizer there cuts texts as the one here, whose ids were used.
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
    """A model judged, beside a reference model if there is one: an entry a text, greedy answers to each prompt, tasks
    in the same order, own metrics. What was asked for and has had no effect is in `warnings`."""

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
    names = [text_name(kind, one) for kind, all_ in (("text", text), ("chats", chats)) for one in all_]
    return next((name for position, name in enumerate(names) if name in names[:position]), None)


def identity_of(model: LanguageModel) -> ModelIdentity:
    """The identity of an opened model."""
    from cfsp.evaluation.torch_model import TorchLanguageModel  # with transformers; records are read without

    hashes = model.sha256, model.source_sha256
    rounded = model.loaded.source.rounded if isinstance(model, TorchLanguageModel) else None
    return ModelIdentity(model.name, model.runtime, *hashes, model.cache_type, rounded)
