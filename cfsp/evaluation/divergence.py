"""How far a model's predictions are from the dense model's, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat

from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.perplexity import LogitsOf, bounded_exp, check_finite_sums, logits_of
from cfsp.progress import Progress, no_progress
from cfsp.text.respelling import Respelling
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
        max_logit_difference: Largest absolute difference of any logit.
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
    run_reference, run_model = logits_of(reference), logits_of(model)

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
    kls, same, predicted, largest, nll_reference, nll_model = [], 0, 0, 0.0, 0.0, 0.0
    with torch.inference_mode():
        for expected, actual, targets in pairs:
            log_p, log_q = expected.float().log_softmax(-1), actual.float().log_softmax(-1)
            kls.append((log_p.exp() * (log_p - log_q)).sum(-1).double().clamp_min(0))
            same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
            largest = max(largest, float((expected - actual).abs().max()))
            nll_reference -= float(log_p.gather(-1, targets[:, None]).double().sum())
            nll_model -= float(log_q.gather(-1, targets[:, None]).double().sum())
            predicted += len(targets)
    kl = torch.cat(kls).sort().values
    check_finite_sums(float(kl.sum()), nll_reference, nll_model)
    n = len(kl)
    return Divergence(
        kl_mean=float(kl.mean()),
        kl_median=_quantile(kl, 0.5),
        kl_p99=_quantile(kl, 0.99),
        kl_p99_9=_quantile(kl, 0.999),
        same_top1=same / n,
        max_logit_difference=largest,
        reference_perplexity=bounded_exp(nll_reference / predicted),
        perplexity=bounded_exp(nll_model / predicted),
        perplexity_ratio=bounded_exp((nll_model - nll_reference) / predicted),
        n_tokens=n,
        source=windows.source,
        seqlen=windows.ids.shape[1],
        windows_sha256=windows.sha256,
    )


@dataclass(frozen=True)
class WindowLoss:
    """What a model loses on a text, and how far it is from a reference that has all of its tokens.

    Attributes:
        n_tokens: Tokens that it predicts.
        nats: -ln p of the text.
        reference_nats: The reference's.
        kl_mean: KL(reference || model), nats, mean over the positions where one of the reference's tokens ends, in the
            model's tokens.
        same_top1: Share of these where both put the same token first.
    """

    n_tokens: int
    nats: float
    reference_nats: float
    kl_mean: float
    same_top1: Share


def respelled_divergence(
    reference: LanguageModel, model: LanguageModel, window: torch.Tensor, respelling: Respelling
) -> WindowLoss:
    """Hold a model that lost tokens against the one that has them all.

    Args:
        reference: Has all tokens.
        model: Has those that `respelling` spells in.
        window: (seqlen,) of the reference's token ids; the model reads all of its text, however many tokens that takes.
        respelling: From the reference's vocabulary to the model's.

    Raises:
        LimitError: Logits that are not finite.
    """
    text = respelling.spell(window.tolist())
    context = int((text.owners == 0).sum())
    ours, theirs = _Loss(text.ids, context), _Loss(window, 1)

    def where_tokens_end() -> Iterator[tuple[slice, torch.Tensor]]:
        for positions, logits in ours.read(logits_of(model)):
            ended = logits[text.ends[positions.start - 1 : positions.stop - 1]]
            if len(ended):
                yield positions, ended[:, : len(respelling.kept)].float().log_softmax(-1)

    def respelled() -> Iterator[tuple[slice, torch.Tensor]]:
        for positions, logits in theirs.read(logits_of(reference)):
            yield positions, respelling.log_probabilities(logits.float()).log_softmax(-1)

    kl, same, count = 0.0, 0, 0
    with torch.inference_mode():
        for _, log_p, log_q in _aligned(respelled(), where_tokens_end()):
            kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().clamp_min(0).sum())
            same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            count += len(log_p)
    check_finite_sums(kl, ours.nats, theirs.nats)
    n_tokens = len(text.ids) - context
    return WindowLoss(n_tokens, ours.nats, theirs.nats, kl / max(count, 1), same / max(count, 1))


@dataclass
class _Loss:
    """Adds up the loss of a text's tokens but the first few while their logits are read."""

    ids: torch.Tensor
    context: int
    nats: float = 0.0

    def read(self, run: LogitsOf) -> Iterator[tuple[slice, torch.Tensor]]:
        for positions, logits in run(self.ids):
            known = max(0, self.context - positions.start)
            self.nats += float(
                F.cross_entropy(logits[known:].float(), self.ids[positions][known:], reduction="sum")
            )
            yield positions, logits


def _quantile(ordered: torch.Tensor, q: float) -> float:
    """Nearest-rank quantile; torch.quantile refuses more than 2^24 values."""
    return float(ordered[round(q * (len(ordered) - 1))])
