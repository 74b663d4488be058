"""Which of the texts that a model wrote are worth learning from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from cfsp.models.source import LoadedModel
from cfsp.text.generation import stop_ids
from cfsp.text.loops import is_loop
from cfsp.text.self_sampling import chat_frame, plain_start


@dataclass(frozen=True)
class Winnowed:
    """What is left of a model's texts.

    Attributes:
        windows: (n, seqlen) int64, as `cfsp.text.self_sampling.sample_windows` has them.
        n_texts: Texts that were there.
        n_loops: Those among them that say the same over and over; these are left out.
    """

    windows: torch.Tensor
    n_texts: int
    n_loops: int


def without_loops(windows: torch.Tensor, author: LoadedModel) -> Winnowed:
    """Leave out the texts in which a turn is a loop (`cfsp.text.loops`), and close the ranks.

    Args:
        windows: (n, seqlen) int64, texts that the author wrote, one after the other across windows.
        author: The model.
    """
    seqlen, tokenizer, stops = windows.shape[1], author.tokenizer, stop_ids(author)
    begins, between = chat_frame(tokenizer) or (plain_start(tokenizer), [])
    texts = _texts(windows.flatten().tolist(), begins)
    good = [text for text in texts if not any(map(is_loop, _turns(text, tokenizer, between, stops)))]
    if len(good) == len(texts):
        return Winnowed(windows, len(texts), 0)
    stream = torch.tensor([token for text in good for token in text], dtype=windows.dtype)
    count = len(stream) // seqlen
    return Winnowed(stream[: count * seqlen].view(count, seqlen), len(texts), len(texts) - len(good))


def _texts(stream: list[int], begins: list[int]) -> list[list[int]]:
    """A stream's texts, each of which begins so; where a text ends with the token that begins one, the last of two."""
    size = len(begins)
    places = [place for place in range(len(stream) - size) if stream[place : place + size] == begins]
    starts = [place for place in places if stream[place + size : place + 2 * size] != begins]
    return [stream[start:end] for start, end in pairwise(sorted({0, *starts, len(stream)}))]


def _turns(text: list[int], tokenizer: Any, between: list[int], stops: set[int]) -> list[str]:
    """What is said in a text, split where a turn ends and where an answer begins."""
    ends = [place + 1 for place, token in enumerate(text) if token in stops]
    size = len(between)
    answers = [place for place in range(len(text)) if size and text[place : place + size] == between]
    parts = [text[start:end] for start, end in pairwise(sorted({0, *ends, *answers, len(text)}))]
    return [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
