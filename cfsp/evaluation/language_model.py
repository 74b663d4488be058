"""What a model must be able to do to be judged, whatever runs it, and what it answers.

Loss, divergence, tasks, answers and users' own metrics see a model only through `LanguageModel`, so a checkpoint and an
exported file are judged by the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cfsp.devices import exact
from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from cfsp.text.tokens import encode, render_prompt


class Branches(NamedTuple):
    """Continuations of one context, such as the choices of a question: token ids, at least one each."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class Score(NamedTuple):
    """Sum of ln p(token | all before it) of a continuation, in nats, and whether greedy decoding writes it."""

    log_likelihood: float
    is_greedy: bool


class LanguageModel(Protocol):
    """A causal language model in some runtime; token ids are those of its transformers tokenizer."""

    name: str  # as the user gave it
    runtime: str  # such as `torch`
    sha256: str | None  # of its weights' files
    source_sha256: str | None  # of the dense model's weights that it was made from
    cache_type: str | None  # of keys and values, if one was asked for
    tokenizer: Any
    vocab_size: int  # length of a row of logits
    context_length: int  # most tokens of one sequence
    gives_logits: bool  # whether it has `next_token_logits`; without, it only scores and generates

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits that predict tokens 1.. of a window (seqlen,) without context before it.

        Yields:
            (slice of target positions, logits (chunk, vocab_size) float32), in order, never all at once. They are where
            the runtime computes; the window is on the CPU.
        """

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """The score of every continuation of every item; runtimes may run a shared context once."""

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop_strings: Sequence[str] = ()
    ) -> list[list[int]]:
        """Greedy continuations, without the token that ends them.

        A continuation also ends once its text contains one of `stop_strings`, which it then still holds.
        """

    def close(self) -> None:
        """Free the model; may be called twice."""


_ROWS = 64  # of logits that are copied at once: fresh memory for many more takes far longer


def check_length(model: LanguageModel, needed: int, what: str) -> None:
    """Raise InputError if `what`, of `needed` tokens, is longer than the model's context."""
    if needed > model.context_length:
        raise InputError(
            f"{what} has {needed} tokens, more than the context of {model.name}",
            field="context",
            value=needed,
            allowed=f"up to {model.context_length}",
        )


def predicting(
    pieces: Iterable[npt.NDArray[np.float32]], n_tokens: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """`LanguageModel.next_token_logits` from the logits (k, vocab_size) of a window's successive positions.

    They are copied, as runtimes write over them; the last of the `n_tokens` positions predicts nothing.
    """
    start = 1
    for piece in pieces:
        for begin in range(0, min(len(piece), n_tokens - start), _ROWS):
            rows = piece[begin : begin + _ROWS][: n_tokens - start]
            yield slice(start, start + len(rows)), torch.from_numpy(rows.copy())
            start += len(rows)


def branch_scores(item: Branches, rows: torch.Tensor) -> Iterator[Score]:
    """Scores from log-probabilities (n, vocab_size): after the context, then after each continuation's tokens but its
    last, in turn."""
    later = torch.split(rows[1:], [len(continuation) - 1 for continuation in item.continuations])
    for continuation, own in zip(item.continuations, later, strict=True):
        table = torch.cat([rows[:1], own])
        targets = torch.tensor(continuation)
        chosen = table.gather(-1, targets[:, None])
        greedy = bool((table.argmax(-1) == targets).all())
        yield Score(float(exact(chosen).sum()), greedy)


def contains_any(tokenizer: Any, ids: Sequence[int], strings: Sequence[str]) -> bool:
    """Whether the text of these tokens contains one of the strings."""
    return any(string in tokenizer.decode(ids) for string in strings)


def vocabulary_difference(model: LanguageModel, reference: LanguageModel) -> str | None:
    """Why predictions of two models cannot be compared token by token; None if they can.

    They can if both have the same tokens with the same ids; padding of the embedding may differ.
    """
    ours, theirs = model.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    small, large = sorted((ours, theirs), key=len)
    different = next((token for token, number in small.items() if large.get(token) != number), None)
    if different is not None:
        return (
            f"{model.name} and {reference.name} have different vocabularies ({len(ours)} and {len(theirs)} "
            f"tokens; {different!r} differs)"
        )
    if min(model.vocab_size, reference.vocab_size) < len(large):
        return (
            f"{model.name} and {reference.name} predict {model.vocab_size} and {reference.vocab_size} tokens, "
            f"but the larger vocabulary has {len(large)}"
        )
    return None


_AT_ONCE = 16

CHECK_PROMPTS = (
    "List three fruits.",
    "What is 2+2?",
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short greeting to a colleague.",
    "Name two animals that can fly.",
    "Tell a very short story about a lighthouse.",
    "How do I boil an egg?",
    "Write a Python function that returns the larger of two numbers.",
    "Give me two tips for sleeping better.",
    "What does a librarian do?",
    "Translate 'good morning' into Spanish.",
    "Write an email that asks for a day off.",
    "Why do leaves fall in autumn?",
    "Compare a bicycle with a car.",
    "Describe the sea to someone who has never seen it.",
)
"""Varied short prompts for the check on degenerate text."""
PROMPTS = CHECK_PROMPTS[:6]
"""Short tasks that a small chat model can do before pruning."""


def answer(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    progress: Progress = no_progress,
) -> list[str]:
    """Greedy answers, one per prompt, in the model's chat template if it has one."""
    tokenizer, answers = model.tokenizer, list[str]()
    ids = [
        encode(tokenizer, render_prompt(tokenizer, prompt))
        if tokenizer.chat_template
        else encode(tokenizer, prompt, add_special_tokens=True)
        for prompt in prompts
    ]
    for start in range(0, len(ids), _AT_ONCE):
        for tokens in model.generate(ids[start : start + _AT_ONCE], max_new_tokens):
            answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        progress("answering prompts", len(answers), len(ids))
    return answers
