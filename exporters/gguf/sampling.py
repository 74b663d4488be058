"""Texts that a model writes through llama.cpp: many at once, from a copy in eight bits, each from a seed of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cfsp.errors import InputError
from cfsp.files import large_temporary
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.source import LoadedModel
from cfsp.text.generation import stop_ids
from cfsp.text.writers import Continue, Report, Writer
from exporters.gguf.files import draft_gguf
from exporters.gguf.llama_batch import Entry
from exporters.gguf.llama_library import FloatArray, runtime_version
from exporters.gguf.runtime import LlamaModel, open_model
from exporters.options import ExportOptions

_QUANT = "Q8_0"
"""The smallest copy whose texts are the model's own: four bits would write what four bits write."""
_TEXTS, _CONTEXT = 64, 2**16
"""Most texts at once, and most tokens that all of them may take: their keys and values are held in memory."""
_BATCH = 512
_STEPS = 16
"""Between two reports."""


def _origin(_: LoadedModel) -> dict[str, str]:
    return {"writer": f"llama.cpp {_QUANT}"}


@contextmanager
def _opened(loaded: LoadedModel, seed: int) -> Iterator[Continue]:
    """Raises InputError where the model is on another device, or no GGUF file holds it."""
    if loaded.model.device.type != "cpu":
        raise InputError("llama.cpp writes on the CPU", value=loaded.model.device.type)
    runtime_version()
    with tempfile.TemporaryDirectory(prefix="phoneready-", dir=large_temporary()) as name:
        folder = Path(name)
        save_checkpoint(loaded, folder / "model")
        settings = ExportOptions(name="model", n_threads=torch.get_num_threads())
        path = draft_gguf(folder / "model", folder, [_QUANT], settings)[_QUANT]
        yield partial(_continue, path, stop_ids(loaded), np.random.SeedSequence(seed))


LLAMA_CPP = Writer(_origin, _opened)


def _continue(
    path: Path,
    stops: set[int],
    seeds: np.random.SeedSequence,
    texts: Sequence[Sequence[int]],
    max_new_tokens: int,
    report: Report,
) -> list[list[int]]:
    longest = max(map(len, texts)) + max_new_tokens
    together = max(1, min(_TEXTS, _CONTEXT // longest, len(texts)))
    drawn = [np.random.default_rng(seed) for seed in seeds.spawn(len(texts))]
    whole: list[list[int]] = []
    with open_model(
        path,
        n_ctx=together * longest,
        n_threads=torch.get_num_threads(),
        n_batch=_BATCH,
        n_seq=together,
        shared=False,
    ) as model:
        for start in range(0, len(texts), together):
            some = slice(start, start + together)
            batch = _Texts(texts[some], drawn[some], stops, max_new_tokens)
            whole += batch.written_by(model, partial(_add, report, sum(map(len, whole))))
    return whole


def _add(report: Report, before: int, written: int) -> None:
    report(before + written)


class _Texts:
    """Texts that are continued beside each other."""

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        drawn: Sequence[np.random.Generator],
        stops: set[int],
        max_new_tokens: int,
    ) -> None:
        self._texts = [list(text) for text in texts]
        self._drawn, self._stops, self._most = drawn, stops, max_new_tokens

    def written_by(self, model: LlamaModel, report: Report) -> list[list[int]]:
        """The texts when each has ended, or is as long as it may be."""
        model.clear()
        entries = [
            Entry(token, place, (index,), wanted=place == len(text) - 1)
            for index, text in enumerate(self._texts)
            for place, token in enumerate(text)
        ]
        for step in range(1, self._most + 1):
            entries = self._grow(model, entries)
            if not entries:
                break
            if step % _STEPS == 0:
                report(step * len(self._texts))
        return self._texts

    def _grow(self, model: LlamaModel, entries: Sequence[Entry]) -> list[Entry]:
        """Run tokens, and add one to each text that wants it; the added ones of texts that have not ended."""
        growing = [entry.sequences[0] for entry in entries if entry.wanted]
        tokens: list[int] = []
        for logits in model.iter_entries(entries):
            some = growing[len(tokens) : len(tokens) + len(logits)]
            tokens += drawn_tokens(logits, [self._drawn[index].random() for index in some])
        for index, token in zip(growing, tokens, strict=True):
            self._texts[index].append(token)
        return [
            Entry(token, len(self._texts[index]) - 1, (index,), wanted=True)
            for index, token in zip(growing, tokens, strict=True)
            if token not in self._stops
        ]


def drawn_tokens(logits: FloatArray, uniform: Sequence[float]) -> list[int]:
    """A token of each row, drawn from softmax(logits) by a number in [0, 1).

    Args:
        logits: (rows, vocab_size).
        uniform: Of each row.

    Raises:
        InputError: Logits that are not finite.
    """
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    sums = weights.cumsum(axis=-1, dtype=np.float64)
    if not np.isfinite(sums[:, -1]).all():
        raise InputError("what the model writes is not finite")
    wanted = np.nextafter(np.asarray(uniform) * sums[:, -1], 0)  # below the sum
    return [int(np.searchsorted(row, value, side="right")) for row, value in zip(sums, wanted, strict=True)]
