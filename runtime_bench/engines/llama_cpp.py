"""llama.cpp as an engine, through the exporters' runtime: the same code path that parity is proven with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from cfsp.errors import InputError
from exporters.gguf.quants import DEFAULT_CACHE
from exporters.gguf.runtime import (
    Context,
    LlamaModel,
    continuation_rows,
    fitting,
    open_model,
    runtime_version,
    system_info,
    write_together,
)
from runtime_bench.engines import EngineFacts, Session, SessionSettings, continuation_scores, ends_at
from runtime_bench.records.reported import EngineSettings

_DISTRIBUTION = "llama-cpp-python"


class LlamaCppSession:
    """An open GGUF file; see `runtime_bench.engines.AnsweringSession`."""

    def __init__(self, model: LlamaModel, settings: SessionSettings) -> None:
        self._model, self._n_ctx, self._n_seq = model, settings.n_ctx, settings.n_seq
        self.clear, self.decode, self.close = model.clear, model.decode, model.close
        self.n_vocab = model.vocab_size
        added = model.tokenize("", add_special=True)
        self.bos = model.bos_token if added[:1] == [model.bos_token] else None

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            model_type=self._model.description,
            model_size=self._model.size_bytes,
            model_n_params=self._model.n_params,
            backends=self._model.backends,
            versions={
                _DISTRIBUTION: importlib.metadata.version(_DISTRIBUTION),
                "llama.cpp": runtime_version().rpartition("llama.cpp ")[2],
            },
            system_info=system_info(),
            settings=EngineSettings(
                cache_type=self._model.cache_type,
                flash_attention=self._model.flash_attention,
                weight_buffers=self._model.weight_buffers,
            ),
        )

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text, add_special=True)

    def sample(self) -> int:
        return int(self._model.last_logits().argmax())

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        lengths = [len(continuation) - 1 for continuation in continuations]
        scores: list[tuple[float, bool]] = []
        most = 1 if self._model.is_recurrent else self._n_seq
        for fit in fitting(lengths, len(context), self._n_ctx, most):
            part = continuations[fit]
            scores += continuation_scores(continuation_rows(self._model, context, part), part)
        return scores

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_strings: Sequence[str],
        ends: Sequence[int],
    ) -> list[list[int]]:
        is_over = ends_at(self._model.detokenize, stop_strings)
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        written: list[list[int]] = []
        for fit in fitting(lengths, 0, self._n_ctx, self._n_seq):
            written += write_together(self._model, prompts[fit], max_new_tokens, is_over)
        return written


def prepare() -> None:
    """Load and initialize the library."""
    runtime_version()


def open_session(path: Path, settings: SessionSettings) -> Session:
    """Map a GGUF file and make a context, with a float16 cache as llama-bench does unless another is asked
    for. Raises InputError: llama.cpp cannot load it, or something else than its processor or GPU is to
    compute."""
    backend = settings.backend or "cpu"
    if backend not in ("cpu", "gpu"):
        raise InputError(
            "llama.cpp knows no such backend", field="backend", value=backend, allowed="cpu, gpu"
        )
    context = Context(
        settings.n_ctx,
        settings.n_batch,
        settings.n_ubatch,
        settings.cache_type or DEFAULT_CACHE,
        settings.n_seq,
    )
    model = open_model(path, context, n_threads=settings.n_threads, on_gpu=backend == "gpu")
    return LlamaCppSession(model, settings)
