"""What sessions that answer share: from rows of logits to log-likelihoods, in float64, and where a text ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from cfsp.errors import LimitError


def continuation_scores(
    pieces: Iterable[npt.NDArray[np.float32]], continuations: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """For each continuation ln p of its tokens, in nats, and whether each is the likeliest.

    Args:
        pieces: Rows of logits (k, vocab_size) after the context, then after all tokens but the last of each
            continuation in turn.
        continuations: Token ids, at least one each.

    Raises:
        LimitError: Logits that are not finite.
    """
    first = [(number, tokens[0]) for number, tokens in enumerate(continuations)]
    later = [[(number, token)] for number, tokens in enumerate(continuations) for token in tokens[1:]]
    predicted = iter([first, *later])
    sums, is_greedy = [0.0] * len(continuations), [True] * len(continuations)
    for piece in pieces:
        most = piece.max(-1).astype(np.float64)
        if not np.isfinite(most).all():
            raise LimitError("the model gives logits that are not finite")
        totals = most + np.log(np.exp(piece - most[:, None]).sum(-1))
        for row, total, best in zip(piece, totals, piece.argmax(-1), strict=True):
            for number, token in next(predicted):
                sums[number] += float(row[token] - total)
                is_greedy[number] = is_greedy[number] and int(best) == token
    return list(zip(sums, is_greedy, strict=True))


def ends_at(decode: Callable[[list[int]], str], stop_strings: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the text of some tokens has one of the strings in it, as a function of the tokens."""

    def is_over(tokens: list[int]) -> bool:
        text = decode(tokens) if stop_strings else ""
        return any(stop in text for stop in stop_strings)

    return is_over
