"""Is an exported file the same model? Its logits against the checkpoint's, position by position.

The checkpoint is run once and remembered as its last hidden states, (tokens, hidden_size), and its output matrix.
Logits are made from them in pieces, so that memory does not grow with vocabulary times tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError, LimitError
from cfsp.evaluation.divergence import divergence_from_logits
from cfsp.models.architectures import capped, logit_cap
from cfsp.models.block_pass import last_hidden_states
from cfsp.progress import Progress, no_progress
from cfsp.text.settings import BUILTIN_TEXT
from cfsp.text.tokens import TokenWindows, token_windows, tokens_sha256
from exporters.export_record import ParityLimits, ParityReport

FloatArray = npt.NDArray[np.float32]

PARITY_SEQLEN, PARITY_WINDOWS = 512, 4
"""Of the text that files are held against the checkpoint on."""
LARGEST_LOGIT = 10.0
"""Beyond it a limit to the difference of logits is one to a share of the largest, as float32's own errors are."""
_HEAD_ROWS = 16384

# Metrics that must not fall below their limit; all others must not exceed it.
_LOWER_BOUNDS = frozenset({"same_top1"})


@dataclass(frozen=True)
class Reference:
    """The checkpoint's side of a comparison.

    Attributes:
        windows: The text, (n_windows, seqlen).
        hidden: Last hidden states, after the final norm, (n_windows, seqlen, hidden_size) float32.
        head: Output matrix (vocab_size, hidden_size), float32 or what holds the same numbers in fewer bytes.
        cap: c, where logits are c tanh(z / c) of their products z.
    """

    windows: TokenWindows
    hidden: torch.Tensor
    head: torch.Tensor
    cap: float | None = None


@dataclass(frozen=True)
class Choice:
    """Of a file's numbers: the plain quantizer's or those chosen for a text, whichever lose less on the proof's text.

    Attributes:
        plain: What the file loses with the plain quantizer's.
        rounded: What it loses with the others.
    """

    plain: ParityReport
    rounded: ParityReport

    @property
    def is_plain(self) -> bool:
        """Whether the plain quantizer's are kept."""
        return self.plain.kl_mean < self.rounded.kl_mean

    def held_to(self, limits: ParityLimits) -> ParityReport:
        """The report of what is kept, which may lose no more than the plain quantizer's numbers either."""
        kept = self.plain if self.is_plain else self.rounded
        bounds = limits.as_dict()
        return replace(
            kept, limits=bounds | {"kl_mean": min(self.plain.kl_mean, bounds.get("kl_mean", math.inf))}
        )

    def warnings(self) -> Iterator[str]:
        """What the user should know of it."""
        if self.is_plain:
            yield (
                "its numbers are the plain quantizer's: those chosen for the text lose more "
                f"(KL {self.rounded.kl_mean:.4g} against {self.plain.kl_mean:.4g})"
            )


