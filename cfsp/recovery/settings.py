"""How to recover: methods, losses, and everything that is set about training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from cfsp.errors import InputError, require_extra
from cfsp.settings import SEED, Reads, Settings, as_read, setting
from cfsp.settings import check_settings as check_fields
from cfsp.text.settings import SELF, TEXT_FORMS

if TYPE_CHECKING:
    from cfsp.recovery.rounding import Rounding


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        adapter: Low-rank adapters that are merged afterwards, or else all weights.
        by_importance: Ranks follow the plan's coarse importances, or else are equal.
        learning_rate: Default peak learning rate.
        distill_rate: That of distillation alone, where it is another.
        through_rounding: What is trained is what a file of few bits leaves open: scales of its blocks, and norms.
    """

    adapter: bool
    by_importance: bool
    learning_rate: float
    distill_rate: float | None = None
    through_rounding: bool = False


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ig-lora": Method(adapter=True, by_importance=True, learning_rate=1e-3),
        "lora": Method(adapter=True, by_importance=False, learning_rate=1e-3),
        "full": Method(adapter=False, by_importance=False, learning_rate=2e-4, distill_rate=5e-5),
        "scales": Method(adapter=False, by_importance=False, learning_rate=5e-4, through_rounding=True),
    }
)
AUTO = "auto"

NEXT_TOKEN, DISTILL, BOTH = "next-token", "distill", "both"
LOSSES: Mapping[str, Callable[[float], tuple[float, float]]] = MappingProxyType(
    {
        NEXT_TOKEN: lambda weight: (1.0, 0.0),
        DISTILL: lambda weight: (0.0, 1.0),
        BOTH: lambda weight: (1.0 - weight, weight),
    }
)
"""Name to the weights (next-token, distillation), given `distill_weight`."""

CHAT_LABELS = ("auto", "answers", "all")
"""What of a chat is labelled; "auto" is the answers, and all of it where the loss is distillation alone: the teacher's
distribution is as good a target in the user's turn."""

_STUDENT = "student"
"""A reference of earlier versions: text sampled from the checkpoint itself."""

DEFAULT_TOKENS = 1_000_000

VALIDATIONS = 10
"""Most validations while a model is trained whose settings do not say how often."""

HELD_OUT_SHARE = 0.1
"""Most of the data that is held out if no validation data is given."""


