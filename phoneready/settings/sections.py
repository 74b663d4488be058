"""The sections of release.toml: settings as those who read them declare them, and what is a release's alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydantic

from cfsp.pruning.settings import PruneSettings
from cfsp.recovery.settings import RecoveryReferences, RecoverySettings, Training
from cfsp.settings import pick, setting
from cfsp.text.settings import BUILTIN_TEXT, SELF, CalibrationSettings
from cfsp.validation import Section
from exporters.settings import ExportFormats
from phoneready.evaluation.settings import EvaluationSettings, JudgementSettings
from runtime_bench.devices.model_facts import FACTS
from runtime_bench.devices.profile import find_profile, load_profiles
from runtime_bench.targets.places import check_place
from runtime_bench.workload import BenchSettings, SamplingSettings, workloads_of


class ModelConfig(Section):
    """Which model; `reference` as in cfsp.models.reference."""

    reference: str = pydantic.Field(min_length=1)
    trust_remote_code: bool = False


@dataclass(frozen=True)
class PruneConfig(CalibrationSettings, PruneSettings):
    """How to prune, and with what text."""

    align: int = setting(
        0, "Widths are multiples of this; 0: what the quantizations need.", ge=0, shown="from --for-quant"
    )

    def settings(self, align: int) -> PruneSettings:
        """For cfsp, with the alignment to use where none is set."""
        return pick(PruneSettings, self, align=self.align or align)


@dataclass(frozen=True)
class RecoverConfig(Training, RecoveryReferences):
    """Training after pruning; the section's presence turns it on."""

    def settings(self, seed: int) -> RecoverySettings:
        """For cfsp."""
        return pick(RecoverySettings, self, seed=seed)


@dataclass(frozen=True)
class EvaluateConfig(JudgementSettings):
    """What the models are judged on."""

    text: tuple[str, ...] = setting((BUILTIN_TEXT,), "Text to measure on.")
    chats: tuple[str, ...] = setting(
        (SELF,), "Chats to measure on; `self`: sampled from the dense model with another seed."
    )
    files: tuple[str, ...] = setting((), 'Exports that are judged in their own runtime, too, such as "Q4_0".')

    def settings(self, seed: int, prompts: tuple[str, ...]) -> EvaluationSettings:
        """For phoneready.evaluation, with the questions to ask."""
        return pick(EvaluationSettings, self, seed=seed, prompts=prompts)


@dataclass(frozen=True)
class ExportConfig(ExportFormats):
    """What is made, of the dense model too."""

    @property
    def projected(self) -> tuple[str, ...]:
        """Formats whose files are projected to devices."""
        return tuple(name for family, names in self.formats.items() for name in names if family in FACTS)


def _profile_id(name: str) -> str:
    return find_profile(name, load_profiles()).profile.id


@dataclass(frozen=True)
class BenchConfig(SamplingSettings):
    """What is measured where."""

    targets: tuple[str, ...] = setting(
        ("local",),
        'Where: "constrained:400M", "constrained:pixel-8a", ...; docs/targets.md.',
        look_up=check_place,
    )
    devices: tuple[str, ...] = setting(
        (), "Profiles for which memory and speed are projected: phoneready devices list.", look_up=_profile_id
    )
    files: tuple[str, ...] = setting((), "Quantizations and variants to measure; all when empty.")
    n_ctx: int = setting(2048, "Tokens of the context in projections.", ge=1, le=2**24)

    def settings(self, seed: int) -> BenchSettings:
        """For runtime_bench."""
        return pick(BenchSettings, self, seed=seed)

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the workloads."""
        return tuple(workload.test for workload in workloads_of(self.settings(0)))


class BaselineConfig(Section):
    """An earlier release's figures.json, for budgets relative to the baseline."""

    file: Path
