"""One budget for all axes: the combination of removals that meets it at the least predicted loss.

Every axis says what its removals save and what they are predicted to cost, in nats a token. Tokens, attentions,
key-value groups and blocks go in a fixed order each, so an axis is a row of levels; for every combination of levels
the share of FFN channels follows from what is still to be saved, and the combination of the least sum of losses is
taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.models.shape import ModelShape

Array = npt.NDArray[np.float64]
AXES: Mapping[str, str] = {
    "vocabulary": "tokens of the vocabulary",
    "ffn": "FFN channels",
    "attentions": "attentions",
    "kv_groups": "key-value groups",
    "blocks": "blocks",
}
"""What a budget is shared out over -> what its units are called."""
UNITS: Mapping[str, Callable[[float], str]] = MappingProxyType(
    {
        "bytes": lambda value: f"{value / 1e6:.2f} MB",
        "parameters": lambda value: f"{value / 1e6:.2f} M parameters",
        "decode": lambda value: f"{value:.2%} of the dense decode time",
    }
)
"""What is budgeted -> how it is told."""
_COUNTED = tuple(axis for axis in AXES if axis != "ffn")
"""Axes of a row of levels each; blocks, which take channels with them, are the last."""
_SLACK = 1e-9
_AS_GOOD = 1.1
"""Times the least predicted loss; predictions are no better than that."""


class Cost(Protocol):
    """What a model takes of what is budgeted."""

    def __call__(self, shape: ModelShape, tokenizer: Any) -> float:
        """Of a model with this shape, and the tokenizer of the tokens that it keeps."""
        ...


@dataclass(frozen=True)
class Budget:
    """What a pruned model may take.

    Attributes:
        name: Setting that asks for it.
        target: Most that it may take.
        cost: What a model takes.
        unit: Of both, one of UNITS.
        axes: What may be removed for it; of others the settings say how much.
    """

    name: str
    target: float
    cost: Cost
    unit: str
    axes: tuple[str, ...] = tuple(AXES)


@dataclass(frozen=True)
class AxisShare:
    """What one axis gives for a budget.

    Attributes:
        axis: One of AXES.
        removed: Units that go.
        units: That the dense model has.
        saved: What the model takes less without them.
        loss: What that is predicted to cost, nats a token.
        alone: The loss if this axis alone met the budget; None where it cannot.
    """

    axis: str
    removed: int
    units: int
    saved: float
    loss: float
    alone: float | None = None


@dataclass(frozen=True)
class BudgetShares:
    """How a budget is shared out.

    Attributes:
        name: Setting that asked for it.
        unit: Of `target`, `dense` and `reached`.
        target: Most that the model may take.
        dense: What the dense model takes.
        reached: What the pruned model takes.
        axes: What each axis gives.
    """

    name: str
    unit: str
    target: float
    dense: float
    reached: float
    axes: tuple[AxisShare, ...]

    @property
    def loss(self) -> float:
        """Predicted for all together, nats a token."""
        return sum(share.loss for share in self.axes)


@dataclass(frozen=True)
class Levels:
    """Ever more removals of one axis, none or a fixed number first.

    Attributes:
        units: That the dense model has.
        removed: Units that are gone at every level, (n,).
        saved: What the model takes less, (n,).
        losses: Nats a token, (n,).
    """

    units: int
    removed: npt.NDArray[np.int64]
    saved: Array
    losses: Array

    @classmethod
    def nothing(cls, units: int) -> Levels:
        """An axis that is left alone."""
        return cls(units, np.zeros(1, np.int64), np.zeros(1), np.zeros(1))

    @property
    def unit(self) -> float:
        """What one saves, where all save alike."""
        return float(self.saved[-1] / max(self.removed[-1], 1))

    def at(self, removed: int | npt.NDArray[np.int64]) -> tuple[Any, Any]:
        """What is saved and lost without so many units: between two levels, and none, a straight line."""
        known = np.concatenate([[0], self.removed])
        saved, losses = (np.concatenate([[0.0], row]) for row in (self.saved, self.losses))
        return np.interp(removed, known, saved), np.interp(removed, known, losses)


@dataclass(frozen=True)
class ChannelCurve:
    """Loss over the share of FFN channels that goes: a power law between every two measured points, and beyond them.

    Attributes:
        ratios: Measured, ascending, above 0; nothing is lost where there are none.
        losses: Nats a token there.
    """

    ratios: Sequence[float] = ()
    losses: Sequence[float] = ()

    def at(self, ratio: Array) -> Array:
        """Loss at any ratios."""
        if not self.ratios:
            return np.zeros_like(ratio)
        x, y = np.log(self.ratios), np.log(np.maximum(np.maximum.accumulate(self.losses), 1e-12))
        u = np.log(np.maximum(ratio, 1e-12))
        inside = np.interp(u, x, y)
        # One point alone is taken for a line through nothing: the loss of a share is the same share of the loss.
        slopes = np.diff(y) / np.diff(x) if len(x) > 1 else np.ones(1)
        low, high = np.maximum(slopes[[0, -1]], 1.0)
        lost = np.exp(inside + low * np.minimum(u - x[0], 0) + high * np.maximum(u - x[-1], 0))
        return np.asarray(np.where(ratio > 0, lost, 0.0), dtype=np.float64)


@dataclass(frozen=True)
class Choice:
    """A combination.

    Attributes:
        removed: Axis -> units that go, of all but FFN channels.
        ratio: Share of the FFN channels of the blocks that stay.
        loss: Predicted, nats a token.
    """

    removed: Mapping[str, int]
    ratio: float
    loss: float


@dataclass(frozen=True)
class Evidence:
    """What is known of all axes.

    Attributes:
        levels: Axis -> its levels, of all but FFN channels.
        curve: Of FFN channels.
        channels: Of the dense model.
        channel_saves: What a model takes less without one channel.
        ratios: Least and largest share of channels that may go.
        going: Axis of parts -> how many go where levels of attentions, groups and blocks come together,
            (n_attentions, n_groups, n_blocks): a block takes its attention along. Below 0 where there is no such
            model; as many as the level has where an axis is not named.
    """

    levels: Mapping[str, Levels]
    curve: ChannelCurve
    channels: int
    channel_saves: float
    ratios: tuple[float, float]
    going: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def choose(self, excess: float, alone: str | None = None) -> Choice | None:
        """The combination of the least loss that saves at least so much; None where none does.

        Of those that are as good as that, one of the fewest axes: a plain checkpoint runs in more places.

        Args:
            excess: What is to be saved.
            alone: An axis that alone may give more than the least.
        """
        cut = tuple(slice(None if alone in (None, axis) else 1) for axis in _COUNTED)
        stay, saved, losses = (table[cut] for table in self._tables)
        low, high = self.ratios if alone in (None, "ffn") else self.ratios[:1] * 2
        missing = excess - saved
        ratio = np.clip(missing / np.maximum(stay, _SLACK), low, high)
        lost = losses + self.curve.at(ratio)
        lost[missing > high * stay + _SLACK * max(abs(excess), 1.0)] = np.inf
        if not np.isfinite(least := float(lost.min())):
            return None
        used = _sum([np.arange(length) > 0 for length in saved.shape]) + (ratio > low)
        ranked = np.where(lost <= _AS_GOOD * least, used + lost / (_AS_GOOD * least or 1.0), np.inf)
        return self._choice(int(ranked.argmin()), ratio, lost)

    @property
    def largest(self) -> Choice:
        """The combination that saves most."""
        stay, saved, losses = self._tables
        ratio = np.full_like(saved, self.ratios[1])
        lost = losses + self.curve.at(ratio)
        most = np.where(np.isfinite(lost), saved + ratio * stay, -np.inf)
        return self._choice(int(most.argmax()), ratio, lost)

    def with_removed(self, removed: Mapping[str, int], excess: float) -> Choice:
        """So many units of every axis but FFN channels, and as many of these as are missing then.

        Args:
            removed: Axis -> units that go.
            excess: What is to be saved.
        """
        missing = excess - sum(self.levels[axis].at(removed[axis])[0] for axis in _COUNTED)
        ratio = float(np.clip(missing / max(self._stay(removed["blocks"]), _SLACK), *self.ratios))
        return Choice(removed, ratio, self.loss(removed, ratio))

    def loss(self, removed: Mapping[str, int], ratio: float) -> float:
        """Predicted without so many units of every axis but FFN channels, and this share of those."""
        parts = sum(self.levels[axis].at(removed[axis])[1] for axis in _COUNTED)
        return float(parts + self.curve.at(np.array(ratio)))

    def _choice(self, place: int, ratio: Array, lost: Array) -> Choice:
        at = tuple(int(level) for level in np.unravel_index(place, lost.shape))
        tokens = int(self.levels["vocabulary"].removed[at[0]])
        parts = {axis: int(count[at[1:]]) for axis, count in self._counts.items()}
        return Choice({"vocabulary": tokens, **parts}, float(ratio[at]), float(lost[at]))

    def _stay(self, blocks: int) -> float:
        """What all channels take that stay with the blocks when some are gone."""
        return self.channels * self.channel_saves * (1 - blocks / self.levels["blocks"].units)

    @functools.cached_property
    def _counts(self) -> dict[str, npt.NDArray[np.int64]]:
        """Axis of parts -> how many go, (n_attentions, n_groups, n_blocks)."""
        parts = _COUNTED[1:]
        of_levels = np.meshgrid(*(self.levels[axis].removed for axis in parts), indexing="ij")
        return {axis: self.going.get(axis, own) for axis, own in zip(parts, of_levels, strict=True)}

    @functools.cached_property
    def _tables(self) -> tuple[Array, Array, Array]:
        """What the channels take that stay, what is saved without them and the loss, of every combination."""
        given = {axis: self.levels[axis].at(count) for axis, count in self._counts.items()}
        saved, losses = (sum(kind) for kind in zip(*given.values(), strict=True))
        impossible = np.any([count < 0 for count in self._counts.values()], axis=0)
        tokens, blocks = self.levels["vocabulary"], self.levels["blocks"]
        return (
            np.array([[[[self._stay(count) for count in blocks.removed]]]]),
            _sum([tokens.saved, np.asarray(saved)]),
            _sum([tokens.losses, np.where(impossible, np.inf, losses)]),
        )

    def shares(self, choice: Choice, excess: float, saved: float, ratio: float) -> tuple[AxisShare, ...]:
        """What each axis gives.

        Args:
            choice: What was chosen.
            excess: What was to be saved.
            saved: What is saved, exactly; what no other axis has saved, FFN channels have.
            ratio: Share of the channels of blocks that stay that goes, exactly.
        """
        shares = {}
        for axis in _COUNTED:
            table, removed = self.levels[axis], choice.removed[axis]
            shares[axis] = AxisShare(axis, removed, table.units, *map(float, table.at(removed)))
        gone = round(ratio * self.channels * (1 - shares["blocks"].removed / shares["blocks"].units))
        rest = saved - sum(share.saved for share in shares.values())
        loss = float(self.curve.at(np.array(ratio)))
        shares["ffn"] = AxisShare("ffn", gone, self.channels, rest, loss)
        alone = {axis: self.choose(excess, axis) for axis in AXES}
        return tuple(replace(shares[axis], alone=only.loss if only else None) for axis, only in alone.items())


def _sum(rows: Sequence[npt.NDArray[Any]]) -> Array:
    """Of every combination of one entry of each row."""
    return np.asarray(functools.reduce(np.add.outer, [np.asarray(row, np.float64) for row in rows]))


def unreachable(budget: Budget, smallest: float) -> InputError:
    """A budget that nothing meets."""
    if budget.unit == "decode":
        return InputError(
            "faster than any combination of what may be removed",
            field=budget.name,
            value=round(1 / budget.target, 6),
            allowed=f"about {int(100 / smallest) / 100:g} or less",
        )
    name = {"bytes": "MB", "parameters": "M parameters"}[budget.unit]
    return InputError(
        f"{budget.target / 1e6:.7g} {name} is less than any combination of what may be removed takes",
        field=budget.name,
        allowed=f"about {math.ceil(smallest) / 1e6:.15g} {name} or more",
    )
