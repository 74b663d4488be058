"""How to recover: methods, losses, and everything that is set about training."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cfsp.errors import InputError, require_extra
from cfsp.settings import SEED, Reads, Settings, as_read, setting
from cfsp.settings import check_settings as check_fields
from cfsp.text.settings import SELF, TEXT_FORMS

if TYPE_CHECKING:
    from cfsp.recovery.rounding import Rounding


class Method(NamedTuple):
    """What is trained."""

    learning_rate: float  # default peak learning rate
    distill_rate: float | None = None  # that of distillation alone, if it is another
    adapter: bool = False  # low-rank adapters that are merged afterwards, not all weights
    by_importance: bool = False  # ranks follow the plan's coarse importances
    through_rounding: bool = False  # what a file of few bits leaves open: scales of its blocks, and norms


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ig-lora": Method(1e-3, adapter=True, by_importance=True),
        "lora": Method(1e-3, adapter=True),
        "full": Method(2e-4, distill_rate=5e-5),
        "scales": Method(5e-4, through_rounding=True),
    }
)
AUTO = "auto"
DISTILL = "distill"
LOSSES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"next-token": (1.0, 0.0), DISTILL: (0.0, 1.0), "both": (0.5, 0.5)}
)
"""Name -> weights of the next-token loss and of distillation."""


@dataclass(frozen=True)
class Training(Settings):
    """How to train; the defaults are what phoneready recommends."""

    method: str = setting(
        AUTO,
        "ig-lora (ranks by importance), lora, full (all weights), or scales (of --for-quant).",
        choices=(AUTO, *METHODS),
        shown="ig-lora; scales with --for-quant",
    )
    for_quant: str | None = setting(
        None,
        "Train what a file of this format leaves open, through its rounding: quantize writes its numbers.",
        metavar="FORMAT",
        example="Q4_0",
    )
    rank: int = setting(16, "Mean rank of the adapters.", ge=1, le=65536, rare=True)
    alpha: float = setting(
        2.0, "LoRA's alpha, as a multiple of the rank; the same in every block.", gt=0, rare=True
    )
    loss: str = setting(
        DISTILL, "next-token, distill (from the teacher), or both alike.", choices=tuple(LOSSES)
    )
    learning_rate: float | None = setting(
        None,
        "Peak.",
        gt=0,
        shown="1e-3 for adapters, 5e-4 for scales; for full 5e-5, 2e-4 with the next token",
        example=1e-3,
    )
    max_tokens: int = setting(
        1_000_000, "Training budget in input tokens, over all processes.", ge=1, le=10**15
    )
    seqlen: int = setting(512, "Tokens in a training sequence.", ge=2, le=2**20, rare=True)
    batch_size: int = setting(4, "Sequences in a forward pass, on each process.", ge=1, le=2**16, rare=True)
    gradient_accumulation_steps: int = setting(
        1, "Forward passes behind one step, on each process.", ge=1, le=2**20, rare=True
    )
    warmup_ratio: float = setting(
        0.05, "Share of the steps in which the learning rate rises.", ge=0, lt=1, rare=True
    )
    weight_decay: float = setting(0.0, "AdamW's.", ge=0, rare=True)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to it.", gt=0, rare=True)
    dtype: str = setting(
        "auto", "Of matrix products: auto, float32 or bfloat16.", choices="cfsp.precision:PRODUCTS", rare=True
    )
    eval_every: int | None = setting(
        None,
        "Steps between validations, each with a checkpoint.",
        ge=1,
        shown="a tenth of all; more of short runs",
        example=100,
        rare=True,
    )
    patience: int = setting(
        0, "Stop after so many validations without a new best; 0: never.", ge=0, rare=True
    )
    validation_windows: int = setting(
        16, "Most validation sequences; of several texts at least one of each.", ge=1, le=2**20, rare=True
    )
    self_tokens: int = setting(131_072, "Most tokens sampled for the reference `self`.", ge=1, rare=True)
    report_to: tuple[str, ...] = setting(
        (),
        "Trackers, as accelerate names them: tensorboard, mlflow, wandb, ...",
        metavar="NAME,...",
        shown="none",
        rare=True,
    )


@dataclass(frozen=True)
class RecoverySettings(Training):
    """How to train, and the seed of initial adapters, shuffling and sampling."""

    seed: int = setting(0, SEED)


@dataclass(frozen=True)
class RecoveryReferences(Settings):
    """What to train on."""

    data: tuple[str, ...] = setting(
        (SELF,),
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


def check_settings(settings: RecoverySettings) -> None:
    """Raise InputError for values that cannot be used, alone or beside each other."""
    check_fields(settings)
    settled(settings)


def usable(
    settings: RecoverySettings, references: Sequence[str], rounding: Rounding | None
) -> RecoverySettings:
    """Settings with everything said, and defaults for what nothing reads.

    Raises InputError: settings that cannot be used, with this data or these packages; MissingExtraError: without the
    `recover` extra.
    """
    check_settings(settings)
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
    """Settings whose method is said; InputError for one that does not go with `for_quant`."""
    through = settings.for_quant is not None
    method = settings.method if settings.method != AUTO else ("scales" if through else "ig-lora")
    if METHODS[method].through_rounding != through:
        allowed = "scales, if for_quant is set" if through else "ig-lora, lora, full; scales with for_quant"
        raise InputError("does not go with for_quant", field="method", value=method, allowed=allowed)
    return replace(settings, method=method)


_READS: Reads = MappingProxyType(
    {
        **dict.fromkeys(
            ("rank", "alpha"), (lambda asked, _: method_of(asked).adapter, "without --method ig-lora or lora")
        ),
        "self_tokens": (lambda _, references: SELF in references, "without the reference self"),
    }
)
"""Used with the references that are trained and validated on."""


def training_as_read(
    settings: _Training, references: Collection[str], section: str = ""
) -> tuple[_Training, tuple[str, ...]]:
    """`as_read` of settings of training; InputError as `settled`."""
    return as_read(settings, _READS, references, section=section)


def method_of(settings: Training) -> Method:
    """The row of what is trained."""
    return METHODS[settled(settings).method]


def learns_from_teacher(settings: Training) -> bool:
    """Whether the loss reads the dense model's distribution."""
    return LOSSES[settings.loss][1] > 0


def reads_teacher(settings: Training, references: Collection[str]) -> bool:
    """Whether the dense model is needed: its distribution, or text that it writes."""
    return learns_from_teacher(settings) or SELF in references


def learning_rate(settings: RecoverySettings) -> float:
    """The peak learning rate: the one set, or the method's for the loss."""
    method = method_of(settings)
    own = (settings.loss == DISTILL and method.distill_rate) or method.learning_rate
    return own if settings.learning_rate is None else settings.learning_rate
