"""Opening a model for judgement in the runtime that it is meant for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.evaluation.harness import MAX_CONTEXT
from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.progress import Progress, no_progress
from exporters.families import FAMILIES
from exporters.family import ExportFamily


@dataclass(frozen=True)
class OpenSettings:
    """How to open a model.

    Attributes:
        seqlen: Longest window that will be run.
        trust_remote_code: Let transformers run code that a folder or hub model brings along.
        threads: Threads outside torch; torch's number where None.
    """

    seqlen: int = 1024
    trust_remote_code: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Runtime:
    """Something that runs models.

    Attributes:
        opens: Opens a reference.
        claims: Whether a reference is meant for this runtime, so that it is the default for it.
    """

    opens: Callable[[str, OpenSettings, Progress], LanguageModel]
    claims: Callable[[str], bool]


def _open_torch(reference: str, settings: OpenSettings, progress: Progress) -> LanguageModel:
    from cfsp.models.reference import load_model

    loaded = load_model(reference, trust_remote_code=settings.trust_remote_code, progress=progress)
    return TorchLanguageModel(loaded)


def _runtime(family: ExportFamily) -> Runtime:
    def opens(reference: str, settings: OpenSettings, progress: Progress) -> LanguageModel:
        family.check_claim(reference)
        model: LanguageModel = family.open_model(
            reference, max(settings.seqlen, MAX_CONTEXT), settings.threads
        )
        return model

    return Runtime(opens, family.claims)


RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {family.runtime: _runtime(family) for family in FAMILIES.values()}
    | {"torch": Runtime(_open_torch, lambda reference: True)}
)
"""Name -> runtime; the first that claims a reference is its default."""


def runtime_for(reference: str, chosen: str | None = None) -> str:
    """The name of the runtime to use for a reference.

    Raises:
        InputError: `chosen` is unknown.
    """
    if chosen is None:
        return next(name for name, runtime in RUNTIMES.items() if runtime.claims(reference))
    if chosen not in RUNTIMES:
        raise InputError("unknown runtime", field="runtime", value=chosen, allowed=", ".join(RUNTIMES))
    return chosen


@contextmanager
def open_language_model(
    reference: str, runtime: str, settings: OpenSettings, *, progress: Progress = no_progress
) -> Iterator[LanguageModel]:
    """Open a model for the time of a `with` block.

    Raises:
        InputError: The runtime cannot run it, or its context is shorter than a window.
    """
    model = RUNTIMES[runtime].opens(reference, settings, progress)
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
