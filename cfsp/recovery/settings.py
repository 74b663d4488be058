"""How to recover: methods, losses, and everything that is set about training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.precision import DTYPES


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        adapter: Low-rank adapters that are merged afterwards, or else all weights.
        by_importance: Ranks follow the plan's coarse importances, or else are equal.
        learning_rate: Default peak learning rate.
    """

    adapter: bool
    by_importance: bool
    learning_rate: float


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ig-lora": Method(adapter=True, by_importance=True, learning_rate=1e-3),
        "lora": Method(adapter=True, by_importance=False, learning_rate=1e-3),
        "full": Method(adapter=False, by_importance=False, learning_rate=2e-4),
    }
)

LOSSES: Mapping[str, Callable[[float], tuple[float, float]]] = MappingProxyType(
    {
        "next-token": lambda weight: (1.0, 0.0),
        "distill": lambda weight: (0.0, 1.0),
        "both": lambda weight: (1.0 - weight, weight),
    }
)
"""Name to the weights (next-token, distillation), given `distill_weight`."""

CHAT_LABELS = ("auto", "answers", "all")


@dataclass(frozen=True)
class RecoverySettings:
    """How to train; the defaults are what phoneready recommends.

    Attributes:
        method: A name in METHODS.
        rank: MEAN rank of the adapters over all blocks.
        alpha: Scale of every adapter, alpha_l / r_l in LoRA's terms, the same in every block.
        loss: A name in LOSSES.
        temperature: Softens both distributions in distillation.
        distill_weight: Share of distillation in the loss "both", in (0, 1).
        chat_labels: What of a chat is labelled, a name in CHAT_LABELS; "auto" is the answers, and all of it where
            the loss is distillation alone: the teacher's distribution is as good a target in the user's turn.
        learning_rate: Peak; None is the method's default.
        max_tokens: Training budget in input tokens, over all processes; None where `epochs` says it.
        epochs: Passes over the data; None where `max_tokens` says it.
        seqlen: Tokens in a training sequence.
        batch_size: Sequences in a forward pass, on each process.
        gradient_accumulation_steps: Forward passes behind one optimizer step, on each process.
        warmup_ratio: Share of the steps in which the learning rate rises; afterwards it falls as a cosine.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm.
        dtype: Of the matrix products, a name in DTYPES; weights are updated in float32 always.
        eval_every: Steps between validations; None for ten in all.
        save_every: Steps between checkpoints; None for as often as validation.
        patience: Stop after so many validations without a new best; None never does.
        validation_windows: Most validation sequences.
        self_tokens: Most tokens sampled for the reference `self`; they are repeated as needed.
        seed: Of initial adapters, shuffling and sampling.
        report_to: Trackers as transformers knows them, such as "tensorboard"; nothing by default.
    """

    method: str = "ig-lora"
    rank: int = 16
    alpha: float = 2.0
    loss: str = "next-token"
    temperature: float = 1.0
    distill_weight: float = 0.5
    chat_labels: str = "auto"
    learning_rate: float | None = None
    max_tokens: int | None = 1_000_000
    epochs: float | None = None
    seqlen: int = 512
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: str = "auto"
    eval_every: int | None = None
    save_every: int | None = None
    patience: int | None = 5
    validation_windows: int = 16
    self_tokens: int = 131_072
    seed: int = 0
    report_to: tuple[str, ...] = ()


_Check = tuple[Callable[[float], bool], str]
_AT_LEAST_ONE: _Check = (lambda v: v >= 1, "1 or more")
_POSITIVE: _Check = (lambda v: v > 0, "above 0")
_NOT_NEGATIVE: _Check = (lambda v: v >= 0, "0 or more")
_RANGES: Mapping[str, _Check] = MappingProxyType(
    {
        "rank": _AT_LEAST_ONE,
        "alpha": _POSITIVE,
        "temperature": _POSITIVE,
        "distill_weight": (lambda v: 0 < v < 1, "between 0 and 1"),
        "learning_rate": _POSITIVE,
        "max_tokens": _AT_LEAST_ONE,
        "epochs": _POSITIVE,
        "seqlen": (lambda v: v >= 2, "2 or more"),
        "batch_size": _AT_LEAST_ONE,
        "gradient_accumulation_steps": _AT_LEAST_ONE,
        "warmup_ratio": (lambda v: 0 <= v < 1, "0 <= ratio < 1"),
        "weight_decay": _NOT_NEGATIVE,
        "max_grad_norm": _POSITIVE,
        "eval_every": _AT_LEAST_ONE,
        "save_every": _AT_LEAST_ONE,
        "patience": _AT_LEAST_ONE,
        "validation_windows": _AT_LEAST_ONE,
        "self_tokens": _AT_LEAST_ONE,
        "seed": _NOT_NEGATIVE,
    }
)
_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"method": tuple(METHODS), "loss": tuple(LOSSES), "dtype": DTYPES, "chat_labels": CHAT_LABELS}
)


def check_settings(settings: RecoverySettings) -> None:
    """Raise InputError naming the first field whose value cannot be used, and what would be."""
    for field, names in _CHOICES.items():
        value = getattr(settings, field)
        if value not in names:
            raise InputError("unknown", field=field, value=value, allowed=", ".join(names))
    for field, (fits, allowed) in _RANGES.items():
        value = getattr(settings, field)
        if value is not None and not (math.isfinite(value) and fits(value)):
            raise InputError("out of range", field=field, value=value, allowed=allowed)
    if (settings.max_tokens is None) == (settings.epochs is None):
        raise InputError("set one of max_tokens and epochs, and the other to None", field="max_tokens")
    required = {f.name for f in dataclasses.fields(settings)} - _OPTIONAL
    missing = sorted(name for name in required if getattr(settings, name) is None)
    if missing:
        raise InputError("not set", field=missing[0])


_OPTIONAL = {"learning_rate", "max_tokens", "epochs", "eval_every", "save_every", "patience"}


def loss_weights(settings: RecoverySettings) -> tuple[float, float]:
    """Weights of the next-token loss and of distillation."""
    return LOSSES[settings.loss](settings.distill_weight)


def labels_whole_chats(settings: RecoverySettings) -> bool:
    """Whether every token of a chat is labelled, not the answers' alone."""
    if settings.chat_labels == "auto":
        return not loss_weights(settings)[0]
    return settings.chat_labels == "all"


def learning_rate(settings: RecoverySettings) -> float:
    """The peak learning rate: the one set, or the method's."""
    chosen = settings.learning_rate
    return METHODS[settings.method].learning_rate if chosen is None else chosen


def learning_rate_share(warmup_ratio: float, steps: int, step: int) -> float:
    """Share of the peak learning rate at a step: it rises linearly, peaks, and falls as a cosine; never zero.

        (t + 1) / (w + 1)  for t < w = floor(warmup_ratio * T),    (1 + cos(pi (t - w) / (T - w))) / 2  from there

    Args:
        warmup_ratio: Share of the steps before the peak, below 1.
        steps: T, of the whole run.
        step: t, from 0.
    """
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
