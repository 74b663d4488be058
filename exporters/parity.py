"""Is an exported file the same model? Its logits against the checkpoint's, position by position.

The checkpoint is run once and remembered as its last hidden states, (tokens, hidden_size), and its output matrix.
Logits are made from them in pieces, so that memory does not grow with vocabulary times tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError, LimitError
from cfsp.progress import Progress, no_progress
from cfsp.text.settings import BUILTIN_TEXT
from cfsp.text.tokens import token_windows
from exporters.export_record import ParityReport

FloatArray = npt.NDArray[np.float32]

_SEQLEN, _WINDOWS = 512, 4

# Metrics that must not fall below their limit; all others must not exceed it.
_LOWER_BOUNDS = frozenset({"same_top1"})


@dataclass(frozen=True)
class Reference:
    """The checkpoint's side of a comparison.

    Attributes:
        windows: Token ids (n_windows, seqlen).
        hidden: Last hidden states, after the final norm, (n_windows, seqlen, hidden_size) float32.
        head: Output matrix (vocab_size, hidden_size) float32.
        text: Where the windows came from.
    """

    windows: torch.Tensor
    hidden: torch.Tensor
    head: torch.Tensor
    text: str


def choose_windows(
    tokenizer: Any, context_length: int, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, str]:
    """The text to compare on, and where it came from: what is given, or windows of built-in English prose.

    Args:
        tokenizer: The checkpoint's.
        context_length: Longest window that the exported file can run.
        given: Token ids (n_windows, seqlen).

    Raises:
        InputError: Given windows are longer than the context.
    """
    if given is None:
        seqlen = min(_SEQLEN, context_length)
        found = token_windows(BUILTIN_TEXT, tokenizer, seqlen=seqlen, max_windows=_WINDOWS)
        return found.ids, f"{found.source} ({found.sha256[:12]})"
    if given.ndim == 2 and given.shape[1] > context_length:
        raise InputError(
            "windows are longer than the file's context",
            field="parity_windows",
            value=given.shape[1],
            allowed=f"<= {context_length}",
        )
    return given, "given token ids"


def reference_of(
    model: Any, windows: torch.Tensor, *, text: str = "given token ids", progress: Progress = no_progress
) -> Reference:
    """Run a causal LM, whose logits are its output matrix times its last hidden state, on windows of text.

    Args:
        model: Model in eval mode, float32.
        windows: Token ids (n_windows, seqlen).
        text: Where they came from.
        progress: Told after every window.

    Raises:
        InputError: No windows, windows of fewer than 2 tokens, or ids outside the vocabulary.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError("parity needs token ids (n_windows, seqlen >= 2)", value=tuple(windows.shape))
    head = model.get_output_embeddings().weight.detach()
    if int(windows.min()) < 0 or int(windows.max()) >= head.shape[0]:
        raise InputError("token ids outside the vocabulary", field="parity_windows", value=int(windows.max()))
    states = []
    with torch.inference_mode():
        for done, window in enumerate(windows, start=1):
            states.append(
                model.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0].float()
            )
            progress("parity: checkpoint", done, len(windows))
    return Reference(windows, torch.stack(states), head.float(), text)


@dataclass
class _Sums:
    """What has been compared so far."""

    max_diff: float = 0.0
    same: int = 0
    kl: list[torch.Tensor] = field(default_factory=list)
    nll_reference: float = 0.0
    nll_export: float = 0.0
    n_predicted: int = 0

    def add(self, reference: torch.Tensor, export: torch.Tensor, targets: torch.Tensor) -> None:
        """Compare logits (k, vocab_size); `targets` are the next tokens of the first len(targets) positions."""
        self.max_diff = max(self.max_diff, float((reference - export).abs().max()))
        self.same += int((reference.argmax(-1) == export.argmax(-1)).sum())
        log_p, log_q = torch.log_softmax(reference, -1), torch.log_softmax(export, -1)
        self.kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0))
        rows = torch.arange(len(targets))
        self.nll_reference -= float(log_p[rows, targets].double().sum())
        self.nll_export -= float(log_q[rows, targets].double().sum())
        self.n_predicted += len(targets)


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
        limits: Stored in the report; see `check_limits`.
        progress: Told after every window.

    Raises:
        LimitError: The export gives logits that are not finite.
    """
    sums = _Sums()
    n_windows, seqlen = reference.windows.shape
    for index, window in enumerate(reference.windows):
        start = 0
        for piece in run(window.numpy().astype(np.int32)):
            export = torch.from_numpy(piece)
            if not bool(torch.isfinite(export).all()):
                raise LimitError("the exported file gives logits that are not finite")
            stop = start + len(piece)
            ours = reference.hidden[index, start:stop] @ reference.head.T
            sums.add(ours, export, window[start + 1 : stop + 1])
            start = stop
        progress("parity", index + 1, n_windows)
    kl = torch.cat(sums.kl).double()
    nll_difference = (sums.nll_export - sums.nll_reference) / sums.n_predicted
    return ParityReport(
        n_tokens=n_windows * seqlen,
        n_windows=n_windows,
        seqlen=seqlen,
        text=reference.text,
        max_logit_diff=sums.max_diff,
        kl_mean=float(kl.mean()),
        kl_median=float(kl.median()),
        kl_p99_9=float(kl.quantile(0.999)),
        same_top1=sums.same / len(kl),
        ppl_checkpoint=_exp(sums.nll_reference / sums.n_predicted),
        ppl_export=_exp(sums.nll_export / sums.n_predicted),
        ppl_ratio=_exp(nll_difference),
        limits=dict(limits),
    )


def _exp(value: float) -> float:
    # JSON has no infinity, and a perplexity beyond this is none.
    return math.exp(min(value, 80.0))


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
