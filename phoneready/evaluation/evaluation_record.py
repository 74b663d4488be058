"""The record of a judgement."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import NonNegativeFloat, PositiveInt

from cfsp.errors import InputError
from cfsp.evaluation.loss import Distance, bounded_exp
from cfsp.evaluation.task_results import TaskResult
from cfsp.validation import Seed, Share, WhereSet
from runtime_bench.records.pairs import Windows


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
class TextLoss:
    """What a model loses on one text, `text` or `chats`, in windows of `seqlen` tokens, beside a reference model.

    Of each window: the bytes that its predicted tokens spell, the tokens that the model predicts for them, and -ln p of
    these; the same of the reference. A model of other tokens reads the whole text of a window in its own tokens;
    `distance` is then taken where one of the reference's tokens ends. All figures are sums over windows.
    """

    kind: str
    source: str
    seqlen: PositiveInt
    windows_sha256: str
    n_bytes: tuple[PositiveInt, ...]
    n_tokens: tuple[PositiveInt, ...]
    nats: tuple[NonNegativeFloat, ...]
    against_n_tokens: tuple[PositiveInt, ...] = ()
    against_nats: tuple[NonNegativeFloat, ...] = ()
    distance: Distance | None = None

    def __post_init__(self) -> None:
        of = self.distance
        each = [self.n_tokens, self.nats, self.against_n_tokens, self.against_nats]
        each += [of.kl, of.n_tokens, of.n_same] if of else []
        if not self.n_bytes or any(len(one) not in (0, len(self.n_bytes)) for one in each) or not self.nats:
            raise InputError("not one number for each window", field="texts")

    @property
    def name(self) -> str:
        return text_name(self.kind, self.source)

    @property
    def bits(self) -> Windows:
        """Bits over bytes, by which models are compared."""
        return Windows(tuple(nats / math.log(2) for nats in self.nats), self.n_bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.bits.value

    @property
    def tokens_per_byte(self) -> float:
        return sum(self.n_tokens) / sum(self.n_bytes)

    @property
    def perplexity(self) -> float:
        """Beside a reference whose tokens are compared with its own, per token of that."""
        return bounded_exp(sum(self.nats) / sum(self.against_n_tokens if self.distance else self.n_tokens))

    @property
    def against(self) -> TextLoss | None:
        """The reference's own loss."""
        if not self.against_nats:
            return None
        return replace(
            self, n_tokens=self.against_n_tokens, nats=self.against_nats, against_n_tokens=(), against_nats=(),
            distance=None,
        )  # fmt: skip


@dataclass(frozen=True)
class Degeneration:
    """Why each answer is degenerate (cfsp.text.degeneration; None for a good one), and the share of those that are."""

    prompts_sha256: str
    max_new_tokens: int
    share: Share
    reasons: tuple[str | None, ...]
    against_share: Share | None = None
    against_reasons: tuple[str | None, ...] = ()


def degeneration_of(
    prompts: Sequence[str],
    max_new_tokens: int,
    reasons: tuple[str | None, ...],
    against: tuple[str | None, ...] = (),
) -> Degeneration:
    """From why each answer is degenerate, of the model and of the reference if there is one."""
    digest = hashlib.sha256(json.dumps(prompts, ensure_ascii=False).encode()).hexdigest()
    shares = [
        sum(why is not None for why in side) / len(side) if side else None for side in (reasons, against)
    ]
    return Degeneration(digest, max_new_tokens, shares[0] or 0.0, reasons, shares[1], against)


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
    SCHEMA_VERSION: ClassVar[int] = 4

    model: ModelIdentity
    against: ModelIdentity | None
    seed: Seed
    texts: tuple[TextLoss, ...]
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
