"""Perplexity over fixed windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cfsp.progress import Progress, no_progress
from cfsp.text import TokenWindows

__all__ = ["Perplexity", "next_token_logits", "perplexity"]

_CHUNK = 256


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


def next_token_logits(model: Any, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits that predict tokens 1.. of one window, in chunks, so that seqlen x vocab_size is never held.

    Args:
        model: A causal LM.
        window: (seqlen,) int64.

    Yields:
        (slice of target positions, logits (chunk, vocab_size) float32).
    """
    hidden = model.get_decoder()(input_ids=window[None], use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    last = len(window) - 1
    for start in range(0, last, _CHUNK):
        stop = min(start + _CHUNK, last)
        yield slice(start + 1, stop + 1), head(hidden[start:stop]).float()


def perplexity(model: Any, windows: TokenWindows, *, progress: Progress = no_progress) -> Perplexity:
    """Perplexity of a model on windows (n_windows, seqlen)."""
    total = 0.0
    with torch.inference_mode():
        for done, window in enumerate(windows.ids, 1):
            for positions, logits in next_token_logits(model, window):
                total += float(F.cross_entropy(logits, window[positions], reduction="sum"))
            progress("measuring perplexity", done, len(windows.ids))
    count, seqlen = windows.ids.shape
    scored = count * (seqlen - 1)
    return Perplexity(
        math.exp(min(total / scored, 700.0)), windows.source, seqlen, count, scored, windows.sha256
    )
