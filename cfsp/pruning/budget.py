"""One budget for all axes: the combination of removals that meets it at the least predicted loss.

Every axis says what its removals save and what they are predicted to cost, in nats a token. Tokens, attentions,
key-value groups and blocks go in a fixed order each, so an axis is a row of levels; for every combination of levels
the share of FFN channels follows from what is still to be saved, and the combination of the least sum of losses is
taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
        levels: Axis -> level, of all but FFN channels.
        ratio: Share of the FFN channels of the blocks that stay.
        loss: Predicted, nats a token.
    """

    levels: Mapping[str, int]
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
    """

    levels: Mapping[str, Levels]
    curve: ChannelCurve
    channels: int
    channel_saves: float
    ratios: tuple[float, float]

    def choose(self, excess: float, alone: str | None = None) -> Choice | None:
        """The combination of the least loss that saves at least so much; None where none does.

        Of those that are as good as that, one of the fewest axes: a plain checkpoint runs in more places.

        Args:
            excess: What is to be saved.
            alone: An axis that alone may give more than the least.
        """
        tables = [self.levels[axis] for axis in _COUNTED]
        cut = [slice(None if alone in (None, axis) else 1) for axis in _COUNTED]
        saved = [table.saved[part] for table, part in zip(tables, cut, strict=True)]
        losses = [table.losses[part] for table, part in zip(tables, cut, strict=True)]
        stay = self._stay[cut[-1]]
        low, high = self.ratios if alone in (None, "ffn") else self.ratios[:1] * 2
        missing = excess - _sum(saved)
        ratio = np.clip(missing / np.maximum(stay, _SLACK), low, high)
        lost = _sum(losses) + self.curve.at(ratio)
        lost[missing > high * stay + _SLACK * max(abs(excess), 1.0)] = np.inf
        if not np.isfinite(least := float(lost.min())):
            return None
        used = _sum([np.arange(len(part)) > 0 for part in saved]) + (ratio > low)
        ranked = np.where(lost <= _AS_GOOD * least, used + lost / (_AS_GOOD * least or 1.0), np.inf)
        best = np.unravel_index(int(ranked.argmin()), lost.shape)
        levels = {axis: int(level) for axis, level in zip(_COUNTED, best, strict=True)}
        return Choice(levels, float(ratio[best]), float(lost[best]))

    @property
    def most(self) -> float:
        """All that can be saved."""
        depth = self.levels["blocks"].saved + self.ratios[1] * self._stay
        return float(depth.max() + sum(self.levels[axis].saved.max() for axis in _COUNTED[:-1]))

    @property
    def _stay(self) -> Array:
        """What all channels take that stay with the blocks at every level."""
        blocks = self.levels["blocks"]
        return np.asarray(self.channels * self.channel_saves * (1 - blocks.removed / blocks.units))

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
            table, level = self.levels[axis], choice.levels[axis]
            gives, loss = float(table.saved[level]), float(table.losses[level])
            shares[axis] = AxisShare(axis, int(table.removed[level]), table.units, gives, loss)
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
    show = UNITS[budget.unit]
    if budget.unit == "decode":
        return InputError(
            "faster than any combination of what may be removed",
            field=budget.name,
            value=round(1 / budget.target, 6),
            allowed=f"about {int(100 / smallest) / 100:g} or less",
        )
    return InputError(
        f"{show(budget.target)} is less than any combination of what may be removed takes",
        field=budget.name,
        allowed=f"about {show(smallest)} or more",
    )
