"""What a model loses on text: perplexity, bits per byte, and KL divergence from the dense model, token by token.

A tokenizer that cuts a text into more tokens predicts each of them more easily. Models of different vocabularies are
therefore compared in nats of the whole text over its bytes, not in perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, starmap
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat

from cfsp.devices import exact
from cfsp.errors import LimitError
from cfsp.evaluation.language_model import Branches, LanguageModel
from cfsp.evaluation.torch_model import BlocksAhead, TorchLanguageModel, next_token_logits
from cfsp.models.offload import is_paged
from cfsp.progress import Progress, no_progress
from cfsp.text.respelling import Respelling
from cfsp.text.tokens import TokenWindows, decode, encode, start_token
from cfsp.validation import Share

_ROWS = 16  # positions whose logits are worked on at once: they stay in the processor's cache
_TEXTS_AT_ONCE = 8  # whose likelihood is asked for together

LogitsOf = Callable[[torch.Tensor], Iterator[tuple[slice, torch.Tensor]]]


def logits_of(model: LanguageModel | torch.nn.Module | Any, windows: Sequence[torch.Tensor]) -> LogitsOf:
    """`next_token_logits` of a LanguageModel, or of a transformers causal LM, for windows in turn."""
    bare = model.loaded.model if type(model) is TorchLanguageModel else model
    if isinstance(bare, torch.nn.Module) and is_paged(bare):
        return BlocksAhead(bare, windows)
    if isinstance(model, torch.nn.Module):
        return partial(next_token_logits, model)
    method: LogitsOf = model.next_token_logits
    return method


def perplexity(
    model: LanguageModel | torch.nn.Module | Any, windows: TokenWindows, *, progress: Progress = no_progress
) -> float:
    """exp of the mean loss of the tokens of each window after its first, as `text_loss`."""
    total = text_loss(model, [Scored(window, 1) for window in windows.ids], progress=progress)
    return bounded_exp(total / windows.ids[:, 1:].numel())


def bounded_exp(nats: float) -> float:
    """exp, up to what a record can hold."""
    return math.exp(min(nats, 690.0))


class Scored(NamedTuple):
    """A text (n,) int64 of which all tokens but the first `n_context` (at least one) are predicted."""

    ids: torch.Tensor
    n_context: int


def text_loss(
    model: LanguageModel | torch.nn.Module | Any, texts: Sequence[Scored], *, progress: Progress = no_progress
) -> float:
    """Sum of -ln p over the predicted tokens of all texts, in nats; raises LimitError if logits are not finite."""
    total = 0.0
    if isinstance(model, torch.nn.Module) or model.gives_logits:
        run = logits_of(model, [text.ids for text in texts])
        with torch.inference_mode():
            for done, text in enumerate(texts, 1):
                for positions, logits in run(text.ids):
                    context = max(0, text.n_context - positions.start)
                    total += _summed_loss(logits[context:], text.ids[positions][context:])
                progress("measuring perplexity", done, len(texts))
    else:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            rows = [(text.ids.tolist(), text.n_context) for text in texts[start : start + _TEXTS_AT_ONCE]]
            items = [Branches(tuple(ids[:first]), (tuple(ids[first:]),)) for ids, first in rows]
            total -= sum(score.log_likelihood for scores in model.score(items) for score in scores)
            progress("measuring perplexity", start + len(items), len(texts))
    _check_finite(total)
    return total


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -ln p of targets (n,) under logits (n, vocab_size), in nats."""
    pieces = _few_rows(logits, targets)
    losses = (F.cross_entropy(some.float(), ids.to(some.device), reduction="sum") for some, ids in pieces)
    return sum(map(float, losses))


def _few_rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    for start in range(0, len(tensors[0]), _ROWS):
        yield tuple(tensor[start : start + _ROWS] for tensor in tensors)


def _check_finite(*sums: float) -> None:
    if not all(map(math.isfinite, sums)):
        raise LimitError("a model gives logits that are not finite: an overflow, or a damaged file")


