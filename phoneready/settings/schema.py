"""release.toml as frozen models: settings as those who read them declare them, and what is a release's alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self

import pydantic

from cfsp.errors import InputError
from cfsp.pruning.settings import ALIGN, PruneSettings
from cfsp.recovery.settings import (
    DISTILL,
    RecoveryReferences,
    RecoverySettings,
    Training,
    check_settings,
)
from cfsp.settings import DEVICE, DTYPE, SEED, Reads, Settings, pick, setting
from cfsp.text.settings import BUILTIN_TEXT, SELF, CalibrationSettings
from cfsp.validation import Section
from exporters.families import DEFAULT_FORMAT, ROUNDING, FileSettings, find_format, required_multiple
from phoneready.evaluation.settings import EvaluationSettings, JudgementSettings
from phoneready.figures.figures import ENERGY_OF, BudgetConfig, measured_place, metric_of
from runtime_bench.devices import CONTEXT, DEFAULT_CONTEXT, FACTS, find_profile, load_profiles
from runtime_bench.targets.table import check_target
from runtime_bench.workload import BenchSettings, SamplingSettings, workloads_of


class ModelConfig(Section):
    """Which model; `reference` as in cfsp.models.reference."""

    reference: str = pydantic.Field(min_length=1)
    device: Annotated[str, DEVICE] = "auto"
    dtype: Annotated[str, DTYPE] = "auto"


@dataclass(frozen=True)
class CountedText(Settings):
    """What the choice of a vocabulary counts."""

    vocabulary_text: tuple[str, ...] = setting(
        (),
        "Text whose tokens decide which of the vocabulary are kept; each counts alike.",
        shown="the calibration windows",
        rare=True,
    )


COUNTED: Reads = MappingProxyType(
    {
        "vocabulary_text": (
            lambda asked, trims: trims,
            "without a number of tokens to keep",
        )
    }
)
"""Whether it is counted, of settings and whether tokens may go."""


@dataclass(frozen=True)
class PruneConfig(CountedText, CalibrationSettings, PruneSettings):
    """How to prune, and with what text."""

    for_quant: tuple[str, ...] = setting(
        (),
        "Quantizations and ONNX variants that widths must fit.",
        option="--for --for-quant",
        look_up=lambda name: find_format(name).name,
        metavar="QUANT,...",
        shown=f"{DEFAULT_FORMAT}; in release.toml what [quantize] makes",
    )
    align: int = setting(
        0,
        replace(
            ALIGN, help=f"{ALIGN.help[:-1]}; 0: what the quantizations need.", ge=0, shown="from --for-quant"
        ),
    )

    def settings(self, align: int) -> PruneSettings:
        """For cfsp, with the alignment to use if none is set."""
        return pick(PruneSettings, self, align=self.align or align)

    @property
    def removes_nothing(self) -> bool:
        """Whether the pruned model is the dense one."""
        return self.keeps_blocks and not self.vocabulary


@dataclass(frozen=True)
class RecoverConfig(Training, RecoveryReferences):
    """Training after pruning; the section's presence turns it on."""

    def settings(self, seed: int) -> RecoverySettings:
        """For cfsp."""
        return pick(RecoverySettings, self, seed=seed)

    def check(self) -> None:
        """Raise InputError if nothing can be trained so, or not through the rounding of that format."""
        check_settings(self.settings(0))
        if self.for_quant is not None:
            ROUNDING.check(self.for_quant)


@dataclass(frozen=True)
class EvaluateConfig(JudgementSettings):
    """What the models are judged on."""

    text: tuple[str, ...] = setting((BUILTIN_TEXT,), "Text to measure on.")
    chats: tuple[str, ...] = setting(
        (SELF,), "Chats to measure on; `self`: sampled from the dense model with another seed."
    )
    files: tuple[str, ...] = setting(
        (),
        'Files that do tasks and own metrics, too, such as "Q4_0"; all are measured on texts and asked.',
        look_up=lambda name: find_format(name).name,
    )

    @property
    def judges_files(self) -> bool:
        """Whether a file does tasks or own metrics."""
        return bool(self.files and (self.tasks or self.metrics))

    def settings(self, seed: int, prompts: tuple[str, ...]) -> EvaluationSettings:
        """For phoneready.evaluation, with the questions to ask."""
        return pick(EvaluationSettings, self, seed=seed, prompts=prompts)


