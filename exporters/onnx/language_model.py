"""An ONNX graph in ONNX Runtime as a `cfsp.evaluation.LanguageModel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

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
from cfsp.reading import read_json_object
from cfsp.text.self_sampling import stop_tokens
from exporters.checkpoint_reader import read_config
from exporters.family import FileOutline
from exporters.onnx.folder import GENAI_CONFIG, GRAPHS, find_graph, folder_of
from exporters.onnx.runtime import continuation_rows, open_model, write

_BATCH = 256


def outline_of(reference: str, n_ctx: int) -> FileOutline:
    """What the folder of a graph says without its being run; raises InputError without tokenizer or configuration."""
    path = find_graph(reference)
    folder = folder_of(path)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    generation, genai = read_generation_config(folder), folder / GENAI_CONFIG
    # Of a rope that only holds in short texts, genai_config.json states a shorter context.
    stated = read_json_object(genai).get("model") if genai.is_file() else None
    length = stated.get("context_length") if isinstance(stated, dict) else None
    most = config.max_position_embeddings
    return FileOutline(
        path=path,
        sha256=sha256_file(path),
        source_sha256=None,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        context_length=min(n_ctx, most, length if isinstance(length, int) else most),
        n_batch=_BATCH,
        ends=tuple(sorted(stop_tokens(generation, tokenizer))),
    )


class OnnxLanguageModel:
    """An exported graph in ONNX Runtime: the .onnx file with the logits of every position, or its folder."""

    runtime = "onnxruntime"
    gives_logits = True
    cache_type: str | None = None

    def __init__(
        self, reference: str, n_ctx: int = 2048, n_threads: int | None = None, _: str | None = None
    ) -> None:
        outline = outline_of(reference, n_ctx)
        path = outline.path
        self.name = reference
        self.tokenizer, self.context_length = outline.tokenizer, outline.context_length
        self.sha256: str | None = outline.sha256
        self._ends = frozenset(outline.ends)
        threads = n_threads or torch.get_num_threads()
        self._model = open_model(path, n_ctx=self.context_length, n_threads=threads, n_batch=outline.n_batch)
        if self._model.last_logits:
            raise InputError(
                f"{path} gives only the last position's logits", allowed=f"the other graph in {GRAPHS}"
            )
        self.vocab_size = self._model.vocab_size
        self.source_sha256: str | None = self._model.metadata.get("phoneready.source_sha256")

    def close(self) -> None:
        """Let the session go; may be called twice."""
        self._model.close()

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        check_length(self, len(window), "a window")
        yield from predicting(self._model.iter_logits(window.numpy()), len(window))

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        return [
            list(branch_scores(item, torch.from_numpy(rows).log_softmax(-1)))
            for item in items
            for rows in [continuation_rows(self._model, item.context, item.continuations)]
        ]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_strings: Sequence[str] = (),
    ) -> list[list[int]]:
        longest = max((len(prompt) for prompt in prompts), default=0)
        check_length(self, longest + max_new_tokens, "a prompt with its answer")
        is_over = partial(contains_any, self.tokenizer, strings=stop_strings)
        return [write(self._model, prompt, max_new_tokens, self._ends, is_over) for prompt in prompts]
