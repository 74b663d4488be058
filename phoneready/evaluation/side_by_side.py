"""Files of one model side by side, dense and pruned: what each loses on the same windows, in its own runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from cfsp.evaluation.bits import predicted_bytes, respelled
from cfsp.evaluation.divergence import Divergence, divergence, respelled_divergence
from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.perplexity import text_loss
from cfsp.progress import Progress
from cfsp.text.respelling import Respelling, respelling
from cfsp.text.tokens import TokenWindows
from phoneready.evaluation.measured_file import MeasuredText
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for


@dataclass(frozen=True)
class JudgedText:
    """A text as all files are measured on it; the ids are the dense model's.

    Attributes:
        kind: `text` or `chats`.
        windows: (n_windows, seqlen).
    """

    kind: str
    windows: TokenWindows


def measure_file(
    path: Path,
    dense: LanguageModel,
    tokenizer: Any,
    texts: Sequence[JudgedText],
    *,
    threads: int | None,
    progress: Progress,
) -> tuple[MeasuredText, ...]:
    """What a file loses, in its own runtime.

    Args:
        path: The file.
        dense: The dense model in float32.
        tokenizer: The file's, as its checkpoint has it.
        texts: What to measure on.
        threads: Of the runtime.
        progress: Told about every window.

    Raises:
        InputError: A text in the file's own tokens is longer than its context.
        LimitError: It gives logits that are not finite.
    """
    windows = [window for text in texts for window in text.windows.ids]
    same = tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    spelling = None if same else respelling(dense.tokenizer, tokenizer)
    lengths = (len(spelling.spell(window.tolist()).ids if spelling else window) for window in windows)
    opening = OpenSettings(max(lengths), threads=threads)
    with open_language_model(str(path), runtime_for(str(path)), opening, progress=progress) as model:
        return tuple(_measured(text, model, dense, spelling, progress) for text in texts)


def shortened(text: JudgedText, tokenizer: Any, other: Any) -> JudgedText:
    """The text in windows that a tokenizer without some of the tokens, too, spells in no more tokens than they had.

    Args:
        text: As cut for a tokenizer.
        tokenizer: That one.
        other: The other.
    """
    return replace(text, windows=respelling(tokenizer, other).shortened(text.windows))


def _measured(
    text: JudgedText,
    model: LanguageModel,
    dense: LanguageModel,
    spelling: Respelling | None,
    progress: Progress,
) -> MeasuredText:
    windows, ids = text.windows, text.windows.ids
    compare = partial(_other_tokens, spelling) if spelling else _same_tokens
    losses = []
    for number, window in enumerate(ids, 1):
        losses.append(compare(window, model, dense))
        progress("measuring", number, len(ids))
    n_tokens = sum(loss.n_tokens for loss in losses)
    return MeasuredText(
        text.kind,
        windows.source,
        ids.shape[1],
        windows.sha256,
        n_tokens,
        n_bytes=tuple(max(1, predicted_bytes(window[None], dense.tokenizer)) for window in ids),
        nats=tuple(loss.nats for loss in losses),
        dense_nats=tuple(loss.dense_nats for loss in losses),
        kl_mean=fmean(loss.kl_mean for loss in losses),
        same_top1=fmean(loss.same_top1 for loss in losses),
    )


@dataclass(frozen=True)
class _WindowLoss:
    n_tokens: int
    nats: float
    dense_nats: float
    kl_mean: float
    same_top1: float


def _other_tokens(
    spelling: Respelling, window: torch.Tensor, model: LanguageModel, dense: LanguageModel
) -> _WindowLoss:
    """All of the window's text, however many tokens that takes, as the file's own tokenizer cuts it."""
    loss = _loss(respelled_divergence(dense, model, TokenWindows(window[None], "", ""), spelling))
    text = respelled(window, dense.tokenizer, model.tokenizer)
    loss = replace(loss, n_tokens=len(text.ids) - text.n_context)
    if text.ids.equal(spelling.spell(window.tolist()).ids):
        return loss
    return replace(loss, nats=text_loss(model, [text]))


def _same_tokens(window: torch.Tensor, model: LanguageModel, dense: LanguageModel) -> _WindowLoss:
    return _loss(divergence(dense, model, TokenWindows(window[None], "", "")))


def _loss(found: Divergence) -> _WindowLoss:
    nats, dense_nats = (math.log(p) * found.n_tokens for p in (found.perplexity, found.reference_perplexity))
    return _WindowLoss(found.n_tokens, nats, dense_nats, found.kl_mean, found.same_top1)
