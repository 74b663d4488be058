"""Loss on a text: perplexity over fixed windows, and bits and tokens per byte of models of different vocabularies.

A tokenizer that cuts a text into more tokens predicts each of them more easily, so perplexity a token says nothing of
two vocabularies; nats of the whole text over its bytes do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from cfsp.errors import LimitError
from cfsp.evaluation.language_model import Branches, LanguageModel
from cfsp.evaluation.torch_model import BlocksAhead, bare_model, next_token_logits
from cfsp.models.offload import is_paged
from cfsp.progress import Progress, no_progress
from cfsp.text.tokens import TokenWindows, decode, encode, start_token

_ROWS = 16
"""Positions whose logits are worked on at once: a megabyte or a few, which stay in the processor's cache."""
_TEXTS_AT_ONCE = 8
"""Whose likelihood is asked for together."""

LogitsOf = Callable[[torch.Tensor], Iterator[tuple[slice, torch.Tensor]]]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of each window's tokens after its first.

    Attributes:
        perplexity: The figure.
        source: Text reference.
        seqlen: Tokens in a window; every window starts without context.
        n_windows: Number of windows.
        n_scored: Number of predicted tokens, n_windows * (seqlen - 1).
        windows_sha256: Hash of the token ids.
    """

    perplexity: float
    source: str
    seqlen: int
    n_windows: int
    n_scored: int
    windows_sha256: str


def logits_of(model: LanguageModel | torch.nn.Module | Any, windows: Sequence[torch.Tensor]) -> LogitsOf:
    """`next_token_logits` of a LanguageModel, or of a bare transformers causal LM."""
    bare = model if isinstance(model, torch.nn.Module) else bare_model(model)
    if bare is not None and is_paged(bare):
        return BlocksAhead(bare, windows)
    if isinstance(model, torch.nn.Module):
        return partial(next_token_logits, model)
    method: LogitsOf = model.next_token_logits
    return method


def perplexity(
    model: LanguageModel | torch.nn.Module | Any,
    windows: TokenWindows,
    *,
    progress: Progress = no_progress,
) -> Perplexity:
    """Perplexity of a model (a LanguageModel or a transformers causal LM) on windows (n_windows, seqlen).

    Raises:
        LimitError: The model gives logits that are not finite.
    """
    total = text_loss(model, [Scored(window, 1) for window in windows.ids], progress=progress)
    count, seqlen = windows.ids.shape
    scored = count * (seqlen - 1)
    return Perplexity(bounded_exp(total / scored), windows.source, seqlen, count, scored, windows.sha256)


def bounded_exp(nats: float) -> float:
    """exp, up to what a record can hold: a perplexity beyond that is none."""
    return math.exp(min(nats, 690.0))


@dataclass(frozen=True)
class Scored:
    """A text of which all tokens but the first few are predicted.

    Attributes:
        ids: (n,) int64.
        n_context: Tokens at the beginning that are not, at least one.
    """

    ids: torch.Tensor
    n_context: int


def text_loss(
    model: LanguageModel | torch.nn.Module | Any, texts: Sequence[Scored], *, progress: Progress = no_progress
) -> float:
    """Sum of -ln p over the predicted tokens of all texts, in nats.

    Raises:
        LimitError: The model gives logits that are not finite.
    """
    if not isinstance(model, torch.nn.Module) and not model.gives_logits:
        return _scored_loss(model, texts, progress)
    total = 0.0
    run = logits_of(model, [text.ids for text in texts])
    with torch.inference_mode():
        for done, text in enumerate(texts, 1):
            for positions, logits in run(text.ids):
                context = max(0, text.n_context - positions.start)
                total += summed_loss(logits[context:], text.ids[positions][context:])
            progress("measuring perplexity", done, len(texts))
    check_finite_sums(total)
    return total


def _scored_loss(model: LanguageModel, texts: Sequence[Scored], progress: Progress) -> float:
    """`text_loss` of a model that says how likely a text is, and no more."""
    total = 0.0
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        rows = [(text.ids.tolist(), text.n_context) for text in texts[start : start + _TEXTS_AT_ONCE]]
        items = [Branches(tuple(ids[:first]), (tuple(ids[first:]),)) for ids, first in rows]
        total -= sum(score.log_likelihood for scores in model.score(items) for score in scores)
        progress("measuring perplexity", start + len(items), len(texts))
    check_finite_sums(total)
    return total


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -ln p of targets (n,) under logits (n, vocab_size), in nats."""
    pieces = few_rows(logits, targets)
    losses = (F.cross_entropy(some.float(), ids.to(some.device), reduction="sum") for some, ids in pieces)
    return sum(map(float, losses))