@dataclass(frozen=True)
class QuantizeConfig(FileSettings):
    """What is made; of a pruned or trained model's dense one, too."""

    made: Path | None = setting(
        None,
        "Folder of `search` or `quantize` whose files ship as they are, proven here; what it lacks is made.",
        example="search",
    )

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
        look_up=check_target,
    )
    devices: tuple[str, ...] = setting(
        (), "Profiles for which memory and speed are projected: phoneready devices list.", look_up=_profile_id
    )
    files: tuple[str, ...] = setting(
        (),
        "Quantizations and variants to measure; all when empty.",
        look_up=lambda name: find_format(name).name,
    )
    anchor: str | None = setting(
        None,
        "A file to measure in turns with the others: baselines and history compare speeds in multiples of its.",
        example="reference.gguf",
    )
    n_ctx: int = setting(DEFAULT_CONTEXT, replace(CONTEXT, help="Tokens of the context in projections."))
    decide_s: float = setting(
        600.0,
        "Seconds at a target in which rows are measured on at most, where their samples leave a budget on speeds open.",
        ge=0,
        le=86_400,
    )

    def settings(self, seed: int) -> BenchSettings:
        """For runtime_bench."""
        return pick(BenchSettings, self, seed=seed)

    def measured(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Of exported quantizations and variants, those that are measured."""
        return tuple(name for name in names if not self.files or name in self.files)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured of each file."""
        workloads = workloads_of(self.settings(0))
        energies = (ENERGY_OF + one.test for one in workloads if one.is_rate and self.energy)
        return (*(one.test for one in workloads), *energies, "peak_rss_bytes")


class BaselineConfig(Section):
    """An earlier release's figures.json, for budgets relative to the baseline."""

    file: Path


class TrackingConfig(Section):
    """Where releases are logged; the section's presence turns it on.

    Attributes:
        mlflow: MLflow's tracking URI: `sqlite:///FILE.db`, `http://HOST:PORT`.
        experiment: Name of the experiment; made when missing.
        files: Log the exported files too, not only records and reports.
    """

    mlflow: str = pydantic.Field(min_length=1)
    experiment: str = pydantic.Field(default="phoneready", min_length=1)
    files: bool = False


_SIZES = MappingProxyType(
    {
        "prune": ("seqlen",),
        "recover": ("seqlen",),
        "evaluate": ("seqlen",),
        "bench": ("n_prompt", "n_gen", "ttft"),
    }
)
"""Section -> its numbers of tokens that a model reads at once."""


class ReleaseConfig(Section):
    """A whole release."""

    model: ModelConfig
    seed: Annotated[int, SEED] = 0
    prune: PruneConfig = pydantic.Field(default_factory=PruneConfig)
    recover: RecoverConfig | None = None
    evaluate: EvaluateConfig = pydantic.Field(default_factory=EvaluateConfig)
    quantize: QuantizeConfig = pydantic.Field(default_factory=QuantizeConfig)
    bench: BenchConfig = pydantic.Field(default_factory=BenchConfig)
    baseline: BaselineConfig | None = None
    budgets: tuple[BudgetConfig, ...] = ()
    tracking: TrackingConfig | None = None

    _warnings: tuple[str, ...] = pydantic.PrivateAttr(default=())
    _stated: frozenset[str] = pydantic.PrivateAttr(default=frozenset())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the file says and nothing reads, which has its default here."""
        return self._warnings

    def fitted(self, context: int) -> Self:
        """With defaults of no more tokens than the model's context; raises InputError for what is stated and longer."""
        changed, shortened, problems = dict[str, Any](), list[str](), list[str]()
        for section, names in _SIZES.items():
            for name in names if getattr(self, section) is not None else ():
                settings = changed.get(section, getattr(self, section))
                sizes, place = getattr(settings, name), f"{section}.{name}"
                least = (
                    tuple(min(one, context) for one in sizes)
                    if isinstance(sizes, tuple)
                    else min(sizes, context)
                )
                if least == sizes:
                    continue
                if place in self._stated:
                    found = f"longer than the model's context (got {sizes}); allowed: up to {context}"
                    problems.append(f"{place}: {found}")
                changed[section] = replace(settings, **{name: least})
                shortened.append(f"{place} is {least}, as the model's context is no longer")
        if problems:
            raise InputError("; ".join(problems))
        return self.model_copy(update=changed).with_warnings(shortened)

    def with_warnings(self, warnings: Iterable[str]) -> Self:
        """The same, with further warnings."""
        warned = self.model_copy()
        warned._warnings = (*self._warnings, *warnings)
        return warned

    def prune_settings(self) -> PruneSettings:
        """For cfsp; widths fit the formats unless an alignment is set."""
        return self.prune.settings(required_multiple((*self.quantize.names, *self.prune.for_quant)))

    @property
    def is_whole(self) -> bool:
        """Whether what ships is the model itself, quantized: nothing is removed, nothing trained."""
        return self.recover is None and self.prune.removes_nothing

    def timed_budgets(self, place: str) -> tuple[BudgetConfig, ...]:
        """Budgets on speeds, times and energy at a target."""
        here = measured_place(place)
        return tuple(
            one
            for one in self.budgets
            if (metric_of(one.metric).is_speed or metric_of(one.metric).metered)
            and here in (one.targets or (here,))
        )

    def speed_budgets(self, place: str) -> tuple[BudgetConfig, ...]:
        """Budgets on speeds at a target that more samples may decide, if there is time for that."""
        return tuple(
            one for one in self.timed_budgets(place) if self.bench.decide_s and metric_of(one.metric).is_speed
        )

    @property
    def learns_nothing(self) -> bool:
        """Whether what is trained is the dense model, and all that it learns its own distribution."""
        how = self.recover
        return (
            how is not None and self.prune.removes_nothing and how.loss == DISTILL and how.for_quant is None
        )
