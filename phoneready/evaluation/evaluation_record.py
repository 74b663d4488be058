"""The record of a judgement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import PositiveFloat, PositiveInt

from cfsp.errors import InputError
from cfsp.evaluation.loss import Divergence
from cfsp.evaluation.task_results import TaskResult
from cfsp.validation import Seed, Share, WhereSet


@dataclass(frozen=True)
class ModelIdentity:
    """Which model, and what ran it.

    `source_sha256` is of the dense model's weights that it was made from, `cache_type` of keys and values if one was
    asked for, `rounded` the 16 bits that torch read it in.
    """

    reference: str
    runtime: str = "torch"
    sha256: str | None = None
    source_sha256: str | None = None
    cache_type: Annotated[str | None, WhereSet] = None
    rounded: Annotated[str | None, WhereSet] = None


@dataclass(frozen=True)
class Vocabularies:
    """Sizes of two that differ. If one `is_part` of the reference's, divergence is taken over its tokens, where tokens
    of the reference end; else there is none."""

    tokens: PositiveInt
    against_tokens: PositiveInt
    is_part: bool


@dataclass(frozen=True)
class TextResult:
    """Figures on one text, `text` or `chats`, in windows of `seqlen` tokens.

    With a divergence, tokens and perplexities are the reference's. Bits and tokens per byte may be compared with those
    of other vocabularies.
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
    """Why each answer is degenerate (cfsp.text.degeneration; None for a good one), and the share of those that are."""

    prompts_sha256: str
    max_new_tokens: int
    share: Share
    reasons: tuple[str | None, ...]
    against_share: Share | None = None
    against_reasons: tuple[str | None, ...] = ()


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
    same_tokens: bool


@dataclass(frozen=True)
class Evaluation:
    """A model judged, beside a reference model if there is one; tasks of both in one order.

    `warnings` has what was asked for without effect.
    """

    KIND: ClassVar[str] = "evaluation"
    SCHEMA_VERSION: ClassVar[int] = 3

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
    warnings: Annotated[tuple[str, ...], WhereSet] = ()

    def __post_init__(self) -> None:
        if why := self.degeneration:
            pairs = ((self.answers, why.reasons), (self.against_answers, why.against_reasons))
            if any(len(answers) != len(reasons) for answers, reasons in pairs):
                raise InputError("reasons are not one for each answer", field="degeneration")


def text_name(kind: str, reference: str) -> str:
    """What a text is called: kind and source without folders, as the same file may lie elsewhere."""
    return f"{kind} {reference if ':' in reference else Path(reference).name}"


def repeated_text(text: Iterable[str], chats: Iterable[str]) -> str | None:
    """A name that two of the references have, whose figures could not be distinguished."""
    names = [text_name(kind, one) for kind, all_ in (("text", text), ("chats", chats)) for one in all_]
    return next((name for position, name in enumerate(names) if name in names[:position]), None)