def few_rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """A few rows of each tensor at a time, until the first one's are over."""
    for start in range(0, len(tensors[0]), _ROWS):
        yield tuple(tensor[start : start + _ROWS] for tensor in tensors)


def check_finite_sums(*sums: float) -> None:
    """Raise LimitError where a sum over tokens is NaN or infinite: so was a logit."""
    if not all(map(math.isfinite, sums)):
        raise LimitError("a model gives logits that are not finite: an overflow, or a damaged file")


@dataclass(frozen=True)
class TextLoss:
    """Loss of one model on a text.

    Attributes:
        nats: Sum of -ln p over the predicted tokens.
        n_tokens: Their number.
        n_bytes: Bytes of the text that they spell, in UTF-8.
    """

    nats: float
    n_tokens: int
    n_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """log2 of the text's improbability over its bytes."""
        return bits_per_byte(self.nats, self.n_bytes)

    @property
    def tokens_per_byte(self) -> float:
        """Tokens that the text takes over its bytes."""
        return tokens_per_byte(self.n_tokens, self.n_bytes)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a token."""
        return bounded_exp(self.nats / self.n_tokens)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """nats / (ln 2 * n_bytes)."""
    return nats / (math.log(2) * max(n_bytes, 1))


def tokens_per_byte(n_tokens: int, n_bytes: int) -> float:
    """n_tokens / n_bytes."""
    return n_tokens / max(n_bytes, 1)


def predicted_bytes(ids: torch.Tensor, tokenizer: Any) -> int:
    """Bytes that windows (n_windows, seqlen) of token ids spell after their first token."""
    return sum(len(decode(tokenizer, window[1:]).encode("utf-8")) for window in ids)


def losses_on_shared_text(
    reference: LanguageModel, model: LanguageModel, windows: TokenWindows, *, progress: Progress = no_progress
) -> tuple[TextLoss, TextLoss]:
    """What two models of different vocabularies lose on the same text: (the reference's, the model's).

    Windows are the reference's; where the other needs more tokens for the text of one, the window ends where both have
    at most `seqlen`. Its first token is context for both.

    Raises:
        LimitError: A model gives logits that are not finite.
    """
    pairs = [shared_text(window, reference.tokenizer, model.tokenizer) for window in windows.ids]
    n_bytes = sum(predicted_bytes(theirs.ids[None], reference.tokenizer) for theirs, _ in pairs)
    columns = zip((reference, model), zip(*pairs, strict=True), strict=True)
    first, second = (_loss(one, texts, n_bytes, progress) for one, texts in columns)
    return first, second


def _loss(model: LanguageModel, texts: Sequence[Scored], n_bytes: int, progress: Progress) -> TextLoss:
    n_tokens = sum(len(text.ids) - text.n_context for text in texts)
    return TextLoss(text_loss(model, texts, progress=progress), n_tokens, n_bytes)


def respelled(window: torch.Tensor, tokenizer: Any, other: Any) -> Scored:
    """The text of a window (seqlen,) in the tokens of another tokenizer; what its first token says is context.

    A start token says nothing: the other tokenizer's takes its place, or, where it has none, what parts its texts.
    """
    first = int(window[0])
    if first == start_token(tokenizer):
        starts = (start_token(other), other.eos_token_id, other.bos_token_id)
        head = [token for token in starts if token is not None][:1]
    else:
        start = start_token(other)
        head = [*([] if start is None else [start]), *encode(other, decode(tokenizer, window[:1]))]
    rest = encode(other, decode(tokenizer, window[1:]))
    return Scored(torch.tensor([*head, *rest]), max(len(head), 1))


def shared_text(window: torch.Tensor, tokenizer: Any, other: Any) -> tuple[Scored, Scored]:
    """A window, shortened until the other tokenizer needs no more tokens for its text than it had, and these tokens."""
    size = len(window)
    while True:
        theirs = respelled(window[:size], tokenizer, other)
        excess = len(theirs.ids) - len(window)
        if excess <= 0 or size <= 2:
            return Scored(window[:size], 1), theirs
        size = max(2, size - excess)
