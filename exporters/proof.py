"""Is an exported file the same model? Its logits, matrices, chats, and of a large model its blocks, held to ours.

*Logits* are made in pieces from the checkpoint's last hidden states, (tokens, hidden_size), and its output matrix.

*Matrices*: of a stored row q and the exact row w, the slope q w / w w is 0.8 in two bits, 1 in eight, and near 0 if q
is another row, or gone. Over a whole matrix it is what the plain quantizer gives some rows, or what it was when numbers
were chosen for a text: scales that are off by 5 % show.

*Blocks* of a model too large to run whole as float32: a slice is a file of a few blocks. Its vocabulary are the
positions of a text, its embedding and its output matrix the hidden states that enter there. Its logits are products of
what comes out of the blocks at one position, behind a norm, with what entered at every other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError, LimitError
from cfsp.evaluation.loss import Pieces, divergence_from_logits
from cfsp.models.architectures import (
    capped,
    decoder_layers,
    last_norm,
    logit_cap,
    norm_epsilon,
    spec_for,
)
from cfsp.models.offload import at_hand, enter_blocks, last_hidden_states, run_layer
from cfsp.progress import Progress, no_progress
from cfsp.reading import one_line
from cfsp.text.conversations import CONVERSATIONS, Conversation, rendered, turn_end
from cfsp.text.settings import BUILTIN_TEXT
from cfsp.text.tokens import TokenWindows, encode, token_windows, tokens_sha256
from exporters.export_record import BlockProof, ParityLimits, ParityReport

FloatArray = npt.NDArray[np.float32]
Rows = Callable[[int, int], FloatArray]
"""(first row, row behind the last) -> these rows, (n, columns) float32."""

PARITY_SEQLEN, PARITY_WINDOWS = 512, 4
"""Of the text that files are held against the checkpoint on."""
LARGEST_LOGIT = 10.0
"""Beyond it a limit to the difference of logits is one to a share of the largest, as float32's own errors are."""
_HEAD_ROWS = 16384
_LOWER_BOUNDS = frozenset({"same_top1"})
"""Metrics that must not fall below their limit; all others must not exceed it."""
ROW_SLOPE, MATRIX_SLOPE = 0.5, 0.025
"""How far slopes may lie from what they should be: a row's, and a matrix's relative to it."""
_PLAIN_ROWS, _AT_ONCE = 64, 8192
_SHOWN = 6  # tokens of a chat in a message
_TINY = 1e-6  # of the mean row's sum of squares: below it a type's own scales may not hold a row


class Reference(NamedTuple):
    """The checkpoint's side of a comparison."""

    windows: TokenWindows  # the text, (n_windows, seqlen)
    hidden: torch.Tensor  # last hidden states, after the final norm, (n_windows, seqlen, hidden_size) float32
    head: torch.Tensor  # output matrix (vocab_size, hidden_size), float32 or the same numbers in fewer bytes
    cap: float | None = None  # c, if logits are c tanh(z / c) of their products z

    def first_window(self) -> Reference:
        """Of the first window alone, which shows a wrong graph as well as all do."""
        ids = self.windows.ids[:1]
        windows = TokenWindows(ids, self.windows.source, tokens_sha256(ids))
        return self._replace(windows=windows, hidden=self.hidden[:1])


