"""What the page is made from: records alone, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfsp.records import read_record
from phoneready.evaluation.sweep import Sweep
from phoneready.figures.verdict import VERDICTS_FILE, Verdicts
from phoneready.release.results import ReleaseFigures
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices.model_facts import ModelFacts
from runtime_bench.devices.profile import find_profile, load_profiles
from runtime_bench.devices.projection import Projection, project


@dataclass(frozen=True)
class DeviceProjections:
    """One file on all devices that have a profile.

    Attributes:
        file: Its name.
        n_ctx: Tokens of the context.
        projections: One a device.
        names: Id of a device to its name.
    """

    file: str
    n_ctx: int
    projections: tuple[Projection, ...]
    names: Mapping[str, str]


@dataclass(frozen=True)
class ReportInput:
    """Everything that the page shows.

    Attributes:
        config: What was asked for.
        figures: What the stages found.
        versions: Packages and runtimes.
        commands: The same, command by command.
        seconds: Stage to its duration.
        verdicts: Of the budgets; None where none are set.
        projections: Of the pruned GGUF files.
        sweep: Quality over several ratios, where there is one.
    """

    config: ReleaseConfig
    figures: ReleaseFigures
    versions: Mapping[str, str]
    commands: tuple[str, ...]
    seconds: Mapping[str, float]
    verdicts: Verdicts | None = None
    projections: tuple[DeviceProjections, ...] = ()
    sweep: Sweep | None = None


def read_verdicts(folder: Path) -> Verdicts | None:
    """The verdicts that a release's gate left in its folder; None where it left none.

    Raises:
        InputError: The file cannot be used.
    """
    file = folder / VERDICTS_FILE
    return read_record(Verdicts, file) if file.is_file() else None


def project_files(
    files: Mapping[str, ModelFacts], devices: Sequence[str], n_ctx: int
) -> tuple[DeviceProjections, ...]:
    """Project files onto devices.

    Args:
        files: Name to what a projection needs.
        devices: Ids of profiles; all where there are none.
        n_ctx: Tokens of the context, where the model knows as many.
    """
    known = load_profiles()
    profiles = [find_profile(device, known).profile for device in devices or known]
    names = {profile.id: profile.name for profile in profiles}
    found = []
    for name, facts in files.items():
        context = min(n_ctx, facts.context_length)
        rows = tuple(project(profile, facts, context) for profile in profiles)
        found.append(DeviceProjections(name, context, rows, names))
    return tuple(found)