def predicted_bytes(ids: torch.Tensor, tokenizer: Any) -> int:
    """Bytes that windows (n_windows, seqlen) of token ids spell after their first token."""
    return sum(len(decode(tokenizer, window[1:]).encode("utf-8")) for window in ids)


def losses_on_shared_text(
    reference: LanguageModel, model: LanguageModel, windows: TokenWindows, *, progress: Progress = no_progress
) -> tuple[tuple[float, int], tuple[float, int], int]:
    """What two models of different vocabularies lose on the same text.

    Windows are the reference's; where the other model needs more tokens for the text of one, the window ends where both
    have at most `seqlen`. Its first token is context for both.

    Returns:
        (nats, predicted tokens) of the reference, the same of the model, and the bytes of the text.
    """
    pairs = []
    for window in windows.ids:
        size = len(window)
        while True:
            theirs = respelled(window[:size], reference.tokenizer, model.tokenizer)
            excess = len(theirs.ids) - len(window)
            if excess <= 0 or size <= 2:
                break
            size = max(2, size - excess)
        pairs.append((Scored(window[:size], 1), theirs))
    n_bytes = sum(predicted_bytes(own.ids[None], reference.tokenizer) for own, _ in pairs)
    first, second = (
        (text_loss(one, texts, progress=progress), sum(len(ids) - start for ids, start in texts))
        for one, texts in zip((reference, model), zip(*pairs, strict=True), strict=True)
    )
    return first, second, n_bytes


def respelled(window: torch.Tensor, tokenizer: Any, other: Any) -> Scored:
    """The text of a window (seqlen,) in the tokens of another tokenizer; the text of its first token is context.

    A start token has no text: the other tokenizer's takes its place or, if it has none, its separator of texts.
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


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats over next-token distributions, and agreement.

    `same_top1` is the share of tokens that both put first. Perplexities are on the same tokens; `perplexity_ratio` is
    the model's over the reference's. With different vocabularies `max_logit_difference` means nothing.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_p99_9: float
    same_top1: Share
    max_logit_difference: float
    reference_perplexity: PositiveFloat
    perplexity: PositiveFloat
    perplexity_ratio: PositiveFloat
    n_tokens: int
    source: str
    seqlen: int
    windows_sha256: str


def divergence(
    reference: LanguageModel | torch.nn.Module | Any,
    model: LanguageModel | torch.nn.Module | Any,
    windows: TokenWindows,
    *,
    progress: Progress = no_progress,
) -> Divergence:
    """Divergence of `model` from `reference` on windows (n_windows, seqlen); LanguageModels or transformers causal LMs.

    Only the first logits count that both have: the rest is padding of an embedding.
    """
    run_reference, run_model = (logits_of(each, list(windows.ids)) for each in (reference, model))

    def pairs() -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for done, window in enumerate(windows.ids, 1):
            for positions, expected, actual in _aligned(run_reference(window), run_model(window)):
                columns = min(expected.shape[-1], actual.shape[-1])
                yield expected[:, :columns], actual[:, :columns], window[positions]
            progress("measuring divergence", done, len(windows.ids))

    return divergence_from_logits(pairs(), windows)


def _aligned(
    left: Iterator[tuple[slice, torch.Tensor]], right: Iterator[tuple[slice, torch.Tensor]]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Pieces of both over the same positions: each runtime cuts its logits in its own way."""
    start, a, b = 1, torch.empty(0), torch.empty(0)
    while True:
        if not len(a):
            _, a = next(left, (None, a))
        if not len(b):
            _, b = next(right, (None, b))
        count = min(len(a), len(b))
        if not count:
            return
        yield slice(start, start + count), a[:count], b[:count]
        start, a, b = start + count, a[count:], b[count:]


