"""How fast a device reads and multiplies weights of each stored type: fitted to rows that were measured there.

A generated token takes the bytes of each type over that type's rate, a prompt's token its weights. Rates are found by
least squares of the relative errors, each type drawn to the median of all (a ridge of weight SHRINKAGE), as a file has
little of some types. None is negative: where the solution has one, projected coordinate descent finds the best without.

What the fit is worth is asked of rows that it has not seen: each file in turn is left out with all of its rows
(leave-one-group-out cross-validation), and the interval is that which holds COVERAGE of the left-out rows, as in the
jackknife of Barber et al. 2021, with one half-width for all. Of few files it is the largest error, and holds less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError

SHRINKAGE = 0.02
"""Weight of a type's prior against one row."""
COVERAGE = 0.9
FEWEST_FILES = 3
KEYS_AND_VALUES = "cache"
"""What the bytes of the key-value cache are called beside those of types."""
_SWEEPS = 200

Amounts = Mapping[str, float]


@dataclass(frozen=True)
class Timed:
    """A row: what of each type a token takes, and for how long.

    Attributes:
        file: What is left out together.
        test: The workload's name.
        amounts: Stored type -> bytes, or weights.
        seconds: Of a token.
    """

    file: str
    test: str
    amounts: Amounts
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Amounts a second.

    Attributes:
        by_type: Stored type -> rate.
        others: Of a type that was not measured.
    """

    by_type: Mapping[str, float]
    others: float

    def seconds(self, amounts: Amounts) -> float:
        """How long a token takes."""
        return sum(amount / self.by_type.get(kind, self.others) for kind, amount in amounts.items())


@dataclass(frozen=True)
class LeftOut:
    """A row against what the rows of the other files say of it.

    Attributes:
        row: The row.
        seconds: Projected.
        within: The interval that the other files give, as a factor to both sides.
    """

    row: Timed
    seconds: float
    within: float

    @property
    def ratio(self) -> float:
        """Projected over measured speed."""
        return self.row.seconds / self.seconds

    @property
    def is_inside(self) -> bool:
        """Whether the measured speed lies in the interval."""
        return abs(math.log(self.ratio)) <= math.log(self.within)


@dataclass(frozen=True)
class Fitted:
    """Rates with what they are worth.

    Attributes:
        rates: Of all rows.
        within: Factor to both sides of a projection that holds the share `holds` of left-out rows.
        left_out: Each row without its file.
    """

    rates: Rates
    within: float
    left_out: tuple[LeftOut, ...]

    @property
    def median_error(self) -> float:
        """Median of |projected / measured speed - 1| over the left-out rows."""
        return median(abs(one.ratio - 1) for one in self.left_out)

    @property
    def holds(self) -> float:
        """Share of another file's rows that the interval holds: of n files no more than n / (n + 1) can be promised."""
        return min(COVERAGE, self.n_files / (self.n_files + 1))

    @property
    def n_files(self) -> int:
        """Files that it rests on."""
        return len({one.row.file for one in self.left_out})


def fit(rows: Sequence[Timed]) -> Fitted:
    """Fit rates to rows.

    Raises:
        InputError: Rows of fewer than FEWEST_FILES files.
    """
    files = list(dict.fromkeys(row.file for row in rows))
    if len(files) < FEWEST_FILES:
        raise InputError(
            "too few files to leave one out", value=len(files), allowed=f"{FEWEST_FILES} or more"
        )

    @cache
    def without(left: frozenset[str]) -> Rates:
        return _fit([row for row in rows if row.file not in left])

    widths = {}
    for file in files:
        # What the interval would have been if this file had never been measured.
        others = [other for other in rows if other.file != file]
        widths[file] = _half_width([_error(one, without(frozenset({file, one.file}))) for one in others])
    alone = [without(frozenset({row.file})) for row in rows]
    left_out = [
        LeftOut(row, rates.seconds(row.amounts), widths[row.file])
        for row, rates in zip(rows, alone, strict=True)
    ]
    errors = [_error(row, rates) for row, rates in zip(rows, alone, strict=True)]
    return Fitted(_fit(rows), _half_width(errors), tuple(left_out))


def _error(row: Timed, rates: Rates) -> float:
    return abs(math.log(row.seconds / rates.seconds(row.amounts)))


def _half_width(errors: Sequence[float]) -> float:
    """The factor that holds COVERAGE of errors like these, with one more to come."""
    ordered = sorted(errors)
    return math.exp(ordered[min(len(ordered), math.ceil((len(ordered) + 1) * COVERAGE)) - 1])


def _fit(rows: Sequence[Timed]) -> Rates:
    kinds = sorted({kind for row in rows for kind in row.amounts})
    others = 1 / median(row.seconds / sum(row.amounts.values()) for row in rows)
    shares = np.array([[row.amounts.get(kind, 0) / others / row.seconds for kind in kinds] for row in rows])
    slowness = _solve(shares, SHRINKAGE)
    return Rates({kind: others / slow for kind, slow in zip(kinds, slowness, strict=True)}, others)


def _solve(shares: npt.NDArray[np.float64], ridge: float) -> list[float]:
    """x that is least of |A x - 1|^2 + ridge |x - 1|^2, x > 0: how much slower than the median each type is."""
    gram = shares.T @ shares + ridge * np.eye(shares.shape[1])
    target = shares.sum(0) + ridge
    x = np.linalg.solve(gram, target)
    if (x < _LEAST).any():
        x = np.maximum(x, _LEAST)
        for _ in range(_SWEEPS):
            for i in range(len(x)):
                x[i] = max(_LEAST, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
    return [float(value) for value in x]


_LEAST = 0.02
"""A type that is read fifty times as fast as the median is an accident of the fit."""
