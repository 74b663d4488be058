"""A GGUF file in llama.cpp as a `cfsp.evaluation.LanguageModel`, and texts that a model writes through llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError
from cfsp.evaluation.language_model import (
    Branches,
    Score,
    branch_scores,
    check_length,
    contains_any,
    predicting,
)
from cfsp.files import LargeScratch, large_temporary, no_space_as_input_error, sha256_file
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_tokenizer import tokenizer_from_gguf
from cfsp.models.source import LoadedModel
from cfsp.text.self_sampling import STEPS_A_REPORT, Continue, Report, Writer, require_room, stop_ids
from exporters.checkpoint_reader import read_config
from exporters.family import ExportOptions, FileOutline
from exporters.gguf.files import draft_gguf
from exporters.gguf.quants import PARITY_CACHE
from exporters.gguf.runtime import (
    BATCH,
    SEQUENCES,
    Context,
    Entry,
    LlamaModel,
    continuation_rows,
    fitting,
    open_model,
    runtime_version,
    write_together,
)

_QUANT = "Q8_0"
"""The smallest copy whose texts are the model's own: four bits would write what four bits write."""
_TEXTS, _CACHE_BYTES = 64, 2**30  # most texts at once, and what their keys and values may take in memory


def outline_of(reference: Path | str, n_ctx: int) -> FileOutline:
    """What a file says without being run; raises InputError: it cannot be read, or its tokenizer is not known."""
    path = Path(reference)
    file = read_gguf(path)
    return FileOutline(
        path=path,
        sha256=sha256_file(path),
        source_sha256=file.metadata.get("phoneready.source_sha256"),
        tokenizer=tokenizer_from_gguf(file),
        vocab_size=len(file.metadata["tokenizer.ggml.tokens"]),
        context_length=min(n_ctx, file.hyperparameter("context_length", n_ctx)),
        n_batch=BATCH,
        n_seq=SEQUENCES,
        cache_type=PARITY_CACHE,
    )


class GGUFLanguageModel:
    """See `LanguageModel`; `n_ctx` is cut to what the model was trained for, threads are torch's by default.

    `cache_type`: of keys and values, a key of `CACHE_TYPES`; float32 by default, as in proofs. Raises as `open_model`.
    """

    runtime = "llama.cpp"
    gives_logits = True

    def __init__(
        self, path: Path | str, n_ctx: int = 2048, n_threads: int | None = None, cache_type: str | None = None
    ) -> None:
        self.name, self.cache_type = str(path), cache_type
        outline = outline_of(path, n_ctx)
        self.tokenizer, self.context_length = outline.tokenizer, outline.context_length
        self.sha256: str | None = outline.sha256
        self.source_sha256 = outline.source_sha256
        cache = cache_type or PARITY_CACHE
        context = Context(self.context_length, outline.n_batch, cache_type=cache, n_seq=outline.n_seq)
        self._model = open_model(outline.path, context, n_threads=n_threads or torch.get_num_threads())
        self.vocab_size = self._model.vocab_size

    def close(self) -> None:
        """May be called twice."""
        self._model.close()

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        check_length(self, len(window), "a window")
        yield from predicting(self._model.iter_logits(window.numpy()), len(window))

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """See `LanguageModel`; the context belongs to the sequences of all continuations of an item at once."""
        most, found = 1 if self._model.is_recurrent else SEQUENCES, []
        for item in items:
            lengths = [len(continuation) - 1 for continuation in item.continuations]
            check_length(self, len(item.context) + max(lengths), "a context with its continuation")
            scores: list[Score] = []
            for fit in fitting(lengths, len(item.context), self.context_length, most):
                part = Branches(item.context, item.continuations[fit])
                rows = continuation_rows(self._model, part.context, part.continuations)
                pieces = [torch.from_numpy(piece.copy()).log_softmax(-1) for piece in rows]
                scores += branch_scores(part, torch.cat(pieces))
            found.append(scores)
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_strings: Sequence[str] = (),
    ) -> list[list[int]]:
        """See `LanguageModel`; as many prompts at once as fit the context together."""
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        check_length(self, max(lengths, default=0), "a prompt with its answer")
        is_over = partial(contains_any, self.tokenizer, strings=stop_strings)
        answers: list[list[int]] = []
        for fit in fitting(lengths, 0, self.context_length):
            answers += write_together(self._model, prompts[fit], max_new_tokens, is_over)
        return answers


