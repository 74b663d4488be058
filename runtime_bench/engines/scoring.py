"""From rows of logits to what a model thinks of continuations; NumPy alone, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
