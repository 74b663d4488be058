"""Copies of a model, pruned to see what that costs: how a budget learns what channels and whole parts lose."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape, output_logits
from cfsp.models.offload import copied
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.processes import mine, number_summed
from cfsp.progress import Progress
from cfsp.pruning.axes.parts import (
    Probe,
    Removal,
    attention_left_out,
    block_left_out,
    candidate_blocks,
    group_left_out,
    groups_of_share,
    kept_groups,
    removable_attentions,
    removable_groups,
)
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.budget import ChannelCurve
from cfsp.pruning.plan import PruningPlan, make_plan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import BlockStatistics
from cfsp.text.calibration import Calibration

FIT_WINDOWS, JUDGED_WINDOWS = 8, 4
"""Calibration windows that a copy's repair reads at least, and others that it is judged on."""
FIT_TOKENS = 4
"""Tokens that it reads at least for each channel of an FFN: of fewer than one its equations have many solutions."""
_MOST_REMOVED, _MOST_NATS = 1 / 3, 1.0
"""Share of an axis' parts of which removal is tried, and the loss beyond which no more are."""


@dataclass(frozen=True)
class PartsAxis:
    """An axis of parts that go whole, numbered as a `Probe` does.

    Attributes:
        candidates: Parts of a model that may go beside some blocks.
        leave_out: Context in which a block lacks one.
        planned: What `make_plan` is told of a removal beside blocks and attentions that go.
        shape_without: The shape of a dense model without some.
        units: How many parts such a model has.
        parts: Most that a block of it has.
        count: How many a fixed setting removes of such a model without some blocks (InputError: more than can go).
    """

    candidates: Callable[[Any, frozenset[int]], Sequence[int]]
    leave_out: Callable[[Any, int], AbstractContextManager[None]]
    planned: Callable[[Any, Removal, Collection[int]], Mapping[str, Any]]
    shape_without: Callable[[ModelShape, Sequence[int]], ModelShape]
    units: Callable[[ModelShape], int]
    parts: Callable[[ModelShape], int] = lambda shape: 1
    count: Callable[[ModelShape, Collection[int], float], int] = lambda shape, gone, amount: round(amount)


PARTS: Mapping[str, PartsAxis] = MappingProxyType(
    {
        "attentions": PartsAxis(
            removable_attentions,
            attention_left_out,
            lambda model, removal, gone: {"attention": removal},
            lambda shape, removed: shape.without(attentions=removed),
            lambda shape: sum(block.has_attention and not block.is_keyless for block in shape.blocks),
        ),
        "kv_groups": PartsAxis(
            lambda model, gone: removable_groups(model),
            group_left_out,
            lambda model, removal, gone: {"kv_groups": kept_groups(model, removal, gone)},
            lambda shape, removed: shape.without_groups(
                Counter(part // shape.most_kv_groups for part in removed)
            ),
            lambda shape: sum(block.kv_groups or 0 for block in shape.blocks),
            lambda shape: shape.most_kv_groups,
            lambda shape, gone, share: groups_of_share(
                [b.kv_groups for b in shape.blocks if b.kv_groups and b.origin not in gone], share
            ),
        ),
        "blocks": PartsAxis(
            lambda model, gone: candidate_blocks(model),
            block_left_out,
            lambda model, removal, gone: {"depth": removal},
            lambda shape, removed: shape.without(blocks=removed),
            lambda shape: len(shape.blocks),
        ),
    }
)


@dataclass
class Trials:
    """Copies of a model, pruned to see what that costs.

    Args:
        loaded: The dense model; unchanged.
        calibration: Windows; some are for the repair, others to judge by.
        settings: How to prune.
        statistics_of: Takes the statistics that settings need.
        probed: Windows on which the model is tried without a part, (n_windows, seqlen).
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
        fit, judged = tried_windows(len(ids), ids.shape[1], max(model_shape(self.loaded.model).ffn_widths))
        self._judged = ids[judged]
        self._fit = replace(self.calibration, input_ids=ids[fit])
        self._settings = replace(
            self.settings, prune_ratio=0.0, vocabulary=0, attentions=0, blocks=0, kv_groups=0.0
        )

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
        """The choices of ever more parts of an axis in `PARTS`, with what each costs once it is made up for.

        Args:
            axis: Whose parts.
            fixed: How many go; 0 for the choices that there are.

        Raises:
            InputError: More than can go.
        """
        model, row = self.loaded.model, PARTS[axis]
        shape = model_shape(model)
        candidates, parts = row.candidates(model, frozenset()), row.parts(shape)
        # Of several parts a block keeps one.
        possible = len(candidates) - (len({part // parts for part in candidates}) if parts > 1 else 0)
        most = fixed or min(possible, int(row.units(shape) * _MOST_REMOVED))
        if most > possible:
            raise InputError("too many", field=axis, value=most, allowed=f"at most {possible}")
        removals: list[Removal] = []
        with products_in(self._settings.dtype, model.device.type):
            # In the order of what each costs alone: the plan chooses with more care.
            probe = Probe(model, self.probed, row.leave_out, parts=parts)
            counts = [fixed] if fixed else _counts(most, parts)
            for removal in probe.in_order(candidates, counts, progress=self.progress, what=axis):
                removals.append(removal)
                if removal.loss > _MOST_NATS:
                    break
        if not removals:
            return []
        tried = removals[len(removals) // 2]
        plan = make_plan(
            self.loaded, self._statistics, self._fit, self._settings, **row.planned(model, tried, ())
        )
        left = self.loss(plan) / max(tried.loss, 1e-9)
        return [replace(removal, loss=left * removal.loss) for removal in removals]

    def loss(self, plan: PruningPlan) -> float:
        """KL(dense || pruned), nats a token."""
        pruned = copied(self.loaded.model)
        apply_plan(
            pruned,
            plan,
            statistics=self._statistics,
            input_ids=self._fit.input_ids,
            progress=self.progress,
        )
        total = 0.0
        with torch.inference_mode(), products_in(plan.settings.dtype, pruned.device.type):
            for window in (windows := mine(self._judged)):
                expected, actual = (
                    _log_probabilities(model, window) for model in (self.loaded.model, pruned)
                )
                total += float((expected.exp() * (expected - actual)).sum(-1).mean())
        return max(number_summed(total) / number_summed(len(windows)), 0.0)


def tried_windows(n_windows: int, seqlen: int, width: int) -> tuple[list[int], list[int]]:
    """Which of the calibration windows a copy of FFNs so wide is repaired on, and which it is judged on."""
    wanted = max(FIT_WINDOWS, -(-FIT_TOKENS * width // seqlen))
    count = min(n_windows, wanted + JUDGED_WINDOWS)
    spread = [place * n_windows // count for place in range(count)]
    judged = spread[1 :: max(3, count // JUDGED_WINDOWS)][:JUDGED_WINDOWS] or spread
    return sorted(set(spread) - set(judged)) or spread, judged


def _counts(most: int, parts: int) -> list[int]:
    """One, two, ... parts; of many ever twice as many, and the most."""
    if parts == 1:
        return list(range(1, most + 1))
    return sorted({2**power for power in range(most.bit_length())} | {most}) if most else []


def _log_probabilities(model: Any, window: torch.Tensor) -> torch.Tensor:
    """At every other position; the output matrix costs as much as many blocks."""
    ids = window[None].to(model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, ::2]
    return output_logits(model, hidden).log_softmax(-1)
