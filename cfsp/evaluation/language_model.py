"""What a model must be able to do to be judged, whatever runs it, and what it answers.

Perplexity, divergence, tasks, generated text and users' own metrics see a model through `LanguageModel` alone, so
that a checkpoint and an exported file are judged by the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cfsp.devices import exact
from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from cfsp.text.choosing import Chooser, Sampling, choosers
from cfsp.text.tokens import encode, render_prompt


@dataclass(frozen=True)
class Branches:
    """Several continuations of one context, such as the choices of a question.

    Attributes:
        context: Token ids, at least one.
        continuations: Token ids of each continuation, at least one each.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def n_tokens(self) -> int:
        """Tokens to run: the context once, every continuation but its last token."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@dataclass(frozen=True)
class Score:
    """How a model sees one continuation.

    Attributes:
        log_likelihood: Sum of ln p(token | all before it), in nats.
        is_greedy: Whether each token is the model's first choice there.
    """

    log_likelihood: float
    is_greedy: bool


class LanguageModel(Protocol):
    """A causal language model in some runtime, with a transformers tokenizer beside it.

    Attributes:
        name: What was opened, as the user gave it.
        runtime: What runs it, such as `torch`.
        sha256: Hash of the weights' file or files, where known.
        source_sha256: Hash of the dense model's weights that it was made from, where it says so.
        cache_type: Type of its keys and values where one was asked for.
        tokenizer: A transformers tokenizer; token ids below are its ids.
        vocab_size: Length of a row of logits.
        context_length: Most tokens of one sequence.
        gives_logits: Whether it has `next_token_logits`; how likely a text is, each model says.
        stated_sampling: Fields of `cfsp.text.choosing.Sampling` that it comes with; empty where it states none.
    """

    name: str
    runtime: str
    sha256: str | None
    source_sha256: str | None
    cache_type: str | None
    tokenizer: Any
    vocab_size: int
    context_length: int
    gives_logits: bool
    stated_sampling: Mapping[str, Any]

    def next_token_logits(self, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits that predict tokens 1.. of a window (seqlen,) that nothing comes before.

        Yields:
            (slice of target positions, logits (chunk, vocab_size) float32), in order; never all of them at once. They
            are where the runtime computes, which may be a GPU; the window is on the CPU.
        """
        ...

    def score(self, items: Sequence[Branches]) -> list[list[Score]]:
        """The score of every continuation of every item; a context shared by continuations is run once."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_strings: Sequence[str] = (),
        choosers: Sequence[Chooser] = (),
    ) -> list[list[int]]:
        """Continuations, without the token that ends them: greedy ones, or of tokens that each prompt's chooser takes.

        A continuation also ends once its text contains one of `stop_strings`, which it then still holds.
        """
        ...

    def close(self) -> None:
        """Let the model go; may be called twice."""
        ...


_ROWS = 64
"""Of logits that are copied at once. Memory for many more is new to the process each time, which takes far longer."""


def check_length(model: LanguageModel, needed: int, what: str) -> None:
    """Raise InputError where `what`, of `needed` tokens, is longer than the model's context."""
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
    """What `LanguageModel.next_token_logits` yields, from the logits of all of a window's positions in turn.

    Args:
        pieces: Logits (k, vocab_size) of successive positions; they are copied, as runtimes write over them.
        n_tokens: Length of the window, whose last position predicts nothing in it.
    """
    start = 1
    for piece in pieces:
        for begin in range(0, min(len(piece), n_tokens - start), _ROWS):
            rows = piece[begin : begin + _ROWS][: n_tokens - start]
            yield slice(start, start + len(rows)), torch.from_numpy(rows.copy())
            start += len(rows)


def branch_scores(item: Branches, rows: torch.Tensor) -> Iterator[Score]:
    """Scores from log-probabilities.

    Args:
        item: What was run.
        rows: Log-probabilities (n, vocab_size) after the context, then after all tokens but the last of each
            continuation in turn.
    """
    later = torch.split(rows[1:], [len(continuation) - 1 for continuation in item.continuations])
    for continuation, own in zip(item.continuations, later, strict=True):
        table = torch.cat([rows[:1], own])
        targets = torch.tensor(continuation)
        chosen = table.gather(-1, targets[:, None])
        greedy = bool((table.argmax(-1) == targets).all())
        yield Score(float(exact(chosen).sum()), greedy)


def contains_any(tokenizer: Any, ids: Sequence[int], strings: Sequence[str]) -> bool:
    """Whether the text of these tokens has one of the strings in it."""
    return any(string in tokenizer.decode(ids) for string in strings)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, in the model's chat template where it has one."""
    if not tokenizer.chat_template:
        return encode(tokenizer, prompt, add_special_tokens=True)
    return encode(tokenizer, render_prompt(tokenizer, prompt))


def vocabulary_difference(model: LanguageModel, reference: LanguageModel) -> str | None:
    """What keeps predictions of two models from being compared token by token; None where nothing does.

    Every token that both know has the same id, and neither knows tokens beyond the other.

    Rows of logits beyond the tokenizer (padding of the embedding) may differ in number.
    """
    ours: Mapping[str, int] = model.tokenizer.get_vocab()
    theirs: Mapping[str, int] = reference.tokenizer.get_vocab()
    small, large = sorted((ours, theirs), key=len)
    different = next((token for token, number in small.items() if large.get(token) != number), None)
    if different is not None:
        return (
            f"{model.name} and {reference.name} have different vocabularies ({len(ours)} and {len(theirs)} "
            f"tokens; {different!r} differs)"
        )
    rows = min(model.vocab_size, reference.vocab_size)
    if rows < len(large):
        return (
            f"{model.name} and {reference.name} predict {model.vocab_size} and {reference.vocab_size} tokens, "
            f"but the larger vocabulary has {len(large)}"
        )
    return None


_AT_ONCE = 16

PROMPTS = (
    "List three fruits.",
    "What is 2+2?",
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short greeting to a colleague.",
    "Name two animals that can fly.",
)
"""Short tasks that a small chat model can do before pruning."""

CHECK_PROMPTS = (
    *PROMPTS,
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


def answer(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[str]:
    """Answers, one a prompt; in the model's chat template where it has one."""
    chosen_by = choosers(sampling, seed, len(prompts))
    ids = [prompt_ids(model.tokenizer, prompt) for prompt in prompts]
    answers: list[str] = []
    for start in range(0, len(ids), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        for tokens in model.generate(ids[some], max_new_tokens, choosers=chosen_by[some]):
            answers.append(model.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        progress("sampling answers", len(answers), len(ids))
    return answers