def divergence_from_logits(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], windows: TokenWindows
) -> Divergence:
    """Divergence from (reference logits (n, vocab_size), model logits (n, vocab_size), target ids (n,)) in pieces.

    The last position of a window may come without a target. `windows` are only recorded. Raises as `text_loss`.
    """
    sums, predicted, nll_reference, nll_model = _Sums(), 0, 0.0, 0.0
    with torch.inference_mode():
        for expected, actual, targets in chain.from_iterable(starmap(_few_rows, pairs)):
            log_p, log_q = sums.add(expected.float(), actual.float())
            targets = targets.to(log_p.device)
            nll_reference -= float(exact(log_p.gather(-1, targets[:, None])).sum())
            nll_model -= float(exact(log_q.gather(-1, targets[:, None])).sum())
            predicted += len(targets)
    return sums.result(windows, nll_reference, nll_model, predicted)


def respelled_divergence(
    reference: LanguageModel,
    model: LanguageModel,
    windows: TokenWindows,
    respelling: Respelling,
    *,
    progress: Progress = no_progress,
) -> Divergence:
    """Divergence of a model that lost tokens, as `respelling` says, from the one that has them all.

    KL and agreement are taken where a token of the reference ends, over the model's tokens; perplexities are per token
    of the reference for both. Windows (n_windows, seqlen) are of the reference's ids; the model reads all their text,
    however many tokens that takes.
    """
    sums, nll = _Sums(), [0.0, 0.0]  # the reference's, the model's
    texts = [respelling.spell(window.tolist()) for window in windows.ids]
    run_model = logits_of(model, [text.ids for text in texts])
    run_reference = logits_of(reference, list(windows.ids))

    def losing(
        side: int, run: LogitsOf, ids: torch.Tensor, context: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits on their way; the loss of all tokens but the first few is added up."""
        for positions, logits in run(ids):
            known = max(0, context - positions.start)
            nll[side] += _summed_loss(logits[known:], ids[positions][known:])
            yield positions, logits

    for done, (window, text) in enumerate(zip(windows.ids, texts, strict=True), 1):
        ours = losing(1, run_model, text.ids, int((text.owners == 0).sum()))
        ended = (
            (at, logits[text.ends[at.start - 1 : at.stop - 1], : len(respelling.kept)]) for at, logits in ours
        )
        with torch.inference_mode():
            for _, *both in _aligned(
                losing(0, run_reference, window, 1), ((at, rows) for at, rows in ended if len(rows))
            ):
                for expected, actual in _few_rows(*both):
                    sums.add(respelling.log_probabilities(expected.float()), actual.float())
        progress("measuring divergence", done, len(windows.ids))
    return sums.result(windows, nll[0], nll[1], windows.ids[:, 1:].numel())


@dataclass
class _Sums:
    """Gathers a divergence, piece by piece."""

    kls: list[torch.Tensor] = field(default_factory=list)
    same: int = 0
    largest: float = 0.0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, vocab_size) float32 of both; returns their log-probabilities."""
        actual = actual.to(expected.device)
        log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
        self.kls.append(exact((log_p.exp() * (log_p - log_q)).sum(-1)).clamp_min(0))
        self.same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        self.largest = max(self.largest, float((expected - actual).abs().max()))
        return log_p, log_q

    def result(
        self, windows: TokenWindows, nll_reference: float, nll_model: float, predicted: int
    ) -> Divergence:
        """All of it, with the loss of both on `predicted` tokens."""
        kl = torch.cat(self.kls).sort().values
        _check_finite(float(kl.sum()), nll_reference, nll_model)
        # Nearest rank; torch.quantile refuses more than 2^24 values.
        median, p99, p99_9 = (float(kl[round(q * (len(kl) - 1))]) for q in (0.5, 0.99, 0.999))
        return Divergence(
            kl_mean=float(kl.mean()),
            kl_median=median,
            kl_p99=p99,
            kl_p99_9=p99_9,
            same_top1=self.same / len(kl),
            max_logit_difference=self.largest,
            reference_perplexity=bounded_exp(nll_reference / predicted),
            perplexity=bounded_exp(nll_model / predicted),
            perplexity_ratio=bounded_exp((nll_model - nll_reference) / predicted),
            n_tokens=len(kl),
            source=windows.source,
            seqlen=windows.ids.shape[1],
            windows_sha256=windows.sha256,
        )