@contextmanager
def _writing(loaded: LoadedModel, seed: int) -> Iterator[Continue]:
    """See `Writer`: many texts at once, each from its own seed, by an 8-bit copy; InputError: none can be made."""
    if loaded.model.device.type != "cpu":
        raise InputError("llama.cpp writes on the CPU", value=loaded.model.device.type)
    settings = ExportOptions(name="model", n_threads=torch.get_num_threads())
    with ExitStack() as stack:
        with no_space_as_input_error(large_temporary()):
            folder = stack.enter_context(LargeScratch("text")).path
            save_checkpoint(loaded, folder / "model")
            path = draft_gguf(folder / "model", folder, [_QUANT], settings)[_QUANT]
        token_bytes = torch.float16.itemsize * read_config(folder / "model").key_value_width
        stops, seeds = stop_ids(loaded), np.random.SeedSequence(seed)

        def go_on(texts: Sequence[Sequence[int]], max_new_tokens: int, report: Report) -> list[list[int]]:
            longest = max(map(len, texts)) + max_new_tokens
            # Not by what is free: how many are written beside each other changes sums in their last bits.
            together = max(1, min(_TEXTS, len(texts), _CACHE_BYTES // max(1, token_bytes * longest)))
            require_room(together * longest * token_bytes)
            drawn = [np.random.default_rng(seed) for seed in seeds.spawn(len(texts))]
            written: list[list[int]] = []
            context = Context(together * longest, BATCH, n_seq=together, shared=False)
            with open_model(path, context, n_threads=torch.get_num_threads()) as model:
                for start in range(0, len(texts), together):
                    some, before = slice(start, start + together), sum(map(len, written))
                    say = lambda count, before=before: report(before + count)  # noqa: E731
                    written += _write(model, texts[some], drawn[some], stops, max_new_tokens, say)
            return written

        yield go_on


LLAMA_CPP = Writer(lambda _: {"writer": f"{runtime_version()}, {_QUANT}"}, _writing)


def _write(
    model: LlamaModel,
    beginnings: Sequence[Sequence[int]],
    drawn: Sequence[np.random.Generator],
    stops: set[int],
    max_new_tokens: int,
    report: Report,
) -> list[list[int]]:
    """Texts that are continued beside each other, a sequence each; the last one takes the place of one that ends."""
    texts = [list(text) for text in beginnings]
    growing = list(range(len(texts)))
    # The tokens that all begin with are run once.
    equal = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    common = min(len(list(equal)), min(map(len, texts)) - 1)
    model.clear()
    if common:
        model.decode(texts[0][:common])
        for place in range(1, len(texts)):
            model.copy_sequence(0, place)
    entries = [
        Entry(token, position, (place,), wanted=position == len(text) - 1)
        for place, text in enumerate(texts)
        for position, token in enumerate(text)
        if position >= common
    ]
    for step in range(1, max_new_tokens + 1):
        tokens: list[int] = []
        for logits in model.iter_entries(entries):
            some = growing[len(tokens) : len(tokens) + len(logits)]
            tokens += drawn_tokens(logits, [drawn[text].random() for text in some])
        for text, token in zip(growing, tokens, strict=True):
            texts[text].append(token)
        for place in reversed([i for i, token in enumerate(tokens) if token in stops]):
            moved = growing.pop()
            if place < len(growing):
                model.copy_sequence(len(growing), place)
                growing[place] = moved
        if not growing:
            break
        entries = [
            Entry(texts[text][-1], len(texts[text]) - 1, (place,), wanted=True)
            for place, text in enumerate(growing)
        ]
        if step % STEPS_A_REPORT == 0:
            report(step * len(texts))
    return texts


def drawn_tokens(logits: npt.NDArray[np.float32], uniform: Sequence[float]) -> list[int]:
    """A token of each row by softmax(logits), (rows, vocab_size), and a number in [0, 1); InputError: not finite."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    sums = weights.cumsum(axis=-1, dtype=np.float64)
    if not np.isfinite(sums[:, -1]).all():
        raise InputError("what the model writes is not finite")
    wanted = np.nextafter(np.asarray(uniform) * sums[:, -1], 0)  # below the sum
    return [int(np.searchsorted(row, value, side="right")) for row, value in zip(sums, wanted, strict=True)]
