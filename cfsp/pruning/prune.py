"""The whole way from a dense model to a pruned one, in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.cutting import RECONSTRUCTIONS
from cfsp.pruning.gradients import collect_gradients
from cfsp.pruning.plan import PruningPlan, apply_plan, check_plan_fits, make_plan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import BlockStatistics, collect_input_moments, collect_statistics
from cfsp.settings import check_settings
from cfsp.text.calibration import Calibration

MOMENT_WINDOWS = 16
"""Windows behind the activation moments that quantizers use; more does not change what they choose."""
GRADIENT_WINDOWS = 32
"""Windows behind the gradients of the loss."""


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
    ids, statistics = calibration.input_ids, None
    if plan is None:
        check_settings(settings)
        statistics = statistics_for(loaded.model, calibration, settings, progress=progress)
        plan = make_plan(loaded, statistics, calibration, settings)
    else:
        check_plan_fits(loaded.model, plan)
        check_settings(plan.settings)
        row = RECONSTRUCTIONS[plan.settings.reconstruct]
        if row.needs_statistics and plan.shape != plan.dense_shape:
            with products_in(plan.settings.dtype):
                statistics = collect_statistics(
                    loaded.model, ids, with_gram=row.needs_gram, progress=progress
                )
    apply_plan(loaded.model, plan, statistics=statistics, input_ids=ids, progress=progress)
    with products_in(plan.settings.dtype):
        windows = moment_windows(ids)
        moments = collect_input_moments(loaded.model, windows, progress=progress)
    return PruneResult(plan, moments)


def statistics_for(
    model: Any,
    calibration: Calibration,
    settings: PruneSettings,
    *,
    only_plan: bool = False,
    progress: Progress = no_progress,
) -> BlockStatistics:
    """What the settings read of the dense model, and no more.

    Args:
        model: The dense model.
        calibration: Windows the statistics are taken from.
        settings: How it will be pruned.
        only_plan: Leave out what only the reconstruction reads.
        progress: Told about each step.
    """
    with_gram = settings.plan_needs_gram if only_plan else settings.needs_gram
    ids = calibration.input_ids
    with products_in(settings.dtype):
        statistics = collect_statistics(model, ids, with_gram=with_gram, progress=progress)
        if not settings.needs_gradients:
            return statistics
        windows = spread_windows(ids, GRADIENT_WINDOWS)
        gradients = collect_gradients(model, windows, seed=calibration.seed, progress=progress)
    return replace(statistics, gradients=gradients)


def moment_windows(input_ids: torch.Tensor) -> torch.Tensor:
    """The calibration windows that activation moments are measured on."""
    return spread_windows(input_ids, MOMENT_WINDOWS)


def spread_windows(input_ids: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the windows, spread so that every source is among them."""
    step = max(1, len(input_ids) // count)
    return input_ids[::step][:count]