@dataclass(frozen=True)
class Training(Settings):
    """How to train; the defaults are what phoneready recommends.

    `max_tokens` and `epochs` are two ways to say how long: without either it is DEFAULT_TOKENS tokens.
    """

    method: str = setting(
        AUTO,
        "ig-lora (ranks by importance), lora, full (all weights), or scales (of --for-quant).",
        choices=(AUTO, *METHODS),
        shown="ig-lora; scales with --for-quant",
    )
    for_quant: str | None = setting(
        None,
        "Train what a file of this format leaves open, through its rounding: export writes its numbers.",
        metavar="FORMAT",
        example="Q4_0",
    )
    rank: int = setting(16, "Mean rank of the adapters.", ge=1, le=65536)
    alpha: float = setting(2.0, "LoRA's alpha, as a multiple of the rank; the same in every block.", gt=0)
    loss: str = setting(
        DISTILL,
        "next-token, distill (from the teacher), or both.",
        choices=tuple(LOSSES),
    )
    temperature: float = setting(1.0, "Of distillation: softens both distributions.", gt=0)
    distill_weight: float = setting(
        0.5, "Share of distillation in the loss `both`, between 0 and 1.", gt=0, lt=1
    )
    chat_labels: str = setting(
        "auto",
        "What of a chat is learnt: answers, all, or auto (all for the loss `distill`, else answers).",
        choices=CHAT_LABELS,
    )
    learning_rate: float | None = setting(
        None,
        "Peak.",
        gt=0,
        shown="1e-3 for adapters, 5e-4 for scales; for full 5e-5, 2e-4 with the next token",
        example=1e-3,
    )
    max_tokens: int | None = setting(
        None,
        "Training budget in input tokens, over all processes.",
        ge=1,
        le=10**15,
        shown=str(DEFAULT_TOKENS),
        example=DEFAULT_TOKENS,
    )
    epochs: float | None = setting(
        None, "Budget in passes over the data, instead of `max_tokens`.", gt=0, le=1e6, example=1.0
    )
    seqlen: int = setting(512, "Tokens in a training sequence.", ge=2, le=2**20)
    batch_size: int = setting(4, "Sequences in a forward pass, on each process.", ge=1, le=2**16)
    gradient_accumulation_steps: int = setting(
        1, "Forward passes behind one step, on each process.", ge=1, le=2**20
    )
    warmup_ratio: float = setting(0.05, "Share of the steps in which the learning rate rises.", ge=0, lt=1)
    weight_decay: float = setting(0.0, "AdamW's.", ge=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to it.", gt=0)
    dtype: str = setting(
        "auto", "Of matrix products: auto, float32 or bfloat16.", choices="cfsp.precision:PRODUCTS"
    )
    eval_every: int | None = setting(
        None,
        "Steps between validations.",
        ge=1,
        shown="a tenth of all; more of short runs",
        example=100,
    )
    save_every: int | None = setting(
        None, "Steps between checkpoints.", ge=1, shown="as --eval-every", example=100
    )
    patience: int | None = setting(0, "Stop after so many validations without a new best; 0: never.", ge=0)
    validation_windows: int = setting(
        16, "Most validation sequences; of several texts at least one of each.", ge=1, le=2**20
    )
    self_tokens: int = setting(131_072, "Most tokens sampled for the reference `self`.", ge=1)
    report_to: tuple[str, ...] = setting(
        (),
        "Trackers, as accelerate names them: tensorboard, mlflow, wandb, ...",
        metavar="NAME,...",
        shown="none",
    )


@dataclass(frozen=True)
class RecoverySettings(Training):
    """How to train, and the seed of initial adapters, shuffling and sampling."""

    seed: int = setting(0, SEED)


@dataclass(frozen=True)
class RecoveryReferences(Settings):
    """What to train on."""

    data: tuple[str, ...] = setting(
        ("self",),
        f"Training data, mixed in equal shares. `self` (sampled from the teacher), {TEXT_FORMS}.",
        least=1,
        metavar="REF",
    )
    validation: tuple[str, ...] = setting(
        (), "Validation data, as `data`.", metavar="REF", shown="a held-out share of the data"
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is read."""
        return (*self.data, *self.validation)


_Training = TypeVar("_Training", bound=Training)


def check_settings(settings: RecoverySettings, references: Collection[str]) -> None:
    """Raise InputError for values that cannot be used, alone or beside each other, or for a reference that is gone."""
    check_fields(settings)
    settled(settings)
    if settings.max_tokens is not None and settings.epochs is not None:
        raise InputError("says how long, and so does epochs", field="max_tokens", allowed="one of them")
    if _STUDENT in references:
        raise InputError("is gone", field="data", value=_STUDENT, allowed=f"{SELF}, which the teacher writes")


def usable(
    settings: RecoverySettings, references: Sequence[str], rounding: Rounding | None
) -> RecoverySettings:
    """Settings with everything said, and defaults for what nothing reads.

    Raises:
        InputError: Settings that cannot be used, with this data or these packages.
        MissingExtraError: Without the `recover` extra.
    """
    check_settings(settings, references)
    settings = settled(training_as_read(settings, references)[0])
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "").lower() in ("1", "true"):
            why = "training with shared-out weights is not supported: each process holds the whole model"
            raise InputError(why, field=name, allowed="accelerate launch --multi_gpu, or torchrun")
    for package in ("accelerate", "peft") if method_of(settings).adapter else ("accelerate",):
        require_extra(package, "recover")
    if named := [name for name in settings.report_to if name != "none"]:
        from accelerate.tracking import filter_trackers, get_available_trackers

        try:
            filter_trackers(named, logging_dir=".")
            missing = set(named) - {str(one) for one in get_available_trackers()}
        except ValueError as error:
            raise InputError(f"unknown tracker: {error}", field="report_to", value=named) from error
        if missing:
            why = f"not installed: {', '.join(sorted(missing))}"
            raise InputError(why, field="report_to", value=named)
    if settings.for_quant is not None:
        if rounding is None:
            raise InputError("no formats are known here", field="for_quant", value=settings.for_quant)
        rounding.check(settings.for_quant)
    return settings


def settled(settings: _Training) -> _Training:
    """Settings whose method is said.

    Raises:
        InputError: A method that does not train what `for_quant` asks for, or that asks for it.
    """
    through = settings.for_quant is not None
    method = settings.method if settings.method != AUTO else ("scales" if through else "ig-lora")
    if METHODS[method].through_rounding != through:
        allowed = (
            "scales, where for_quant is set" if through else "ig-lora, lora, full; scales with for_quant"
        )
        raise InputError("does not go with for_quant", field="method", value=method, allowed=allowed)
    return replace(settings, method=method)


_READS: Reads = MappingProxyType(
    {
        **dict.fromkeys(
            ("rank", "alpha"), (lambda asked, _: method_of(asked).adapter, "without --method ig-lora or lora")
        ),
        "temperature": (lambda asked, _: learns_from_teacher(asked), "without --loss distill or both"),
        "distill_weight": (lambda asked, _: asked.loss == BOTH, "without --loss both"),
        "self_tokens": (
            lambda _, references: SELF in references,
            "without the reference self",
        ),
        "chat_labels": (
            lambda _, references: not {SELF}.issuperset(references),
            "without references that have chats",
        ),
    }
)
"""Used with the references that are trained and validated on."""


def training_as_read(
    settings: _Training, references: Collection[str], section: str = ""
) -> tuple[_Training, tuple[str, ...]]:
    """`as_read`, of settings of training.

    Raises:
        InputError: As `settled`.
    """
    return as_read(settings, _READS, references, section=section)


def method_of(settings: Training) -> Method:
    """The row of what is trained."""
    return METHODS[settled(settings).method]


def token_budget(settings: Training) -> int | None:
    """Input tokens to train on; None where epochs say it."""
    if settings.max_tokens is None and settings.epochs is None:
        return DEFAULT_TOKENS
    return settings.max_tokens


def validation_interval(settings: Training, steps: int, per_step: int, held: int) -> int:
    """Steps between validations: those set, or a tenth of all, and enough to learn as much as a validation reads."""
    return settings.eval_every or max(math.ceil(steps / VALIDATIONS), math.ceil(held / per_step))


def held_out(count: int, most: int) -> int:
    """Sequences of so many that are held out: at most a share of them, and at least one."""
    return max(1, min(most, int(count * HELD_OUT_SHARE)))


def loss_weights(settings: Training) -> tuple[float, float]:
    """Weights of the next-token loss and of distillation."""
    return LOSSES[settings.loss](settings.distill_weight)


def learns_from_teacher(settings: Training) -> bool:
    """Whether the loss reads the dense model's distribution."""
    return loss_weights(settings)[1] > 0


def distils_alone(settings: Training) -> bool:
    """Whether the loss reads nothing but the dense model's distribution."""
    return not loss_weights(settings)[0]


def reads_teacher(settings: Training, references: Collection[str]) -> bool:
    """Whether the dense model is needed: its distribution, or text that it writes."""
    return learns_from_teacher(settings) or SELF in references


def labels_whole_chats(settings: RecoverySettings) -> bool:
    """Whether every token of a chat is labelled, not the answers' alone."""
    if settings.chat_labels == "auto":
        return distils_alone(settings)
    return settings.chat_labels == "all"


def learning_rate(settings: RecoverySettings) -> float:
    """The peak learning rate: the one set, or the method's for the loss."""
    method = method_of(settings)
    own = (distils_alone(settings) and method.distill_rate) or method.learning_rate
    return own if settings.learning_rate is None else settings.learning_rate


def learning_rate_share(warmup_ratio: float, steps: int, step: int) -> float:
    """Share of the peak learning rate at step t of T; it rises linearly, then falls as a cosine, and is never zero.

    (t + 1) / (w + 1)  for t < w = floor(warmup_ratio * T),    (1 + cos(pi (t - w) / (T - w))) / 2  from there
    """
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
