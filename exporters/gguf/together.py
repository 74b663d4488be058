"""Several sequences in one context of llama.cpp: the continuations of one text, or texts that are written at once.

What is computed together decides how sums are rounded, so all that runs a file here does it by these, and the native
runner (runtime_bench/native/runner.cpp) as these do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from cfsp.text.choosing import Chooser, greedy
from exporters.gguf.llama_batch import Entry
from exporters.gguf.llama_library import FloatArray
from exporters.gguf.runtime import LlamaModel

SEQUENCES = 16
"""In the context."""
BATCH = 512
"""Tokens of one call, and with all logits the rows of the output."""


def fitting(lengths: Sequence[int], shared: int, n_ctx: int, most: int = SEQUENCES) -> Iterator[slice]:
    """Runs of sequences that can be computed at once.

    Args:
        lengths: Tokens of each, none more than fits alone.
        shared: Tokens that all of them have in common, beside these.
        n_ctx: Tokens that the context holds.
        most: Sequences at once.
    """
    start, used = 0, shared
    for index, length in enumerate(lengths):
        if index - start == most or used + length > n_ctx:
            yield slice(start, index)
            start, used = index, shared
        used += length
    yield slice(start, len(lengths))


def continuation_rows(
    model: LlamaModel, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> Iterator[FloatArray]:
    """Logits after a context, and after all tokens but the last of each continuation in turn.

    Yields:
        (k, vocab_size) float32 for the next k of these. A view: use or copy it at once.
    """
    everyone, start = tuple(range(len(continuations))), len(context)
    entries = [Entry(token, place, everyone) for place, token in enumerate(context[:-1])]
    entries.append(Entry(context[-1], start - 1, everyone, wanted=True))
    for sequence, continuation in enumerate(continuations):
        entries += [
            Entry(token, start + place, (sequence,), wanted=True)
            for place, token in enumerate(continuation[:-1])
        ]
    model.clear()
    yield from model.iter_entries(entries)


def write_together(
    model: LlamaModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    is_over: Callable[[list[int]], bool],
    choosers: Sequence[Chooser] = (),
) -> list[list[int]]:
    """Continuations of prompts that fit the context together, without the token that ends them.

    Args:
        model: The file.
        prompts: Token ids, at least one each.
        max_new_tokens: Most tokens of a continuation.
        is_over: Whether what was written ends there.
        choosers: One for each prompt, of its tokens; greedy without any.
    """
    choosers = choosers or [greedy] * len(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    entries = [
        Entry(token, place, (sequence,), wanted=place == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for place, token in enumerate(prompt)
    ]
    model.clear()
    while going:
        rows = zip(going, chain.from_iterable(model.iter_entries(entries)), strict=True)
        tokens = [choosers[one](prompts[one], answers[one], logits) for one, logits in rows]
        entries, still = [], []
        for sequence, token in zip(going, tokens, strict=True):
            if model.is_end_of_generation(token):
                continue
            answer = answers[sequence]
            answer.append(token)
            if len(answer) < max_new_tokens and not is_over(answer):
                place = len(prompts[sequence]) + len(answer) - 1
                entries.append(Entry(token, place, (sequence,), wanted=True))
                still.append(sequence)
        going = still
    return answers
