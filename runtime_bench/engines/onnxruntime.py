"""ONNX Runtime as an engine, through the exporters' runtime: the same code path that parity is proven with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporters.onnx.folder import folder_of
from exporters.onnx.runtime import (
    PREFILL_TOKENS,
    OnnxModel,
    continuation_rows,
    open_model,
    runtime_version,
    write,
)
from runtime_bench.engines import (
    EngineFacts,
    Session,
    SessionSettings,
    continuation_scores,
    ends_at,
    file_facts,
)
from runtime_bench.records.reported import EngineSettings


class OnnxRuntimeSession:
    """An open graph; see `runtime_bench.engines.AnsweringSession`."""

    def __init__(self, model: OnnxModel) -> None:
        from tokenizers import Tokenizer

        self._model = model
        self._logits: npt.NDArray[np.float32] | None = None
        self._tokenizer = Tokenizer.from_file(str(folder_of(model.path) / "tokenizer.json"))
        self.clear, self.close = model.clear, model.close
        self.n_vocab = model.vocab_size
        added = self._tokenizer.encode("").ids
        self.bos = added[0] if added else None

    @property
    def facts(self) -> EngineFacts:
        name, version = runtime_version().split(" ")
        providers = self._model.providers
        facts = file_facts(self._model.path, ", ".join(sorted(providers)) or "CPU", {name: version})
        return replace(facts, settings=EngineSettings(self._model.cache_type, providers=providers))

    def decode(self, tokens: Sequence[int]) -> None:
        step = self._model.n_batch
        for start in range(0, len(tokens), step):
            self._logits = self._model.decode(tokens[start : start + step])

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def sample(self) -> int:
        assert self._logits is not None  # something was decoded
        return int(self._logits[-1].argmax())

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        return continuation_scores([continuation_rows(self._model, context, continuations)], continuations)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_strings: Sequence[str],
        ends: Sequence[int],
    ) -> list[list[int]]:
        is_over = ends_at(partial(self._tokenizer.decode, skip_special_tokens=False), stop_strings)
        return [write(self._model, prompt, max_new_tokens, frozenset(ends), is_over) for prompt in prompts]


def prepare() -> None:
    """Load the library."""
    runtime_version()


def open_session(path: Path, settings: SessionSettings) -> Session:
    """Open a graph whose weights lie beside it. Raises InputError: ONNX Runtime cannot load it."""
    piece = min(settings.n_batch, settings.n_ubatch, PREFILL_TOKENS)
    model = open_model(
        path,
        n_ctx=settings.n_ctx,
        n_threads=settings.n_threads,
        n_batch=piece,
        provider=settings.backend,
    )
    return OnnxRuntimeSession(model)
