"""Bits and tokens per byte: loss on a text, and length, of models of different vocabularies.

A tokenizer that cuts a text into more tokens predicts each of them more easily, so perplexity a token says nothing of
two vocabularies; nats of the whole text over its bytes do. What each token costs in time and context, that many tokens
a byte cost of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.perplexity import Scored, bounded_exp, text_loss
from cfsp.progress import Progress, no_progress
from cfsp.text.encoding import decode, encode, start_token
from cfsp.text.tokens import TokenWindows


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

    Args:
        reference: Whose token ids the windows have.
        model: The other model.
        windows: (n_windows, seqlen).
        progress: Told after each window.

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
