"""The whole of release.toml as one frozen model."""

from __future__ import annotations

from typing import Annotated

import pydantic

from cfsp.pruning.settings import PruneSettings
from cfsp.settings import SEED
from cfsp.validation import Section
from exporters.families import required_multiple
from phoneready.figures.budgets import BudgetConfig
from phoneready.settings.sections import (
    BaselineConfig,
    BenchConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    PruneConfig,
    RecoverConfig,
)
from phoneready.settings.tracking import TrackingConfig
from phoneready.settings.tune_section import TuneConfig


class ReleaseConfig(Section):
    """A whole release."""

    model: ModelConfig
    seed: Annotated[int, SEED] = 0
    prune: PruneConfig = pydantic.Field(default_factory=PruneConfig)
    recover: RecoverConfig | None = None
    evaluate: EvaluateConfig = pydantic.Field(default_factory=EvaluateConfig)
    export: ExportConfig = pydantic.Field(default_factory=ExportConfig)
    bench: BenchConfig = pydantic.Field(default_factory=BenchConfig)
    baseline: BaselineConfig | None = None
    budgets: tuple[BudgetConfig, ...] = ()
    tune: TuneConfig | None = None
    tracking: TrackingConfig | None = None

    def prune_settings(self) -> PruneSettings:
        """For cfsp; widths fit the formats unless an alignment is set."""
        return self.prune.settings(required_multiple(self.export.names))
