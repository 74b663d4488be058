"""What files of one model lose on the same windows of text, so that each can be compared with all others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import NonNegativeFloat, PositiveInt

from cfsp.evaluation.perplexity import tokens_per_byte
from cfsp.validation import Share
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
        kl_mean: Mean KL divergence from the dense model, nats; with fewer tokens, over these, where a dense one ends.
            None in records of versions that did not measure it there.
        same_top1: Share of the same positions where both put the same token first.
    """

    kind: str
    source: str
    seqlen: PositiveInt
    windows_sha256: str
    n_tokens: PositiveInt
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
        """Of this text only."""
        return sum(self.nats) / (math.log(2) * sum(self.n_bytes))


@dataclass(frozen=True)
class MeasuredFile:
    """A file, its size, and what it loses; all files have the same windows."""

    file: str
    file_bytes: PositiveInt
    texts: tuple[MeasuredText, ...]

    @property
    def is_dense(self) -> bool:
        """Whether nothing was removed."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The file, for people."""
        raise NotImplementedError

    @property
    def n_bytes(self) -> int:
        """Of all texts together."""
        return sum(sum(text.n_bytes) for text in self.texts)

    @property
    def bits_per_byte(self) -> float:
        """Of all texts together."""
        return sum(sum(text.nats) for text in self.texts) / (math.log(2) * self.n_bytes)

    @property
    def tokens_per_byte(self) -> float:
        """Tokens that the file needs for a byte of all texts together."""
        return tokens_per_byte(sum(text.n_tokens for text in self.texts), self.n_bytes)

    @property
    def dense_bits_per_byte(self) -> float:
        """The dense model's in float32, of all texts together."""
        return sum(sum(text.dense_nats) for text in self.texts) / (math.log(2) * self.n_bytes)

    @property
    def kl_mean(self) -> float | None:
        """Mean KL divergence over the texts' tokens; None if no text has one."""
        return _mean((t.kl_mean, t.n_tokens) for t in self.texts)

    @property
    def same_top1(self) -> float | None:
        """Share of tokens where the dense model puts the same one first; None if no text has it."""
        return _mean((t.same_top1, t.n_tokens) for t in self.texts)


def _mean(weighted: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in weighted if value is not None]
    return sum(value * weight for value, weight in known) / sum(w for _, w in known) if known else None
