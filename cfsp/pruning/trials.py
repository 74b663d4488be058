"""Copies of a model, pruned to see what that costs: how a budget learns what channels, attentions and blocks lose."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.progress import Progress
from cfsp.pruning.axes.attention import removable_attentions
from cfsp.pruning.axes.removal import Probe, Removal, attention_left_out, block_left_out
from cfsp.pruning.budget import ChannelCurve
from cfsp.pruning.plan import PruningPlan, apply_plan, make_plan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import BlockStatistics
from cfsp.text.calibration import Calibration

FIT_WINDOWS, JUDGED_WINDOWS = 8, 4
"""Calibration windows that a copy's repair reads, and others that it is judged on."""
_MOST_REMOVED, _MOST_NATS = 1 / 3, 1.0
"""Share of the attentions, or of the blocks, of which removal is tried, and the loss beyond which no more are."""


@dataclass
class Trials:
    """Copies of a model, pruned to see what that costs.

    Args:
        loaded: The dense model; unchanged.
        calibration: Windows; some are for the repair, others to judge by.
        settings: How to prune.
        statistics_of: Takes the statistics that settings need.
        probed: Windows on which the model is tried without an attention or a block, (n_windows, seqlen).
        progress: Told about each step.
    """

    loaded: LoadedModel
    calibration: Calibration
    settings: PruneSettings
    statistics_of: Callable[[Any, Calibration, PruneSettings], BlockStatistics]
    probed: torch.Tensor
    progress: Progress

    def __post_init__(self) -> None:
        ids = self.calibration.input_ids
        count = min(len(ids), FIT_WINDOWS + JUDGED_WINDOWS)
        spread = [place * len(ids) // count for place in range(count)]
        judged = spread[1 :: 1 + FIT_WINDOWS // JUDGED_WINDOWS] or spread
        self._judged = ids[judged]
        self._fit = replace(self.calibration, input_ids=ids[sorted(set(spread) - set(judged)) or spread])
        self._settings = replace(self.settings, prune_ratio=0.0, vocabulary=0, attentions=0, blocks=0)

    @functools.cached_property
    def _statistics(self) -> BlockStatistics:
        return self.statistics_of(self.loaded.model, self._fit, self._settings)

    @functools.cached_property
    def plan(self) -> PruningPlan:
        """Of the dense model, by which nothing goes."""
        return make_plan(self.loaded, self._statistics, self._fit, self._settings)

    def channels(self, ratios: Sequence[float]) -> ChannelCurve:
        """What FFN channels cost at the ratios that the alignment makes of these; what it cannot make is left out."""
        plans = {}
        for ratio in ratios:
            with suppress(InputError):
                plan = self.plan.at_ratio(ratio)
                plans[round(1 - plan.keep_ratio, 9)] = plan
        made = sorted(ratio for ratio in plans if ratio > 0)
        return ChannelCurve(made, [self.loss(plans[ratio]) for ratio in made])

    def removals(self, axis: str, fixed: int) -> list[Removal]:
        """The choices of one, two, ... attentions or blocks, with what each costs once it is made up for."""
        model, count = self.loaded.model, len(decoder_layers(self.loaded.model))
        every = {"attentions": removable_attentions(model, frozenset()), "blocks": list(range(1, count))}
        leave_out = {"attentions": attention_left_out, "blocks": block_left_out}[axis]
        most = fixed or min(len(every[axis]), int(count * _MOST_REMOVED))
        if not most:
            return []
        if most > len(every[axis]):
            raise InputError("too many", field=axis, value=most, allowed=f"at most {len(every[axis])}")
        found: list[Removal] = []
        with products_in(self._settings.dtype):
            probe = Probe(model, self.probed, leave_out)
            # In the order of what each costs alone: the plan chooses with more care.
            for removal in probe.steps(every[axis], most, tried=1, progress=self.progress, what=axis):
                found.append(removal)
                if removal.loss > _MOST_NATS and not fixed:
                    break
        tried = found[-1 if fixed else len(found) // 2]
        removed = (tried, None) if axis == "blocks" else (None, tried)
        plan = make_plan(self.loaded, self._statistics, self._fit, self._settings, *removed)
        left = self.loss(plan) / max(tried.loss, 1e-9)
        return [replace(removal, loss=left * removal.loss) for removal in found]

    def loss(self, plan: PruningPlan) -> float:
        """KL(dense || pruned), nats a token."""
        pruned = copy.deepcopy(self.loaded.model)
        apply_plan(
            pruned,
            plan,
            statistics=self._statistics,
            input_ids=self._fit.input_ids,
            progress=self.progress,
        )
        total = 0.0
        with torch.inference_mode(), products_in(plan.settings.dtype):
            for window in self._judged:
                expected, actual = (
                    _log_probabilities(model, window) for model in (self.loaded.model, pruned)
                )
                total += float((expected.exp() * (expected - actual)).sum(-1).mean())
        return max(total / len(self._judged), 0.0)


def _log_probabilities(model: Any, window: torch.Tensor) -> torch.Tensor:
    """At every other position; the output matrix costs as much as many blocks."""
    hidden = model.get_decoder()(input_ids=window[None], use_cache=False).last_hidden_state[:, ::2]
    logits: torch.Tensor = model.get_output_embeddings()(hidden).float()
    return logits.log_softmax(-1)
