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
from pydantic import NonNegativeInt, PositiveInt

from cfsp.devices import exact
from cfsp.errors import LimitError
from cfsp.evaluation.language_model import Branches, LanguageModel
from cfsp.evaluation.torch_model import BlocksAhead, TorchLanguageModel, next_token_logits
from cfsp.models.offload import is_paged
from cfsp.progress import Progress, no_progress
from cfsp.text.respelling import Respelling
from cfsp.text.tokens import TokenWindows, decode, encode, start_token

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
    """exp of the mean loss of the tokens of each window after its first, as `text_losses`."""
    found = text_losses(model, [Scored(window, 1) for window in windows.ids], progress=progress)
    return bounded_exp(sum(found) / windows.ids[:, 1:].numel())


def bounded_exp(nats: float) -> float:
    """exp, up to what a record can hold."""
    return math.exp(min(nats, 690.0))


class Scored(NamedTuple):
    """A text (n,) int64 of which all tokens but the first `n_context` (at least one) are predicted."""

    ids: torch.Tensor
    n_context: int


def text_losses(
    model: LanguageModel | torch.nn.Module | Any, texts: Sequence[Scored], *, progress: Progress = no_progress
) -> tuple[float, ...]:
    """Of each text the sum of -ln p over its predicted tokens, nats; raises LimitError if logits are not finite."""
    found: list[float] = []
    if isinstance(model, torch.nn.Module) or model.gives_logits:
        run = logits_of(model, [text.ids for text in texts])
        with torch.inference_mode():
            for text in texts:
                pieces = ((max(0, text.n_context - at.start), at, logits) for at, logits in run(text.ids))
                found.append(
                    sum(_summed_loss(rows[known:], text.ids[at][known:]) for known, at, rows in pieces)
                )
                progress("measuring perplexity", len(found), len(texts))
    else:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            rows = [(text.ids.tolist(), text.n_context) for text in texts[start : start + _TEXTS_AT_ONCE]]
            items = [Branches(tuple(ids[:first]), (tuple(ids[first:]),)) for ids, first in rows]
            found += (-sum(score.log_likelihood for score in scores) for scores in model.score(items))
            progress("measuring perplexity", start + len(items), len(texts))
    _check_finite(*found)
    return tuple(found)


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


def predicted_bytes(windows: torch.Tensor, tokenizer: Any) -> tuple[int, ...]:
    """Bytes that each of the windows (n_windows, seqlen) of token ids spells after its first token; at least one."""
    return tuple(max(1, len(decode(tokenizer, window[1:]).encode("utf-8"))) for window in windows)


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
class Distance:
    """KL(reference || model) in nats over next-token distributions, and agreement.

    For each window the sum of KL, the tokens `n_tokens` that it is taken at, and at how many of them both put the same
    token first; quantiles over all tokens.
    """

    kl: tuple[float, ...]
    n_tokens: tuple[PositiveInt, ...]
    n_same: tuple[NonNegativeInt, ...]
    kl_median: float
    kl_p99: float
    kl_p99_9: float

    @property
    def kl_mean(self) -> float:
        return sum(self.kl) / sum(self.n_tokens)

    @property
    def same_top1(self) -> float:
        return sum(self.n_same) / sum(self.n_tokens)


@dataclass(frozen=True)
class Divergence(Distance):
    """With -ln p of each window for both on the same tokens, `n_predicted` in all, which perplexities are of.

    With different vocabularies `max_logit_difference` means nothing.
    """

    nats: tuple[float, ...]
    reference_nats: tuple[float, ...]
    n_predicted: int
    max_logit_difference: float

    @property
    def perplexity(self) -> float:
        return bounded_exp(sum(self.nats) / self.n_predicted)

    @property
    def reference_perplexity(self) -> float:
        return bounded_exp(sum(self.reference_nats) / self.n_predicted)

    @property
    def perplexity_ratio(self) -> float:
        return bounded_exp((sum(self.nats) - sum(self.reference_nats)) / self.n_predicted)


Pieces = Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Of a window: reference logits (n, vocab_size), model logits (n, vocab_size), target ids (n,)."""


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

    def pieces(window: torch.Tensor) -> Pieces:
        for positions, expected, actual in _aligned(run_reference(window), run_model(window)):
            columns = min(expected.shape[-1], actual.shape[-1])
            yield expected[:, :columns], actual[:, :columns], window[positions]

    def every() -> Iterator[Pieces]:
        for done, window in enumerate(windows.ids, 1):
            yield pieces(window)
            progress("measuring divergence", done, len(windows.ids))

    return divergence_from_logits(every())


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


def divergence_from_logits(windows: Iterable[Pieces]) -> Divergence:
    """From the logits of each window, whose last position may come without a target; raises as `text_losses`."""
    sums, predicted = _Sums(), 0
    with torch.inference_mode():
        for window in windows:
            reference, model = 0.0, 0.0
            for expected, actual, targets in chain.from_iterable(starmap(_few_rows, window)):
                log_p, log_q = sums.add(expected.float(), actual.float())
                targets = targets.to(log_p.device)
                reference -= float(exact(log_p.gather(-1, targets[:, None])).sum())
                model -= float(exact(log_q.gather(-1, targets[:, None])).sum())
                predicted += len(targets)
            sums.end_window(reference, model)
    return sums.result(predicted)


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
    sums, nll = _Sums(), [0.0, 0.0]  # the reference's, the model's, of one window
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
        nll[:] = 0.0, 0.0
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
        sums.end_window(*nll)
        progress("measuring divergence", done, len(windows.ids))
    return sums.result(windows.ids[:, 1:].numel())


@dataclass
class _Sums:
    """Gathers a divergence, piece by piece, window by window."""

    windows: list[torch.Tensor] = field(default_factory=list)
    same: list[int] = field(default_factory=list)
    nats: list[tuple[float, float]] = field(default_factory=list)
    kls: list[torch.Tensor] = field(default_factory=list)  # of the window at hand
    alike: int = 0
    largest: float = 0.0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, vocab_size) float32 of both; returns their log-probabilities."""
        actual = actual.to(expected.device)
        log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
        self.kls.append(exact((log_p.exp() * (log_p - log_q)).sum(-1)).clamp_min(0))
        self.alike += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        self.largest = max(self.largest, float((expected - actual).abs().max()))
        return log_p, log_q

    def end_window(self, reference: float, model: float) -> None:
        """With the loss of both on it."""
        self.windows.append(torch.cat(self.kls))
        self.same.append(self.alike)
        self.nats.append((reference, model))
        self.kls, self.alike = [], 0

    def result(self, predicted: int) -> Divergence:
        """All of it; both predicted so many tokens."""
        kl = torch.cat(self.windows).sort().values
        reference, model = zip(*self.nats, strict=True)
        _check_finite(float(kl.sum()), *reference, *model)
        # Nearest rank; torch.quantile refuses more than 2^24 values.
        median, p99, p99_9 = (float(kl[round(q * (len(kl) - 1))]) for q in (0.5, 0.99, 0.999))
        return Divergence(
            kl=tuple(float(one.sum()) for one in self.windows),
            n_tokens=tuple(len(one) for one in self.windows),
            n_same=tuple(self.same),
            kl_median=median,
            kl_p99=p99,
            kl_p99_9=p99_9,
            nats=model,
            reference_nats=reference,
            n_predicted=predicted,
            max_logit_difference=self.largest,
        )