def choose_windows(
    tokenizer: Any, context_length: int, narrowest: int | None = None, given: torch.Tensor | None = None
) -> TokenWindows:
    """The text to compare on: what is given, or windows of built-in English prose.

    Where attention sees a window alone, the text is twice as long, as far as that is no more text in all.

    Args:
        tokenizer: The checkpoint's.
        context_length: Longest window that the exported file can run.
        narrowest: Fewest tokens that a block's attention sees; None where all see all.
        given: Token ids (n_windows, seqlen).

    Raises:
        InputError: Given windows are longer than the context.
    """
    if given is None:
        tokens = PARITY_WINDOWS * PARITY_SEQLEN
        beyond = 2 * narrowest if narrowest and 2 * narrowest <= tokens else 0
        seqlen = min(max(PARITY_SEQLEN, beyond), context_length)
        return token_windows(
            BUILTIN_TEXT, tokenizer, seqlen=seqlen, max_windows=min(PARITY_WINDOWS, tokens // seqlen)
        )
    if given.ndim == 2 and given.shape[1] > context_length:
        raise InputError(
            "windows are longer than the file's context",
            field="parity_windows",
            value=given.shape[1],
            allowed=f"<= {context_length}",
        )
    return TokenWindows(given, "given token ids", tokens_sha256(given))


def reference_of(model: Any, windows: TokenWindows, *, progress: Progress = no_progress) -> Reference:
    """Run a causal LM, whose logits are its output matrix times its last hidden state, or this capped, on text.

    Args:
        model: Model in eval mode, float32.
        windows: The text, (n_windows, seqlen).
        progress: Told after every block.

    Raises:
        InputError: No windows, windows of fewer than 2 tokens, or ids outside the vocabulary.
    """
    ids = windows.ids
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise InputError("parity needs token ids (n_windows, seqlen >= 2)", value=tuple(ids.shape))
    head = model.get_output_embeddings().weight.detach()
    if int(ids.min()) < 0 or int(ids.max()) >= head.shape[0]:
        raise InputError("token ids outside the vocabulary", field="parity_windows", value=int(ids.max()))
    with torch.inference_mode():
        states = last_hidden_states(model, ids, "parity: checkpoint", progress=progress)
    return Reference(windows, torch.cat(states).float(), head, logit_cap(model.config))


def compare(
    reference: Reference,
    run: Callable[[npt.NDArray[np.int32]], Iterable[FloatArray]],
    limits: Mapping[str, float],
    *,
    progress: Progress = no_progress,
) -> ParityReport:
    """Measure how far an export is from the checkpoint.

    Args:
        reference: The checkpoint's side.
        run: Window of token ids (seqlen,) -> its logits, in pieces (k, vocab_size) of successive positions.
        limits: Stored in the report, that to the difference of logits as it is for the checkpoint's largest; see
            `check_limits`.
        progress: Told after every window.

    Raises:
        LimitError: The export gives logits that are not finite.
    """
    windows, largest = reference.windows, LARGEST_LOGIT

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        nonlocal largest
        for index, window in enumerate(windows.ids):
            start = 0
            for piece in run(window.numpy().astype(np.int32)):
                stop = start + len(piece)
                ours = capped(_logits(reference.hidden[index, start:stop], reference.head), reference.cap)
                largest = max(largest, float(ours.abs().max()))
                yield ours, torch.from_numpy(piece), window[start + 1 : stop + 1]
                start = stop
            progress("parity", index + 1, len(windows.ids))

    divergence = divergence_from_logits(pairs(), windows)
    return ParityReport(
        n_tokens=divergence.n_tokens,
        n_windows=len(windows.ids),
        seqlen=divergence.seqlen,
        text=f"{windows.source} ({windows.sha256[:12]})",
        max_logit_diff=divergence.max_logit_difference,
        kl_mean=divergence.kl_mean,
        kl_median=divergence.kl_median,
        kl_p99_9=divergence.kl_p99_9,
        same_top1=divergence.same_top1,
        ppl_checkpoint=divergence.reference_perplexity,
        ppl_export=divergence.perplexity,
        ppl_ratio=divergence.perplexity_ratio,
        limits={
            metric: limit * largest / LARGEST_LOGIT if metric == "max_logit_diff" else limit
            for metric, limit in limits.items()
        },
    )


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocab_size) float32; a matrix of fewer bytes becomes float32 a few rows at a time."""
    if head.dtype == torch.float32:
        return hidden @ head.T
    return torch.cat([hidden @ rows.float().T for rows in torch.split(head, _HEAD_ROWS)], 1)


def check_limits(report: ParityReport, what: str) -> None:
    """Hold a report against its limits.

    Raises:
        LimitError: Names what was exported and every metric beyond its limit with value and limit.
    """
    misses = []
    for metric, limit in report.limits.items():
        value = getattr(report, metric)
        lower = metric in _LOWER_BOUNDS
        if value < limit if lower else value > limit:
            misses.append(f"{metric} {value:.4g} {'below' if lower else 'above'} its limit {limit:g}")
    if misses:
        raise LimitError(
            f"{what} is too far from the checkpoint: {', '.join(misses)} ({report.n_tokens} tokens)"
        )
