"""Texts that a model writes through llama.cpp: many at once, from a copy in eight bits, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError
from cfsp.files import LargeScratch, large_temporary, no_space_as_input_error
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.source import LoadedModel
from cfsp.text.self_sampling import STEPS_A_REPORT, Continue, Report, Writer, require_room, stop_ids
from exporters.checkpoint_reader import read_config
from exporters.family import ExportOptions
from exporters.gguf.files import draft_gguf
from exporters.gguf.runtime import Context, Entry, LlamaModel, open_model, runtime_version

_QUANT = "Q8_0"
"""The smallest copy whose texts are the model's own: four bits would write what four bits write."""
_TEXTS, _CACHE_BYTES = 64, 2**30
"""Most texts at once, and what their keys and values may take in memory."""
_BATCH = 512


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
        token_bytes = torch.float16.itemsize * read_config(folder / "model").key_value_width
        stops, seeds = stop_ids(loaded), np.random.SeedSequence(seed)

        def go_on(texts: Sequence[Sequence[int]], max_new_tokens: int, report: Report) -> list[list[int]]:
            longest = max(map(len, texts)) + max_new_tokens
            # Not by what is free: how many are written beside each other changes sums in their last bits.
            together = max(1, min(_TEXTS, len(texts), _CACHE_BYTES // max(1, token_bytes * longest)))
            require_room(together * longest * token_bytes)
            drawn = [np.random.default_rng(seed) for seed in seeds.spawn(len(texts))]
            written: list[list[int]] = []
            context = Context(together * longest, _BATCH, n_seq=together, shared=False)
            with open_model(path, context, n_threads=torch.get_num_threads()) as model:
                for start in range(0, len(texts), together):
                    some, before = slice(start, start + together), sum(map(len, written))
                    say = lambda count, before=before: report(before + count)  # noqa: E731
                    written += _write(model, texts[some], drawn[some], stops, max_new_tokens, say)
            return written

        yield go_on


LLAMA_CPP = Writer(lambda _: {"writer": f"{runtime_version()}, {_QUANT}"}, _opened)


def drawn_tokens(logits: npt.NDArray[np.float32], uniform: Sequence[float]) -> list[int]:
    """A token of each row, drawn from softmax(logits), (rows, vocab_size), by a number in [0, 1) of each.

    Raises:
        InputError: Logits that are not finite.
    """
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    sums = weights.cumsum(axis=-1, dtype=np.float64)
    if not np.isfinite(sums[:, -1]).all():
        raise InputError("what the model writes is not finite")
    wanted = np.nextafter(np.asarray(uniform) * sums[:, -1], 0)  # below the sum
    return [int(np.searchsorted(row, value, side="right")) for row, value in zip(sums, wanted, strict=True)]


def _write(
    model: LlamaModel,
    beginnings: Sequence[Sequence[int]],
    drawn: Sequence[np.random.Generator],
    stops: set[int],
    max_new_tokens: int,
    report: Report,
) -> list[list[int]]:
    """Texts that are continued beside each other, each until it has ended or is as long as it may be.

    Each is in a sequence of the context. llama.cpp runs sequences together if their numbers follow each other:
    `growing` has the text in each of them, and the last one takes the place of one that has ended.
    """
    texts = [list(text) for text in beginnings]
    growing = list(range(len(texts)))
    # The tokens that all begin with are run once.
    first, last = min(texts), max(texts)
    pairs = enumerate(zip(first, last, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
    common = min(common, min(map(len, texts)) - 1)
    model.clear()
    if common:
        model.decode(first[:common])
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
