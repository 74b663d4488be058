"""A GGUF file in llama.cpp as a `cfsp.evaluation.LanguageModel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
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
from cfsp.models.gguf_file import CONVOLUTIONS, read_gguf
from cfsp.models.gguf_tokenizer import tokenizer_from_gguf
from exporters.gguf import runtime
from exporters.gguf.cache_types import PARITY_CACHE
from exporters.gguf.llama_batch import Entry

_SEQUENCES = 16
_BATCH = 512


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

    def __init__(
        self, path: Path, *, n_ctx: int = 2048, n_threads: int | None = None, cache_type: str | None = None
    ) -> None:
        self.name, self.cache_type = str(path), cache_type
        file = read_gguf(path)
        trained = file.hyperparameter("context_length", n_ctx)
        self.tokenizer = tokenizer_from_gguf(file)
        self.sha256: str | None = sha256_file(path)
        self.source_sha256: str | None = file.metadata.get("phoneready.source_sha256")
        self.context_length = min(n_ctx, trained)
        # What such blocks keep of a text belongs to one sequence.
        self._is_recurrent = any(tensor.name.endswith(CONVOLUTIONS) for tensor in file.tensors)
        self._model = runtime.open_model(
            path,
            n_ctx=self.context_length,
            n_threads=n_threads or torch.get_num_threads(),
            n_batch=_BATCH,
            cache_type=cache_type or PARITY_CACHE,
            n_seq=_SEQUENCES,
        )
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
        if self._is_recurrent:
            yield from (Branches(item.context, (continuation,)) for continuation in item.continuations)
            return
        lengths = [len(continuation) - 1 for continuation in item.continuations]
        for fit in self._fitting(lengths, len(item.context), "a context with its continuation"):
            yield Branches(item.context, item.continuations[fit])

    def _fitting(self, lengths: Sequence[int], shared: int, what: str) -> Iterator[slice]:
        """Runs of sequences of these lengths that can be computed at once, beside tokens that all of them share."""
        start, used = 0, shared
        for index, length in enumerate(lengths):
            check_length(self, shared + length, what)
            if index - start == _SEQUENCES or used + length > self.context_length:
                yield slice(start, index)
                start, used = index, shared
            used += length
        yield slice(start, len(lengths))

    def _score(self, item: Branches) -> Iterator[Score]:
        everyone = tuple(range(len(item.continuations)))
        start = len(item.context)
        entries = [Entry(token, place, everyone) for place, token in enumerate(item.context[:-1])]
        entries.append(Entry(item.context[-1], start - 1, everyone, wanted=True))
        for sequence, continuation in enumerate(item.continuations):
            entries += [
                Entry(token, start + place, (sequence,), wanted=True)
                for place, token in enumerate(continuation[:-1])
            ]
        self._model.clear()
        pieces = [torch.from_numpy(p.copy()).log_softmax(-1) for p in self._model.iter_entries(entries)]
        yield from branch_scores(item, torch.cat(pieces))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop_strings: Sequence[str] = ()
    ) -> list[list[int]]:
        """See `LanguageModel`; as many prompts at once as fit the context together."""
        answers: list[list[int]] = []
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        for fit in self._fitting(lengths, 0, "a prompt with its answer"):
            answers += self._generate(prompts[fit], max_new_tokens, stop_strings)
        return answers

    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_strings: Sequence[str]
    ) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        entries = [
            Entry(token, place, (sequence,), wanted=place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        self._model.clear()
        while going:
            best = np.concatenate([piece.argmax(-1) for piece in self._model.iter_entries(entries)])
            entries, still = [], []
            for sequence, token in zip(going, best.tolist(), strict=True):
                if self._model.is_end_of_generation(token):
                    continue
                answer = answers[sequence]
                answer.append(token)
                if len(answer) < max_new_tokens and not contains_any(self.tokenizer, answer, stop_strings):
                    place = len(prompts[sequence]) + len(answer) - 1
                    entries.append(Entry(token, place, (sequence,), wanted=True))
                    still.append(sequence)
            going = still
        return answers
