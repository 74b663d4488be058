"""Files of one model side by side, dense and pruned: what each loses on the same windows, in its own runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cfsp.evaluation.divergence import divergence, respelled_divergence
from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.perplexity import predicted_bytes, respelled, text_loss
from cfsp.progress import Progress
from cfsp.text.respelling import Respelling, respelling
from cfsp.text.tokens import TokenWindows
from phoneready.evaluation.measured_file import MeasuredText
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for


@dataclass(frozen=True)
class JudgedText:
    """A text, `text` or `chats`, in windows of the dense model's ids, (n_windows, seqlen)."""

    kind: str
    windows: TokenWindows


def shortened(text: JudgedText, tokenizer: Any, other: Any) -> JudgedText:
    """The text, as cut for a tokenizer, in windows that `other`, too, spells in no more tokens than they had."""
    return replace(text, windows=respelling(tokenizer, other).shortened(text.windows))


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


def _measured(
    text: JudgedText,
    model: LanguageModel,
    dense: LanguageModel,
    spelling: Respelling | None,
    progress: Progress,
) -> MeasuredText:
    ids = text.windows.ids
    n_tokens, nats, found = 0, [], []
    for number, window in enumerate(ids, 1):
        alone = TokenWindows(window[None], "", "")
        if spelling is None:
            one = divergence(dense, model, alone)
            n_tokens += one.n_tokens
            loss = math.log(one.perplexity) * one.n_tokens
        else:
            # All of the window's text, however many tokens that takes, as the file's own tokenizer cuts it.
            one = respelled_divergence(dense, model, alone, spelling)
            own = respelled(window, dense.tokenizer, model.tokenizer)
            n_tokens += len(own.ids) - own.n_context
            same_cut = own.ids.equal(spelling.spell(window.tolist()).ids)
            loss = math.log(one.perplexity) * one.n_tokens if same_cut else text_loss(model, [own])
        nats.append(loss)
        found.append(one)
        progress("measuring", number, len(ids))
    return MeasuredText(
        text.kind,
        text.windows.source,
        ids.shape[1],
        text.windows.sha256,
        n_tokens,
        n_bytes=tuple(max(1, predicted_bytes(window[None], dense.tokenizer)) for window in ids),
        nats=tuple(nats),
        dense_nats=tuple(math.log(one.reference_perplexity) * one.n_tokens for one in found),
        kl_mean=fmean(one.kl_mean for one in found),
        same_top1=fmean(one.same_top1 for one in found),
    )
