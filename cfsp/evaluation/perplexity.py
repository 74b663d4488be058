"""Perplexity over fixed windows."""

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
from cfsp.models.paging import is_paged
from cfsp.progress import Progress, no_progress
from cfsp.text.tokens import TokenWindows

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
    """`next_token_logits` of a LanguageModel, or of a bare transformers causal LM.

    Args:
        model: Either.
        windows: What it will be asked for, in turn, each (n,) int64.
    """
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