class Choice(NamedTuple):
    """What a file loses on the proof's text with the plain quantizer's numbers, and with those chosen for a text."""

    plain: ParityReport
    rounded: ParityReport

    @property
    def is_plain(self) -> bool:
        """Whether the plain quantizer's lose less, and are kept."""
        return self.plain.kl_mean < self.rounded.kl_mean

    def held_to(self, limits: ParityLimits) -> ParityReport:
        """The report of what is kept, which may lose no more than the plain quantizer's numbers either."""
        kept = self.plain if self.is_plain else self.rounded
        bounds = limits.as_dict()
        least = min(self.plain.kl_mean, bounds.get("kl_mean", math.inf))
        return replace(kept, limits=bounds | {"kl_mean": least})

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
    """The text to compare on: ids that are given (n_windows, seqlen), or windows of built-in English prose.

    These go beyond the narrowest sliding window, if that is no more text. InputError: longer than the file's context.
    """
    if given is None:
        tokens = PARITY_WINDOWS * PARITY_SEQLEN
        beyond = 2 * narrowest if narrowest and 2 * narrowest <= tokens else 0
        seqlen = min(max(PARITY_SEQLEN, beyond), context_length)
        most = min(PARITY_WINDOWS, tokens // seqlen)
        return token_windows(BUILTIN_TEXT, tokenizer, seqlen=seqlen, max_windows=most)
    if given.ndim == 2 and given.shape[1] > context_length:
        raise InputError(
            "windows are longer than the file's context",
            field="parity_windows",
            value=given.shape[1],
            allowed=f"<= {context_length}",
        )
    return TokenWindows(given, "given token ids", tokens_sha256(given))


def reference_of(model: Any, windows: TokenWindows, *, progress: Progress = no_progress) -> Reference:
    """Run a causal LM on text; raises InputError: windows of fewer than 2 tokens, or ids outside the vocabulary."""
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

    `run` is a window of token ids (seqlen,) -> its logits, in pieces (k, vocab_size) of successive positions. Limits
    are stored in the report, not checked. Raises LimitError: logits are not finite.
    """
    windows, largest, head = reference.windows, LARGEST_LOGIT, reference.head

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        """A matrix of fewer bytes becomes float32 a few rows at a time."""
        if head.dtype == torch.float32:
            return hidden @ head.T
        return torch.cat([hidden @ rows.float().T for rows in torch.split(head, _HEAD_ROWS)], 1)

    def pieces(index: int, window: torch.Tensor) -> Pieces:
        nonlocal largest
        start = 0
        for piece in run(window.numpy().astype(np.int32)):
            stop = start + len(piece)
            ours = capped(logits(reference.hidden[index, start:stop]), reference.cap)
            largest = max(largest, float(ours.abs().max()))
            yield ours, torch.from_numpy(piece), window[start + 1 : stop + 1]
            start = stop
        progress("parity", index + 1, len(windows.ids))

    divergence = divergence_from_logits(pieces(*each) for each in enumerate(windows.ids))
    return ParityReport(
        n_tokens=sum(divergence.n_tokens),
        n_windows=len(windows.ids),
        seqlen=windows.ids.shape[1],
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


def check_limits(report: ParityReport, what: str) -> None:
    """Raise LimitError with every metric beyond its limit."""
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


def check_matrix(
    name: str,
    n_rows: int,
    exact: Rows,
    stored: Rows,
    plain: Callable[[FloatArray], FloatArray],
    chosen: float | None = None,
) -> None:
    """Hold a matrix of a file, as its runtime reads it, against the exact one that it was quantized from.

    `plain` is exact rows -> what the plain quantizer makes of them; `chosen` the slope of numbers when they were chosen
    for a text. Raises LimitError: a row is not the exact one's, or all numbers are too large or too small.
    """
    inner, squares = np.empty(n_rows), np.empty(n_rows)
    for start in range(0, n_rows, _AT_ONCE):
        some = slice(start, min(start + _AT_ONCE, n_rows))
        w, q = exact(some.start, some.stop), stored(some.start, some.stop)
        inner[some], squares[some] = np.einsum("ij,ij->i", q, w), np.einsum("ij,ij->i", w, w)
    if not squares.any():
        return
    if not np.isfinite(inner).all():
        raise LimitError(f"{name} has numbers that are not finite")
    # A row that its type holds badly is held to what the plain quantizer makes of it.
    odd = (np.abs(inner - squares) > ROW_SLOPE * squares) & (squares > _TINY * squares.mean())
    for row in np.flatnonzero(odd).tolist():
        w = exact(row, row + 1)
        slope, like = inner[row] / squares[row], np.vdot(plain(w), w) / squares[row]
        if abs(slope - like) > ROW_SLOPE:
            raise LimitError(
                f"row {row} of {name} is not the checkpoint's: "
                f"its slope is {slope:.2f}, the plain quantizer's {like:.2f}"
            )
    if chosen is None:
        rows = np.flatnonzero(squares)
        sample = rows[np.unique(np.linspace(0, len(rows) - 1, _PLAIN_ROWS).astype(int))]
        chosen = slope_of(plain(w := np.concatenate([exact(row, row + 1) for row in sample.tolist()])), w)
    times = inner.sum() / squares.sum() / chosen
    if abs(times - 1) > MATRIX_SLOPE:
        raise LimitError(
            f"the numbers of {name} are {times:.3f} times what they should be; "
            f"allowed: {1 - MATRIX_SLOPE:g} to {1 + MATRIX_SLOPE:g}"
        )


def slope_of(stored: FloatArray, exact: FloatArray) -> float:
    """Of a matrix; 1 of zeros."""
    squares = float(np.vdot(exact, exact))
    return float(np.vdot(stored, exact)) / squares if squares else 1.0


class Slice(NamedTuple):
    """Some blocks, and what goes through them."""

    blocks: range  # their numbers in the model
    entering: torch.Tensor  # hidden states before them, (tokens, hidden_size) float32
    gain: torch.Tensor  # what the norm behind them multiplies with, (hidden_size,)


def prove_slices(
    model: Any,
    runs: Sequence[range],
    windows: TokenWindows,
    run: Callable[[Slice], Iterable[FloatArray]],
    *,
    runtime: str,
    max_logit_diff: float | None,
    progress: Progress = no_progress,
) -> BlockProof:
    """Run every block of a checkpoint in torch and in a runtime, as float32, on the first window of a text.

    `runs` are the blocks of each slice; `run` is a slice -> its logits in the runtime for tokens 0, 1, ..., in pieces
    (k, tokens) of successive positions. `max_logit_diff` is the limit of a language model's logits. Raises LimitError:
    a block, which the message names, gives something else in the runtime.
    """
    layers, ids, most = decoder_layers(model), windows.ids[:1], 0.0
    limit, epsilon = (max_logit_diff or 0.0) / LARGEST_LOGIT, norm_epsilon(model.config)
    with torch.inference_mode():
        (hidden,), calls = enter_blocks(model, layers, ids)
        for blocks in runs:
            entering = hidden[0].float()
            for block in blocks:
                with at_hand(layers[block]):
                    hidden = run_layer(layers[block], hidden, calls.of(block))
            gain = torch.ones(hidden.shape[-1])
            if blocks.stop == len(layers):
                gain = last_norm(model).weight.float() + spec_for(model.config).norm_offset
            leaving = hidden[0].float()
            normed = leaving * (leaving.square().mean(-1, keepdim=True) + epsilon).rsqrt()
            expected, start, largest = (normed * gain) @ entering.T, 0, 0.0
            for piece in run(Slice(blocks, entering, gain)):
                ours = expected[start : start + len(piece)]
                difference = (torch.from_numpy(piece) - ours).abs().amax(1) / ours.abs().amax(1)
                largest = max(largest, float(difference.max()))
                start += len(piece)
            if not largest <= limit:
                raise LimitError(
                    f"block {blocks.start} is too far from the checkpoint in {runtime}: {largest:.3g} of the "
                    f"largest logit, above {limit:g}"
                )
            most = max(most, largest)
            progress("parity: blocks", blocks.stop, len(layers))
    return BlockProof(len(layers), ids.numel(), f"{windows.source} ({windows.sha256[:12]})", most, limit)


class ReadChats(NamedTuple):
    """What a runtime made of the conversations that the model's template takes."""

    equal: tuple[str, ...] = ()  # names of those that are the checkpoint's, token by token
    warnings: tuple[str, ...] = ()  # what differs


def read_chats(
    runtime: str,
    tokenizer: Any,
    stops: Collection[int],
    read: Callable[[Conversation, str], Sequence[int]],
    ends: Callable[[int], bool],
) -> ReadChats:
    """Hold a runtime's token ids of conversations, and the tokens at which it stops, against the checkpoint's.

    `read` gives the runtime's ids of a conversation, whose text transformers renders like this.
    """

    def named(token: int) -> str:
        try:
            name = tokenizer.convert_ids_to_tokens(token)
        except (IndexError, OverflowError):  # a runtime that cannot split gives ids beyond the vocabulary
            name = None
        return name or f"token {token}"

    equal, warnings, texts = [], [], rendered(tokenizer)
    for conversation in CONVERSATIONS:
        if (text := texts.get(conversation.name)) is None:
            continue
        try:
            ours, theirs = encode(tokenizer, text), list(read(conversation, text))
        except Exception as error:  # each runtime has its own errors for a template that it cannot run
            difference = one_line(error, 160)
        else:
            if theirs == ours:
                equal.append(conversation.name)
                continue
            pairs = enumerate(zip(ours, theirs, strict=False))
            place = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            parts = [[named(token) for token in ids[place : place + _SHOWN]] for ids in (ours, theirs)]
            difference = f"from token {place} on the checkpoint has {parts[0]}, and it {parts[1]}"
        warnings.append(f"{runtime} reads a chat with {conversation.name} otherwise: {difference}")
    if missed := sorted(token for token in stops if not ends(token)):
        names = ", ".join(map(named, missed))
        warnings.append(f"{runtime} does not stop at {names}, where the checkpoint's texts end")
    end = turn_end(tokenizer)
    if end is not None and end not in stops:
        also = "" if ends(end) else f", nor does {runtime}"
        warnings.append(
            f"the chat template ends an answer with {named(end)}, at which generation does not stop{also}"
        )
    return ReadChats(tuple(equal), tuple(warnings))
