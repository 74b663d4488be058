"""What would end a training after hours, found before a model is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from cfsp.errors import InputError, require_extra
from cfsp.recovery.rounding import Rounding
from cfsp.recovery.settings import (
    STUDENT,
    RecoverySettings,
    check_settings,
    method_of,
    settled,
    training_as_read,
)
from cfsp.text.settings import SELF
from cfsp.text.tokens import load_documents

_HUB = "hub:"


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
        from cfsp.recovery.trainer import check_trackers

        check_trackers(named)
    if settings.for_quant is not None:
        if rounding is None:
            raise InputError("no formats are known here", field="for_quant", value=settings.for_quant)
        rounding.check(settings.for_quant)
    return settings


def check_readable(references: Iterable[str]) -> None:
    """Read the files of text references, each once; not what models write or what is to be downloaded.

    Raises:
        InputError: One cannot be read, or has nothing usable in it.
        MissingExtraError: parquet without the `data` extra.
    """
    for reference in dict.fromkeys(references):
        if reference not in (SELF, STUDENT) and not reference.startswith(_HUB):
            load_documents(reference)
