"""The whole way from a dense model to a pruned one, in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cfsp.calibration import Calibration
from cfsp.model_reference import LoadedModel
from cfsp.plan import PruneSettings, PruningPlan, apply_plan, check_plan_fits, check_settings, make_plan
from cfsp.progress import Progress, no_progress
from cfsp.statistics import BlockStatistics, collect_input_moments, collect_statistics

__all__ = ["PruneResult", "moment_windows", "plan_for", "prune_model"]

MOMENT_WINDOWS = 16
"""Windows behind the activation moments that quantizers use; more does not change what they choose."""


@dataclass(frozen=True)
class PruneResult:
    """What pruning leaves beside the changed model.

    Attributes:
        plan: Which channels were kept, and why.
        input_moments: Module name -> (in_features,) mean squared input in the PRUNED model.
    """

    plan: PruningPlan
    input_moments: dict[str, torch.Tensor]


def prune_model(
    loaded: LoadedModel,
    calibration: Calibration,
    settings: PruneSettings,
    *,
    plan: PruningPlan | None = None,
    progress: Progress = no_progress,
) -> PruneResult:
    """Prune `loaded.model` in place.

    Args:
        loaded: The dense model.
        calibration: Windows the statistics are taken from.
        settings: How to prune; ignored where `plan` is given.
        plan: A plan to apply instead of making one.
        progress: Told about each step.

    Raises:
        InputError: Settings or a plan that do not fit the model.
    """
    if plan is None:
        check_settings(settings)
    else:
        check_plan_fits(loaded.model, plan)
        settings = plan.settings
    with_gram = settings.reconstruct and settings.prune_ratio > 0
    statistics = collect_statistics(
        loaded.model, calibration.input_ids, with_gram=with_gram, progress=progress
    )
    if plan is None:
        plan = plan_for(loaded, statistics, calibration, settings)
    apply_plan(loaded.model, plan, grams=statistics.grams, progress=progress)
    moments = collect_input_moments(loaded.model, moment_windows(calibration.input_ids), progress=progress)
    return PruneResult(plan, moments)


def plan_for(
    loaded: LoadedModel, statistics: BlockStatistics, calibration: Calibration, settings: PruneSettings
) -> PruningPlan:
    """A plan that records where its model and its calibration came from.

    Raises:
        InputError: As `make_plan`.
    """
    return make_plan(
        loaded.model,
        statistics,
        settings,
        source=loaded.source.reference,
        source_sha256=loaded.source.sha256,
        calibration=calibration.sources,
        calibration_sha256=calibration.sha256,
        seed=calibration.seed,
    )


def moment_windows(input_ids: torch.Tensor) -> torch.Tensor:
    """The calibration windows that activation moments are measured on, spread so that every source is among them."""
    step = max(1, len(input_ids) // MOMENT_WINDOWS)
    return input_ids[::step][:MOMENT_WINDOWS]
