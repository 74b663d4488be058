"""A GGUF file in llama.cpp as a `cfsp.evaluation.LanguageModel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from cfsp.evaluation.language_model import (
    Branches,
    Score,
    branch_scores,
    check_length,
    contains_any,
    predicting,
)
from cfsp.files import sha256_file
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_tokenizer import tokenizer_from_gguf
from exporters.family import FileOutline
from exporters.gguf import runtime
from exporters.gguf.cache_types import PARITY_CACHE
from exporters.gguf.runtime import BATCH, SEQUENCES, Context, continuation_rows, fitting, write_together


def outline_of(path: Path, n_ctx: int) -> FileOutline:
    """What a file says without being run.

    Raises:
        InputError: It cannot be read, or a tokenizer that is not known.
    """
    file = read_gguf(path)
    tokenizer = tokenizer_from_gguf(file)
    return FileOutline(
        path=path,
        sha256=sha256_file(path),
        source_sha256=file.metadata.get("phoneready.source_sha256"),
        tokenizer=tokenizer,
        vocab_size=len(file.metadata["tokenizer.ggml.tokens"]),
        context_length=min(n_ctx, file.hyperparameter("context_length", n_ctx)),
        n_batch=BATCH,
        n_seq=SEQUENCES,
        cache_type=PARITY_CACHE,
    )


class GGUFLanguageModel:
    """An exported file, run by llama.cpp.

    Args:
        path: The file.
        n_ctx: Most tokens at once; cut to what the model was trained for.
        n_threads: Threads; torch's number by default.
        cache_type: Of keys and values, a key of `CACHE_TYPES`; float32 by default, as parity measures it.

    Raises:
        InputError: As `runtime.open_model`, or a tokenizer that is not known.
        MissingExtraError: llama-cpp-python is not installed.
    """

    runtime = "llama.cpp"
    gives_logits = True

    def __init__(
        self, path: Path, *, n_ctx: int = 2048, n_threads: int | None = None, cache_type: str | None = None
    ) -> None:
        self.name, self.cache_type = str(path), cache_type
        outline = outline_of(path, n_ctx)
        self.tokenizer, self.context_length = outline.tokenizer, outline.context_length
        self.sha256: str | None = outline.sha256
        self.source_sha256 = outline.source_sha256
        cache = cache_type or PARITY_CACHE
        context = Context(self.context_length, outline.n_batch, cache_type=cache, n_seq=outline.n_seq)
        self._model = runtime.open_model(path, context, n_threads=n_threads or torch.get_num_threads())
        self.vocab_size = self._model.vocab_size

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._model.close()

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `LanguageModel`."""
        check_length(self, len(window), "a window")
        yield from predicting(self._model.iter_logits(window.numpy()), len(window))

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """See `LanguageModel`; the context belongs to the sequences of all continuations at once."""
        return [[score for part in self._parts(item) for score in self._score(part)] for item in items]

    def _parts(self, item: Branches) -> Iterator[Branches]:
        """An item in parts that fit the sequences and the context."""
        lengths = [len(continuation) - 1 for continuation in item.continuations]
        check_length(self, len(item.context) + max(lengths), "a context with its continuation")
        most = 1 if self._model.is_recurrent else SEQUENCES
        for fit in fitting(lengths, len(item.context), self.context_length, most):
            yield Branches(item.context, item.continuations[fit])

    def _score(self, item: Branches) -> Iterator[Score]:
        rows = continuation_rows(self._model, item.context, item.continuations)
        pieces = [torch.from_numpy(piece.copy()).log_softmax(-1) for piece in rows]
        yield from branch_scores(item, torch.cat(pieces))

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
