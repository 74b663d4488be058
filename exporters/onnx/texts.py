"""What a graph makes of whole texts: rows of logits behind a context, and continuations.

NumPy alone, so that a process that runs a file holds no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from cfsp.text.choosing import Chooser, greedy
from exporters.onnx.runtime import FloatArray, OnnxModel


def continuation_rows(
    model: OnnxModel, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> FloatArray:
    """Logits after a context, and after all tokens but the last of each continuation in turn, (n, vocab_size).

    After each continuation the cache is rewound, or the context is read again.
    """
    rows = [_read(model, context)[-1:]]
    for continuation in continuations:
        if len(continuation) > 1:
            if model.can_rewind:
                model.rewind(len(context))
            elif model.n_past != len(context):
                _read(model, context)
            rows.append(model.decode(continuation[:-1]).copy())
    return np.concatenate(rows)


def write(
    model: OnnxModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    ends: Collection[int],
    is_over: Callable[[list[int]], bool],
    choose: Chooser = greedy,
) -> list[int]:
    """Continuation of a prompt, without the token that ends it.

    Args:
        model: The graph.
        prompt: Token ids, at least one.
        max_new_tokens: Most tokens of the continuation.
        ends: Tokens that end a text.
        is_over: Whether what was written ends there.
        choose: Chooses its tokens.
    """
    answer: list[int] = []
    logits = _read(model, prompt)
    while (token := choose(prompt, answer, logits[-1])) not in ends:
        answer.append(token)
        if len(answer) == max_new_tokens or is_over(answer):
            break
        logits = model.decode([token])
    return answer


def _read(model: OnnxModel, tokens: Sequence[int]) -> FloatArray:
    """Logits of the last piece of a text that nothing comes before."""
    *_, last = model.iter_logits(np.asarray(tokens, dtype=np.int64))
    return last.copy()
