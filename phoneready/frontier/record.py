"""What was measured of files, and frontier.json."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from cfsp.errors import InputError
from cfsp.validation import Seed, Share
from phoneready.evaluation.evaluation_record import text_name


@dataclass(frozen=True)
class MeasuredText:
    """What a file loses on one text, window by window, beside what the dense model in float32 loses.

    Attributes:
        kind: `text` or `chats`.
        source: The reference.
        seqlen: Tokens in a window, of the dense model's.
        windows_sha256: Hash of their ids.
        n_tokens: Tokens that the file predicts.
        n_bytes: Bytes that they spell, of each window.
        nats: -ln p of each window.
        dense_nats: The dense model's.
        kl_mean: Mean KL divergence from the dense model, nats a token; None of another vocabulary.
        same_top1: Share of tokens where both put the same token first; None of another vocabulary.
    """

    kind: str
    source: str
    seqlen: int
    windows_sha256: str
    n_tokens: int
    n_bytes: tuple[PositiveInt, ...]
    nats: tuple[NonNegativeFloat, ...]
    dense_nats: tuple[NonNegativeFloat, ...]
    kl_mean: float | None = None
    same_top1: Share | None = None

    @property
    def name(self) -> str:
        """Kind and source without folders."""
        return text_name(self.kind, self.source)

    @property
    def bits_per_byte(self) -> float:
        """Of this text alone."""
        return _bits((self,))


@dataclass(frozen=True)
class Speed:
    """How fast a file writes, and what that takes.

    Attributes:
        test: The workload.
        n_threads: Threads.
        tokens_per_second: Median of the samples; None where it could not be measured.
        low: Their slowest tenth.
        high: Their fastest tenth.
        peak_rss_bytes: Most resident memory; None where unknown.
        failure: Why it could not be measured.
    """

    test: str
    n_threads: int
    tokens_per_second: float | None
    low: float | None
    high: float | None
    peak_rss_bytes: int | None
    failure: str | None = None


@dataclass(frozen=True)
class FrontierPoint:
    """A file and its figures.

    Attributes:
        file: Its name in the folder, where it may have been deleted.
        quant: Quantization.
        prune_ratio: Share of FFN channels that was to go.
        removed: Share that went, after alignment.
        vocabulary: Tokens that are kept; 0: all.
        allocation: As prune.allocation.
        align: Widths are multiples of it.
        file_bytes: Its size.
        expected_bytes: What its size was computed to be before it was made, where a size limited it.
        texts: What it loses; all files have the same windows.
        speed: How fast it is, where that was asked for.
        seconds: Time it took to make and measure.
    """

    KIND: ClassVar[str] = "frontier-point"
    SCHEMA_VERSION: ClassVar[int] = 1

    file: str
    quant: str
    prune_ratio: Share
    removed: Share
    vocabulary: NonNegativeInt
    allocation: str
    align: int
    file_bytes: PositiveInt
    expected_bytes: int | None
    texts: tuple[MeasuredText, ...]
    speed: Speed | None
    seconds: float

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or not self.file.endswith(".gguf"):  # it may be deleted
            raise InputError("not the name of a GGUF file", field="file", value=self.file)

    @property
    def is_dense(self) -> bool:
        """Whether nothing was removed."""
        return not self.prune_ratio and not self.vocabulary

    @property
    def model(self) -> str:
        """What was removed, for people."""
        return model_label(self.vocabulary, self.prune_ratio)

    @property
    def label(self) -> str:
        """The file, for people."""
        return f"{self.model} {self.quant}"

    @property
    def bits_per_byte(self) -> float:
        """Of all texts together."""
        return _bits(self.texts)

    @property
    def dense_bits_per_byte(self) -> float:
        """The dense model's in float32, of all texts together."""
        return sum(map(sum, (t.dense_nats for t in self.texts))) / (math.log(2) * _n_bytes(self.texts))

    @property
    def kl_mean(self) -> float | None:
        """Mean KL divergence over the texts' tokens; None of another vocabulary."""
        return _mean((t.kl_mean, t.n_tokens) for t in self.texts)

    @property
    def same_top1(self) -> float | None:
        """Share of tokens where the dense model puts the same one first; None of another vocabulary."""
        return _mean((t.same_top1, t.n_tokens) for t in self.texts)


@dataclass(frozen=True)
class Standing:
    """How a file stands to those that are no larger.

    Attributes:
        file: Its name.
        verdict: One of phoneready.frontier.dominance.VERDICTS.
        by: The file that it is dominated by, or not told apart from; None on the frontier.
    """

    file: str
    verdict: str
    by: str | None


@dataclass(frozen=True)
class Excess:
    """Bits per byte that one file loses more than another, with a 95 % interval over the windows of text."""

    bits: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Choice:
    """The best file of a size.

    Attributes:
        at_bytes: The size.
        best: The file with the fewest bits per byte that is no larger; None where all are.
        dense: The best such dense file; None where all are larger.
        excess: What `dense` loses more than `best`; None where they are one file, or there is none.
    """

    at_bytes: int
    best: str | None
    dense: str | None
    excess: Excess | None


@dataclass(frozen=True)
class Frontier:
    """frontier.json.

    Attributes:
        source: Reference of the dense model.
        source_sha256: Hash of its weights, where known.
        seed: Of everything drawn.
        calibration: References of the calibration text.
        vocabulary_text: Text whose tokens were counted; the calibration's where empty.
        points: All files that were measured, by size.
        standings: One for each, in that order.
        choices: The best file at each size that was asked for.
        left_out: Files that were not made, and why.
        failed: Files that could not be made, and why.
        open: Files that are still to be measured.
        kept: Files that lie in the folder.
    """

    KIND: ClassVar[str] = "frontier"
    SCHEMA_VERSION: ClassVar[int] = 1

    source: str
    source_sha256: str | None
    seed: Seed
    calibration: tuple[str, ...]
    vocabulary_text: tuple[str, ...]
    points: tuple[FrontierPoint, ...]
    standings: tuple[Standing, ...]
    choices: tuple[Choice, ...]
    left_out: tuple[str, ...]
    failed: tuple[str, ...]
    open: tuple[str, ...]
    kept: tuple[str, ...]

    def find(self, file: str | None) -> FrontierPoint | None:
        """The file of a name."""
        return next((point for point in self.points if point.file == file), None)


def model_label(vocabulary: int, prune_ratio: float) -> str:
    """What was removed, for people."""
    parts = [f"{vocabulary} tokens"] if vocabulary else []
    parts += [f"FFN -{100 * prune_ratio:g} %"] if prune_ratio else []
    return ", ".join(parts) or "dense"


def _n_bytes(texts: Iterable[MeasuredText]) -> int:
    return sum(sum(text.n_bytes) for text in texts)


def _bits(texts: tuple[MeasuredText, ...]) -> float:
    return sum(sum(text.nats) for text in texts) / (math.log(2) * _n_bytes(texts))


def _mean(weighted: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in weighted if value is not None]
    return sum(value * weight for value, weight in known) / sum(w for _, w in known) if known else None
