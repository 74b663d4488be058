"""How far a model's predictions are from the dense model's, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, starmap
from typing import Any

import torch
from pydantic import PositiveFloat

from cfsp.devices import exact
from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.perplexity import (
    LogitsOf,
    bounded_exp,
    check_finite_sums,
    few_rows,
    logits_of,
    summed_loss,
)
from cfsp.progress import Progress, no_progress
from cfsp.text.respelling import Respelled, Respelling
from cfsp.text.tokens import TokenWindows
from cfsp.validation import Share


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats over next-token distributions, and agreement.

    Attributes:
        kl_mean: Mean over tokens.
        kl_median: Median over tokens.
        kl_p99: 99th percentile.
        kl_p99_9: 99.9th percentile.
        same_top1: Share of tokens where both put the same token first.
        max_logit_difference: Largest absolute difference of any logit; of logits against log-probabilities where the
            vocabularies differ, which says nothing.
        reference_perplexity: Perplexity of the reference on the same tokens.
        perplexity: Perplexity of the model on them.
        perplexity_ratio: perplexity / reference_perplexity.
        n_tokens: Number of positions compared.
        source: Text reference.
        seqlen: Tokens in a window.
        windows_sha256: Hash of the token ids.
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
    """Divergence of `model` from `reference` on windows (n_windows, seqlen).

    Both are LanguageModels or transformers causal LMs. Where one predicts more tokens than the other (padding of
    the embedding), only the tokens of both count.
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
    """Pieces of both over the same positions, though each runtime cuts its logits where it likes."""
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
    """Divergence from logits, wherever they were computed.

    Args:
        pairs: (reference logits (n, vocab_size), model logits (n, vocab_size), target ids (n,)), chunk by chunk; the
            last position of a window may be among them, with no target.
        windows: What the logits were computed on, for the record.

    Raises:
        LimitError: Logits that are not finite.
    """
    sums, predicted, nll_reference, nll_model = _Sums(), 0, 0.0, 0.0
    with torch.inference_mode():
        for expected, actual, targets in chain.from_iterable(starmap(few_rows, pairs)):
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
    """Divergence of a model that lost tokens from the one that has them all.

    KL and agreement are taken where one of the reference's tokens ends, in the model's tokens; perplexities are a token
    of the reference's, for both, so that their ratio says what the same text costs.

    Args:
        reference: Has all tokens.
        model: Has those that `respelling` spells in.
        windows: (n_windows, seqlen) of the reference's token ids; the model reads all of their text, however many
            tokens that takes.

    Raises:
        LimitError: Logits that are not finite.
    """
    sums, nll_reference, nll_model = _Sums(), 0.0, 0.0
    texts = [respelling.spell(window.tolist()) for window in windows.ids]
    run_model = logits_of(model, [text.ids for text in texts])
    run_reference = logits_of(reference, list(windows.ids))
    for done, (window, text) in enumerate(zip(windows.ids, texts, strict=True), 1):
        ours = _Loss(text.ids, int((text.owners == 0).sum()))
        theirs = _Loss(window, 1)
        right = _where_tokens_end(respelling, text, ours.read(run_model))
        with torch.inference_mode():
            for _, *both in _aligned(theirs.read(run_reference), right):
                for expected, actual in few_rows(*both):
                    sums.add(respelling.log_probabilities(expected.float()), actual.float())
        nll_reference, nll_model = nll_reference + theirs.nats, nll_model + ours.nats
        progress("measuring divergence", done, len(windows.ids))
    return sums.result(windows, nll_reference, nll_model, windows.ids[:, 1:].numel())


def _where_tokens_end(
    respelling: Respelling, text: Respelled, pieces: Iterator[tuple[slice, torch.Tensor]]
) -> Iterator[tuple[slice, torch.Tensor]]:
    for positions, logits in pieces:
        ended = logits[text.ends[positions.start - 1 : positions.stop - 1], : len(respelling.kept)]
        if len(ended):
            yield positions, ended


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
        """All of it, with what both lose on so many tokens."""
        kl = torch.cat(self.kls).sort().values
        check_finite_sums(float(kl.sum()), nll_reference, nll_model)
        n = len(kl)
        return Divergence(
            kl_mean=float(kl.mean()),
            kl_median=_quantile(kl, 0.5),
            kl_p99=_quantile(kl, 0.99),
            kl_p99_9=_quantile(kl, 0.999),
            same_top1=self.same / n,
            max_logit_difference=self.largest,
            reference_perplexity=bounded_exp(nll_reference / predicted),
            perplexity=bounded_exp(nll_model / predicted),
            perplexity_ratio=bounded_exp((nll_model - nll_reference) / predicted),
            n_tokens=n,
            source=windows.source,
            seqlen=windows.ids.shape[1],
            windows_sha256=windows.sha256,
        )


@dataclass
class _Loss:
    """Adds up the loss of a text's tokens but the first few while their logits are read."""

    ids: torch.Tensor
    context: int
    nats: float = 0.0

    def read(self, run: LogitsOf) -> Iterator[tuple[slice, torch.Tensor]]:
        for positions, logits in run(self.ids):
            known = max(0, self.context - positions.start)
            self.nats += summed_loss(logits[known:], self.ids[positions][known:])
            yield positions, logits


def _quantile(ordered: torch.Tensor, q: float) -> float:
    """Nearest-rank quantile; torch.quantile refuses more than 2^24 values."""
    return float(ordered[round(q * (len(ordered) - 1))])
