"""What files of one model lose on the same windows of text, and which of them others dominate."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import PositiveInt

from phoneready.evaluation.evaluation_record import TextLoss
from runtime_bench.records.compare import INCONCLUSIVE, NO_DIFFERENCE, PairJudgement, judge_pairs
from runtime_bench.records.pairs import Windows


@dataclass(frozen=True)
class MeasuredFile:
    """A file, its size, and what it loses; all files have the same windows."""

    file: str
    file_bytes: PositiveInt
    texts: tuple[TextLoss, ...]

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
        return self.windows.value

    @functools.cached_property
    def windows(self) -> Windows:
        """Bits and bytes of all texts' windows, by which files are compared."""
        every = [text.bits for text in self.texts]
        return Windows(sum((one.sums for one in every), ()), sum((one.sizes for one in every), ()))

    @property
    def tokens_per_byte(self) -> float:
        return sum(sum(text.n_tokens) for text in self.texts) / self.n_bytes

    @property
    def dense_bits_per_byte(self) -> float:
        """What the dense model loses in float32."""
        return sum(sum(text.against_nats) for text in self.texts) / (math.log(2) * self.n_bytes)

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence over the texts' tokens."""
        found = [text.distance for text in self.texts if text.distance]
        return sum(sum(one.kl) for one in found) / sum(sum(one.n_tokens) for one in found)

    @property
    def same_top1(self) -> float:
        """Share of tokens where the dense model puts the same one first."""
        found = [text.distance for text in self.texts if text.distance]
        return sum(sum(one.n_same) for one in found) / sum(sum(one.n_tokens) for one in found)


VERDICTS = FRONTIER, AS_GOOD, UNDECIDED, DOMINATED = "frontier", NO_DIFFERENCE, INCONCLUSIVE, "dominated"


@dataclass(frozen=True)
class Standing:
    """A verdict of VERDICTS, and the file that dominates this one or is not told from it; None on the frontier."""

    file: str
    verdict: str
    by: str | None


class Tested(NamedTuple):
    """The best file of two groups, and the bits per byte of the second over those of the first."""

    first: str
    second: str
    found: PairJudgement


class Choice(NamedTuple):
    """The best file of `at_bytes` or less, the best dense one, and how pruned ones compare with that."""

    best: str | None
    dense: str | None
    tested: Tested | None
    at_bytes: int


def standing(point: MeasuredFile, points: Iterable[MeasuredFile]) -> Standing:
    """A file against all that are no larger.

    Dominated: one of them loses no more (95 % CI), and is smaller or loses less. No difference, or inconclusive: that
    is what `judge_pairs` says of one of them. On the frontier: all of them lose more (95 % CI). A dense file is named
    first, then the best.
    """
    rivals = [one for one in points if one is not point and one.file_bytes <= point.file_bytes]
    named: dict[str, list[MeasuredFile]] = {DOMINATED: [], AS_GOOD: [], UNDECIDED: []}
    for rival in rivals:
        found = judge_pairs(point.windows, rival.windows)
        if found.high is not None and found.high <= 1:
            strict = rival.file_bytes < point.file_bytes or (found.value or 1) < 1
            named[DOMINATED] += [rival] if strict else []
        elif found.low is None or found.low <= 1:
            named[AS_GOOD if found.verdict == NO_DIFFERENCE else UNDECIDED].append(rival)
    for verdict, some in named.items():
        if some:
            first = min(some, key=lambda one: (not one.is_dense, one.bits_per_byte))
            return Standing(point.file, verdict, first.file)
    return Standing(point.file, FRONTIER, None)


def choose_and_test(firsts: Sequence[MeasuredFile], seconds: Sequence[MeasuredFile]) -> Tested | None:
    """The best of each group, chosen on every other window and compared on those between; None if one has no file.

    On the windows that it was chosen on, the best of several seems better than it is.
    """
    if not firsts or not seconds:
        return None
    one, other = (
        min(group, key=lambda file: (file.windows.part(0, 2).value, file.file_bytes, file.file))
        for group in (firsts, seconds)
    )
    pair = one.windows, other.windows
    if len(firsts) + len(seconds) > 2 and len(pair[0].sums) > 1:
        pair = pair[0].part(1, 2), pair[1].part(1, 2)
    return Tested(one.file, other.file, judge_pairs(*pair))


def choose(points: Iterable[MeasuredFile], at_bytes: int) -> Choice:
    def best_of(some: Sequence[MeasuredFile]) -> MeasuredFile | None:
        return min(some, key=lambda one: (one.bits_per_byte, one.file_bytes, one.file), default=None)

    fitting = [point for point in points if point.file_bytes <= at_bytes]
    dense, pruned = ([one for one in fitting if one.is_dense == side] for side in (True, False))
    best, best_dense = best_of(fitting), best_of(dense)
    return Choice(
        best.file if best else None,
        best_dense.file if best_dense else None,
        choose_and_test(dense, pruned),
        at_bytes,
    )


def telling_sizes(points: Sequence[MeasuredFile]) -> tuple[int, ...]:
    """Sizes of the dense files, and of smaller ones: of those at which one file is the best, the least."""
    sizes = sorted({point.file_bytes for point in points})
    dense = {point.file_bytes for point in points if point.is_dense}
    least_size_of: dict[str | None, int] = {}
    for size in sizes:
        if size in dense or size < min(dense, default=0):
            least_size_of.setdefault(choose(points, size).best, size)
    return tuple(sorted(least_size_of.values()))
