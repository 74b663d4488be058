"""What files of one model lose on the same windows of text, and which of them are beaten beyond the text's noise.

Losses are compared window by window. The difference of two files' bits per byte is a ratio of sums over windows,

    D = sum of d_w / sum of n_w,    var(D) = m / (m - 1) sum of (d_w - D n_w)^2 / (sum of n_w)^2

with d_w the difference of bits and n_w the bytes of window w of m (Cochran, Sampling Techniques, 2.11), and its 95 %
interval takes Student's t with m - 1 degrees of freedom. One window says nothing of noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import NonNegativeFloat, PositiveInt

from cfsp.validation import Share
from phoneready.evaluation.evaluation_record import text_name
from runtime_bench.records.summary import NORMAL_95


@dataclass(frozen=True)
class MeasuredText:
    """What a file loses on one text, beside the dense model in float32.

    `n_bytes` are the bytes of each window that its predicted tokens spell, `nats` -ln p of each window. With a smaller
    vocabulary `kl_mean` (nats) and `same_top1` are over its tokens, where one of the dense model's ends.
    """

    kind: str
    source: str
    seqlen: PositiveInt
    windows_sha256: str
    n_tokens: PositiveInt
    n_bytes: tuple[PositiveInt, ...]
    nats: tuple[NonNegativeFloat, ...]
    dense_nats: tuple[NonNegativeFloat, ...]
    kl_mean: float
    same_top1: Share

    @property
    def name(self) -> str:
        return text_name(self.kind, self.source)

    @property
    def bits_per_byte(self) -> float:
        return sum(self.nats) / (math.log(2) * sum(self.n_bytes))


@dataclass(frozen=True)
class MeasuredFile:
    """A file, its size, and what it loses; all files have the same windows."""

    file: str
    file_bytes: PositiveInt
    texts: tuple[MeasuredText, ...]

    @property
    def is_dense(self) -> bool:
        raise NotImplementedError

    @property
    def label(self) -> str:
        raise NotImplementedError

    @property
    def n_bytes(self) -> int:
        """Of all texts together, as the figures below."""
        return sum(sum(text.n_bytes) for text in self.texts)

    @property
    def bits_per_byte(self) -> float:
        return sum(sum(text.nats) for text in self.texts) / (math.log(2) * self.n_bytes)

    @property
    def tokens_per_byte(self) -> float:
        return sum(text.n_tokens for text in self.texts) / self.n_bytes

    @property
    def dense_bits_per_byte(self) -> float:
        """What the dense model loses in float32."""
        return sum(sum(text.dense_nats) for text in self.texts) / (math.log(2) * self.n_bytes)

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence over the texts' tokens."""
        return sum(t.kl_mean * t.n_tokens for t in self.texts) / sum(t.n_tokens for t in self.texts)

    @property
    def same_top1(self) -> float:
        """Share of tokens where the dense model puts the same one first."""
        return sum(t.same_top1 * t.n_tokens for t in self.texts) / sum(t.n_tokens for t in self.texts)


VERDICTS = FRONTIER, UNDECIDED, DOMINATED = "frontier", "within noise", "dominated"
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, two terms of its expansion do."""


class Excess(NamedTuple):
    """Bits per byte that one file loses more than another, with a 95 % interval over the windows of text."""

    bits: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Standing:
    """A verdict of VERDICTS, and the file that dominates this one or is within noise of it; None on the frontier."""

    file: str
    verdict: str
    by: str | None


class Choice(NamedTuple):
    """The best file of `at_bytes` or less, the best dense one, and what that loses more; None if there is none."""

    best: str | None
    dense: str | None
    excess: Excess | None
    at_bytes: int


def excess(one: MeasuredFile, other: MeasuredFile) -> Excess:
    """Bits per byte that `one` loses more than `other`, on the same windows."""
    pairs = [
        pair for a, b in zip(one.texts, other.texts, strict=True) for pair in zip(a.nats, b.nats, strict=True)
    ]
    differences = [(a - b) / math.log(2) for a, b in pairs]
    sizes = [n for text in one.texts for n in text.n_bytes]
    count, total = len(sizes), sum(sizes)
    bits = sum(differences) / total
    if count < 2:
        return Excess(bits, None, None)
    spread = sum((d - bits * n) ** 2 for d, n in zip(differences, sizes, strict=True))
    degrees, z = count - 1, NORMAL_95
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    t = _T_95[degrees - 1] if degrees <= len(_T_95) else t
    half = t * math.sqrt(spread * count / degrees) / total
    return Excess(bits, bits - half, bits + half)


def standing(point: MeasuredFile, points: Iterable[MeasuredFile]) -> Standing:
    """A file against all that are no larger.

    Dominated: one of them loses surely no more, and is smaller or loses less. Within noise: whether one of them loses
    more is not decided. On the frontier: all of them surely lose more. A dense file is named first, then the best.
    """
    rivals = [one for one in points if one is not point and one.file_bytes <= point.file_bytes]
    beating, open_ = [], []
    for rival in rivals:
        difference = excess(rival, point)
        strict = rival.file_bytes < point.file_bytes or difference.bits < 0
        if difference.high is not None and difference.high <= 0:
            beating += [rival] if strict else []
        elif difference.low is None or difference.low <= 0:
            open_.append(rival)
    for verdict, named in ((DOMINATED, beating), (UNDECIDED, open_)):
        if named:
            first = min(named, key=lambda one: (not one.is_dense, one.bits_per_byte))
            return Standing(point.file, verdict, first.file)
    return Standing(point.file, FRONTIER, None)


def choose(points: Iterable[MeasuredFile], at_bytes: int) -> Choice:
    def best_of(some: Sequence[MeasuredFile]) -> MeasuredFile | None:
        return min(some, key=lambda one: (one.bits_per_byte, one.file_bytes, one.file), default=None)

    fitting = [point for point in points if point.file_bytes <= at_bytes]
    best, dense = best_of(fitting), best_of([point for point in fitting if point.is_dense])
    more = excess(dense, best) if best is not None and dense is not None and best is not dense else None
    return Choice(best.file if best else None, dense.file if dense else None, more, at_bytes)


def telling_sizes(points: Sequence[MeasuredFile]) -> tuple[int, ...]:
    """Sizes of the dense files, and of smaller ones: of those at which one file is the best, the least."""
    sizes = sorted({point.file_bytes for point in points})
    dense = {point.file_bytes for point in points if point.is_dense}
    least_size_of: dict[str | None, int] = {}
    for size in sizes:
        if size in dense or size < min(dense, default=0):
            least_size_of.setdefault(choose(points, size).best, size)
    return tuple(sorted(least_size_of.values()))
