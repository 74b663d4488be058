"""Where `eval` runs a model: on this machine, or in the engine of a target that can be asked about texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from cfsp.settings import Reads, Settings, declared, setting
from runtime_bench.engines import SessionSettings
from runtime_bench.targets.table import READS as TARGET_READS
from runtime_bench.targets.table import TARGETS, TargetOptions, find_row, open_targets
from runtime_bench.workload import BenchSettings

if TYPE_CHECKING:
    from phoneready.evaluation.far_model import AnsweringTarget, HeldModel
    from phoneready.evaluation.models import OpenSettings
    from phoneready.evaluation.settings import EvaluationSettings

HERE = "local"
_JUDGED = "--text, --chats, --tasks, --prompt, --prompts"
_PLACES = ", ".join(row.form for name, row in TARGETS.items() if row.answers or name == HERE)
_TARGET = {row.name: row.setting for row in declared(TargetOptions)}
_BENCH = {row.name: row.setting for row in declared(BenchSettings)}


@dataclass(frozen=True)
class PlaceSettings(Settings):
    """Where the model runs, and what is needed for it there."""

    on: str = setting(
        HERE, f"Where MODEL reads texts, does its tasks and writes its answers: {_PLACES}.", metavar="TARGET"
    )
    against_host: int = setting(
        8, "With --on: hold so many of the first answers against the same engine's here.", ge=0, metavar="N"
    )
    backend: str | None = setting(None, _BENCH["backend"])
    timeout_s: float = setting(
        3600.0, "With --on: seconds after which a process there is ended.", gt=0, le=10**6, option="--timeout"
    )
    runner: Path | None = setting(None, _TARGET["runner"])
    ndk: Path | None = setting(None, _TARGET["ndk"])
    remote_folder: str | None = setting(None, _TARGET["remote_folder"])
    ssh_config: Path | None = setting(None, _TARGET["ssh_config"])
    retries: int = setting(TargetOptions.retries, _TARGET["retries"])

    @property
    def is_here(self) -> bool:
        """Whether the model runs on this machine."""
        return self.on == HERE

    @property
    def target_options(self) -> TargetOptions:
        """What the target is opened with."""
        names = {option.name for option in fields(self)} & {option.name for option in fields(TargetOptions)}
        return TargetOptions(**{name: getattr(self, name) for name in names})


READS: Reads = MappingProxyType(
    {
        **dict.fromkeys(
            ("against_host", "timeout_s"), (lambda asked, names: not asked.is_here, "without --on TARGET")
        ),
        **TARGET_READS,
    }
)
"""Used with the names of the targets, which here are one."""


def check_place(place: PlaceSettings, settings: EvaluationSettings) -> None:
    """Refuse what a place has no use for, or cannot do, before anything is opened.

    Raises:
        InputError: No such target, one that cannot be asked about texts, options without effect, or something to judge
            that needs every logit.
    """
    if place.is_here:
        open_targets([HERE], place.target_options)
        if place.backend is not None:
            raise InputError("--backend is for another place: give --on TARGET, too")
        return
    if not find_row(place.on)[0].answers:
        raise InputError("cannot be asked about texts", field="--on", value=place.on, allowed=_PLACES)
    needs: dict[str, object] = {"--metric": settings.metrics, "--sampled": settings.sampled}
    for option in (option for option, asked in needs.items() if asked):
        raise InputError(
            f"{option} needs the probability of every token, which do not travel",
            field="--on",
            value=place.on,
            allowed=_JUDGED,
        )
    if not (settings.tasks or settings.prompts or settings.sources):
        raise InputError("nothing to judge", field="--on", value=place.on, allowed=_JUDGED)


@contextmanager
def open_elsewhere(
    reference: str,
    runtime: str,
    place: PlaceSettings,
    opening: OpenSettings,
    *,
    progress: Progress = no_progress,
) -> Iterator[HeldModel]:
    """Open a model on a target for the time of a `with` block; nothing runs there between questions.

    Raises:
        InputError: No exported file, or the target cannot run it.
        PhonereadyError: The target's program cannot be built.
    """
    from cfsp.evaluation.harness import MAX_CONTEXT
    from phoneready.evaluation.far_model import FarLanguageModel, HeldModel
    from phoneready.evaluation.models import BY_RUNTIME, check_cache

    family = BY_RUNTIME.get(runtime)
    if family is None:
        kinds = ", ".join(one.title for one in BY_RUNTIME.values())
        raise InputError("no exported file", field="model", value=reference, allowed=kinds)
    family.check_claim(reference)
    check_cache(runtime, opening.cache_type)
    (target,) = open_targets([place.on], place.target_options, progress)
    target.require(runtime)
    outline = family.outline(reference, MAX_CONTEXT)
    session = SessionSettings(
        n_ctx=outline.context_length,
        n_threads=opening.threads or target.environment().cpus_usable or 1,
        n_batch=outline.n_batch,
        n_ubatch=outline.n_batch,
        cache_type=opening.cache_type or outline.cache_type,
        backend=place.backend,
        n_seq=outline.n_seq,
    )
    far = FarLanguageModel(
        reference,
        runtime,
        outline,
        cast("AnsweringTarget", target),
        session,
        cache_type=opening.cache_type,
        timeout_s=place.timeout_s,
    )
    held = place.against_host > 0
    here = family.open_model(reference, MAX_CONTEXT, opening.threads, opening.cache_type) if held else None
    model = HeldModel(far, here, place.against_host)
    try:
        yield model
    finally:
        model.close()
