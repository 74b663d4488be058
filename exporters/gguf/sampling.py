"""Texts that a model writes through llama.cpp: many at once, from a copy in eight bits, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cfsp.errors import InputError
from cfsp.files import large_temporary, no_space_as_input_error
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.source import LoadedModel
from cfsp.scratch import LargeScratch
from cfsp.text.choosing import drawn_tokens
from cfsp.text.self_sampling import STEPS_A_REPORT, Continue, Report, Writer, require_room, stop_ids
from exporters.checkpoint_reader import read_config
from exporters.family import ExportOptions
from exporters.gguf.files import draft_gguf
from exporters.gguf.runtime import Entry, LlamaModel, open_model, runtime_version

_QUANT = "Q8_0"
"""The smallest copy whose texts are the model's own: four bits would write what four bits write."""
_TEXTS, _CACHE_BYTES = 64, 2**30
"""Most texts at once, and what their keys and values may take in memory."""
_BATCH = 512


def _origin(_: LoadedModel) -> dict[str, str]:
    return {"writer": f"{runtime_version()}, {_QUANT}"}


@contextmanager
def _opened(loaded: LoadedModel, seed: int) -> Iterator[Continue]:
    """Raises InputError where the model is on another device, no GGUF file holds it, or no disk its copies."""
    if loaded.model.device.type != "cpu":
        raise InputError("llama.cpp writes on the CPU", value=loaded.model.device.type)
    settings = ExportOptions(name="model", n_threads=torch.get_num_threads())
    with ExitStack() as stack:
        with no_space_as_input_error(large_temporary()):
            folder = stack.enter_context(LargeScratch("text")).path
            save_checkpoint(loaded, folder / "model")
            path = draft_gguf(folder / "model", folder, [_QUANT], settings)[_QUANT]
        config = read_config(folder / "model")
        token_bytes = torch.float16.itemsize * config.key_value_width
        yield partial(_continue, path, token_bytes, stop_ids(loaded), np.random.SeedSequence(seed))


LLAMA_CPP = Writer(_origin, _opened)


def _continue(
    path: Path,
    token_bytes: int,
    stops: set[int],
    seeds: np.random.SeedSequence,
    texts: Sequence[Sequence[int]],
    max_new_tokens: int,
    report: Report,
) -> list[list[int]]:
    longest = max(map(len, texts)) + max_new_tokens
    # Not by what is free: how many are written beside each other changes sums in their last bits.
    together = max(1, min(_TEXTS, len(texts), _CACHE_BYTES // max(1, token_bytes * longest)))
    require_room(together * longest * token_bytes)
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
    """Texts that are continued beside each other, each in a sequence of the context.

    llama.cpp runs sequences together where their numbers follow each other: `_growing` has the text in each of them.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        drawn: Sequence[np.random.Generator],
        stops: set[int],
        max_new_tokens: int,
    ) -> None:
        self._texts = [list(text) for text in texts]
        self._drawn, self._stops, self._most = drawn, stops, max_new_tokens
        self._growing = list(range(len(texts)))

    def written_by(self, model: LlamaModel, report: Report) -> list[list[int]]:
        """The texts when each has ended, or is as long as it may be."""
        entries = self._after_beginning(model)
        for step in range(1, self._most + 1):
            tokens = self._drawn_after(model, entries)
            for text, token in zip(self._growing, tokens, strict=True):
                self._texts[text].append(token)
            for place in reversed([i for i, token in enumerate(tokens) if token in self._stops]):
                self._end(model, place)
            if not self._growing:
                break
            entries = [
                Entry(self._texts[text][-1], len(self._texts[text]) - 1, (place,), wanted=True)
                for place, text in enumerate(self._growing)
            ]
            if step % STEPS_A_REPORT == 0:
                report(step * len(self._texts))
        return self._texts

    def _after_beginning(self, model: LlamaModel) -> list[Entry]:
        """Run the tokens that all texts begin with once; the others, of which the last ones are wanted."""
        model.clear()
        first, last = min(self._texts), max(self._texts)
        pairs = enumerate(zip(first, last, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
        common = min(common, min(map(len, self._texts)) - 1)
        if common:
            model.decode(first[:common])
            for place in range(1, len(self._texts)):
                model.copy_sequence(0, place)
        return [
            Entry(token, position, (place,), wanted=position == len(text) - 1)
            for place, text in enumerate(self._texts)
            for position, token in enumerate(text)
            if position >= common
        ]

    def _drawn_after(self, model: LlamaModel, entries: Sequence[Entry]) -> list[int]:
        """Run tokens, and draw one for each text that grows."""
        tokens: list[int] = []
        for logits in model.iter_entries(entries):
            some = self._growing[len(tokens) : len(tokens) + len(logits)]
            tokens += drawn_tokens(logits, [self._drawn[text].random() for text in some])
        return tokens

    def _end(self, model: LlamaModel, place: int) -> None:
        """Put the last sequence's text in the place of one that has ended."""
        last = self._growing.pop()
        if place < len(self._growing):
            model.copy_sequence(len(self._growing), place)
            self._growing[place] = last
