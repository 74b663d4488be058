"""Opening a model for judgement in the runtime that it is meant for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cfsp.devices import CPU
from cfsp.errors import InputError
from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.tasks import MAX_CONTEXT
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.reference import load_model
from cfsp.progress import Progress, no_progress
from exporters.families import FAMILIES


@dataclass(frozen=True)
class OpenSettings:
    """How to open a model: the longest window that will be run, threads outside torch (None: torch's number), the type
    of keys and values (None: that of proofs), and what torch keeps weights in (`cfsp.precision.DTYPES`)."""

    seqlen: int = 1024
    threads: int | None = None
    device: torch.device = CPU
    cache_type: str | None = None
    dtype: str = "auto"


BY_RUNTIME = {family.runtime: family for family in FAMILIES.values()}
"""Runtime -> the family of exports whose files it runs."""
TORCH = "torch"
RUNTIMES = (*BY_RUNTIME, TORCH)
"""What runs models: the runtime of each family of exports, and torch, which takes all else."""


def runtime_for(reference: str, chosen: str | None = None) -> str:
    """The name of the runtime to use for a reference.

    Raises:
        InputError: `chosen` is unknown.
    """
    if chosen is None:
        return next((name for name, family in BY_RUNTIME.items() if family.claims(reference)), TORCH)
    if chosen not in RUNTIMES:
        raise InputError("unknown runtime", field="runtime", value=chosen, allowed=", ".join(RUNTIMES))
    return chosen


def check_cache(runtime: str, cache_type: str | None) -> None:
    """Check that a runtime can hold keys and values in a type; None is that of proofs.

    Raises:
        InputError: It cannot.
    """
    if runtime != TORCH:
        BY_RUNTIME[runtime].check_cache(cache_type)
    elif cache_type is not None:
        raise InputError("torch keeps keys and values as it computes them", field="cache_type")


def own_cache(runtime: str) -> str | None:
    """The type of keys and values that phones run with if nothing is asked for; None for that of proofs."""
    return BY_RUNTIME[runtime].own_cache if runtime in BY_RUNTIME else None


@contextmanager
def open_language_model(
    reference: str, runtime: str, settings: OpenSettings, *, progress: Progress = no_progress
) -> Iterator[LanguageModel]:
    """Open a model for the time of a `with` block.

    Raises:
        InputError: The runtime cannot run it, or its context is shorter than a window.
    """
    model: LanguageModel
    check_cache(runtime, settings.cache_type)
    if runtime == TORCH:
        model = TorchLanguageModel(
            load_model(
                reference,
                device=settings.device,
                dtype=settings.dtype,
                may_stream=True,
                progress=progress,
            )
        )
    else:
        BY_RUNTIME[runtime].check_claim(reference)
        n_tokens = max(settings.seqlen, MAX_CONTEXT)
        model = BY_RUNTIME[runtime].open_model(reference, n_tokens, settings.threads, settings.cache_type)
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
