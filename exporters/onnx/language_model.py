"""An ONNX graph in ONNX Runtime as a `cfsp.evaluation.LanguageModel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from cfsp.files import sha256_file
from cfsp.models.checkpoint import read_generation_config
from cfsp.models.reference import load_tokenizer
from cfsp.text.generation import stop_tokens
from exporters.checkpoint_reader import read_config
from exporters.onnx.folder import GRAPHS, find_graph, folder_of, told_context
from exporters.onnx.int8_cache import make_ready
from exporters.onnx.runtime import open_model

_BATCH = 256


class OnnxLanguageModel:
    """An exported graph, run by ONNX Runtime.

    Args:
        reference: The .onnx file with the logits of every position, or the folder of its variant.
        n_ctx: Most tokens at once; cut to the model's context.
        n_threads: Threads; torch's number by default.
        cache_type: Of keys and values, INT8_CACHE or None for the graph's own.

    Raises:
        InputError: As `open_model`, or no tokenizer beside it.
        MissingExtraError: ONNX Runtime is not installed.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        reference: str,
        *,
        n_ctx: int = 2048,
        n_threads: int | None = None,
        cache_type: str | None = None,
    ) -> None:
        path = find_graph(reference)
        folder = folder_of(path)
        self.name = reference
        self.tokenizer = load_tokenizer(folder)
        self.sha256: str | None = sha256_file(path)
        self.context_length = min(n_ctx, told_context(folder, read_config(folder).max_position_embeddings))
        threads = n_threads or torch.get_num_threads()
        if cache_type is not None:
            make_ready(path, threads)
        self._model = open_model(
            path, n_ctx=self.context_length, n_threads=threads, n_batch=_BATCH, cache_type=cache_type
        )
        if self._model.last_logits:
            raise InputError(
                f"{path} gives the last position's logits alone", allowed=f"the other graph in {GRAPHS}"
            )
        self.vocab_size = self._model.vocab_size
        self.source_sha256: str | None = self._model.metadata.get("phoneready.source_sha256")
        self.cache_type = cache_type
        self._stops = stop_tokens(read_generation_config(folder), self.tokenizer)

    def close(self) -> None:
        """Let the session go; may be called twice."""
        self._model.close()

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `LanguageModel`."""
        check_length(self, len(window), "a window")
        yield from predicting(self._model.iter_logits(window.numpy()), len(window))

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """See `LanguageModel`; after each continuation the cache is rewound, or the context is read again."""
        return [list(self._score(item)) for item in items]

    def _score(self, item: Branches) -> Iterator[Score]:
        rows = [self._read(item.context)[-1:]]
        for continuation in item.continuations:
            if len(continuation) > 1:
                if self._model.can_rewind:
                    self._model.rewind(len(item.context))
                elif self._model.n_past != len(item.context):
                    self._read(item.context)
                rows.append(self._model.decode(continuation[:-1]).copy())
        yield from branch_scores(item, torch.from_numpy(np.concatenate(rows)).log_softmax(-1))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop_strings: Sequence[str] = ()
    ) -> list[list[int]]:
        """See `LanguageModel`; one prompt after the other."""
        longest = max((len(prompt) for prompt in prompts), default=0)
        check_length(self, longest + max_new_tokens, "a prompt with its answer")
        return [self._generate(prompt, max_new_tokens, stop_strings) for prompt in prompts]

    def _generate(self, prompt: Sequence[int], max_new_tokens: int, stop_strings: Sequence[str]) -> list[int]:
        answer: list[int] = []
        logits = self._read(prompt)
        while (token := int(logits[-1].argmax())) not in self._stops:
            answer.append(token)
            if len(answer) == max_new_tokens or contains_any(self.tokenizer, answer, stop_strings):
                break
            logits = self._model.decode([token])
        return answer

    def _read(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of the last piece of a text that nothing comes before."""
        *_, last = self._model.iter_logits(np.asarray(tokens, dtype=np.int64))
        return last.copy()
