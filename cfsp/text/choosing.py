"""The next token of a text, from a row of logits: the likeliest, or one drawn by a number in [0, 1).

Whatever runs a model asks a `Chooser` for every token that it writes. What is drawn depends on the seed, the prompt's
place among all prompts, the token's place in the answer and the logits, and on nothing that is computed beside them: a
checkpoint and its file draw the same where their logits agree. NumPy alone, so that a process that runs a file holds no
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.settings import Setting, Settings, setting

TEMPERATURE = Setting("Temperature.", gt=0, le=1000, example=0.7)
TOP_P = Setting(
    "Share of the probability that the likeliest tokens must have together.", gt=0, le=1, example=0.9
)
TOP_K = Setting(
    "Number of the likeliest tokens that may be drawn; 0 for all.", ge=0, le=2**31 - 1, example=40
)


@dataclass(frozen=True)
class Sampling(Settings):
    """How tokens are drawn, named as in a generation_config.json; a default changes nothing."""

    temperature: float = setting(1.0, TEMPERATURE)
    top_k: int = setting(0, TOP_K)
    top_p: float = setting(1.0, TOP_P)
    min_p: float = setting(0.0, "Least probability, over the likeliest token's.", ge=0, le=1)
    repetition_penalty: float = setting(
        1.0, "What logits of tokens that occurred are divided by.", gt=0, le=1000
    )


class Chooser(Protocol):
    """Chooses the next token of one answer."""

    def __call__(self, prompt: Sequence[int], written: Sequence[int], logits: npt.NDArray[Any]) -> int:
        """The token after a prompt and what was written so far, from logits (vocab_size,)."""
        ...


def greedy(prompt: Sequence[int], written: Sequence[int], logits: npt.NDArray[Any]) -> int:
    """The likeliest token."""
    return int(logits.argmax())


@dataclass(frozen=True)
class Drawn:
    """Draws the tokens of one answer.

    Attributes:
        sampling: How.
        seed: Of all answers.
        index: Place of the prompt among all.
    """

    sampling: Sampling
    seed: int
    index: int

    def __call__(self, prompt: Sequence[int], written: Sequence[int], logits: npt.NDArray[Any]) -> int:
        """See `Chooser`; raises InputError for logits that are not finite."""
        uniform = np.random.default_rng((self.seed, self.index, len(written))).random()
        scores = remaining_scores(logits, (*prompt, *written), self.sampling)
        return drawn_tokens(scores[None], [uniform])[0]


def choosers(sampling: Sampling | None, seed: int, count: int) -> list[Chooser]:
    """One for each of so many prompts; without settings none, which is greedy."""
    return [] if sampling is None else [Drawn(sampling, seed, index) for index in range(count)]


def remaining_scores(
    logits: npt.NDArray[Any], before: Sequence[int], sampling: Sampling
) -> npt.NDArray[np.float64]:
    """What is drawn from by softmax, in the order and with the meaning of transformers' logits processors.

    Tokens of one score at a limit all stay. Logits are (vocab_size,); of the result the greatest is 0, and what cannot
    be drawn is -inf. `before` are tokens of the text, the prompt's among them.
    """
    scores: npt.NDArray[np.float64] = logits.astype(np.float64)
    seen = np.unique(np.asarray(before, dtype=np.int64))
    penalty = sampling.repetition_penalty
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused when it is drawn from
        # Less the greatest first: over a tiny temperature it would be infinite, too.
        scores = (scores - scores.max()) / sampling.temperature
    if count := min(sampling.top_k, len(scores)):
        scores[scores < np.partition(scores, -count)[-count]] = -np.inf
    if sampling.top_p < 1:
        rising = np.sort(scores)
        below = np.exp(rising).cumsum()
        first = np.searchsorted(below, (1 - sampling.top_p) * below[-1], side="right")
        scores[scores < rising[min(first, len(rising) - 1)]] = -np.inf
    if sampling.min_p:
        scores[scores < np.log(sampling.min_p)] = -np.inf
    return scores


def drawn_tokens(logits: npt.NDArray[Any], uniform: Sequence[float]) -> list[int]:
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
