"""Text to token ids; long texts piece by piece, so that memory does not grow with them."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cfsp.reading import as_input_error

if TYPE_CHECKING:
    import torch

WHOLE = 2**21
"""Characters up to which a text is tokenized in one go; a token then takes some 250 bytes for a moment."""
_PIECE = 2**20
_OVERLAP = 2**12
_AGREEING = 32
_CHARACTERS = 8
"""Of a text that are tokenized first for each token that is wanted; a token of English takes some four."""

Token = tuple[int, int, int]
"""Id, and where in the text it begins and ends."""


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text.

    Raises:
        InputError: The tokenizer has no token for a part of it.
    """
    with as_input_error("the model's tokenizer cannot take the text"):
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])


def decode(tokenizer: Any, ids: torch.Tensor | Sequence[int]) -> str:
    """The text of token ids (n,), special tokens included, and nothing of it tidied."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def start_token(tokenizer: Any) -> int | None:
    """The start token that a tokenizer puts before any text, None where it puts nothing there."""
    plain, whole = (encode(tokenizer, "a", add_special_tokens=added) for added in (False, True))
    return tokenizer.bos_token_id if whole[:1] == [tokenizer.bos_token_id] and whole != plain else None


def encode_long(tokenizer: Any, text: str, limit: int | None = None) -> array[int]:
    """Token ids of a text of any length, without special tokens.

    Pieces overlap, and the next goes on where it has the same tokens at the same places as the one before. A text in
    which that is nowhere (one endless word) is cut.

    Args:
        tokenizer: A transformers fast tokenizer.
        text: The text.
        limit: The text is left once this many tokens are there, and a few more.

    Raises:
        InputError: As `encode`.
    """
    size = _PIECE if limit is None else min(_PIECE, _CHARACTERS * limit + 2 * _OVERLAP)
    if len(text) <= (WHOLE if limit is None else size):
        return array("q", encode(tokenizer, text))
    ids: array[int] = array("q")
    before: list[Token] = []
    for start in range(0, len(text) - _OVERLAP, size - _OVERLAP):
        # The last tokens before a cut may be others than the text's.
        if limit is not None and len(ids) + len(before) >= limit + _AGREEING:
            break
        piece = encode_in_place(tokenizer, text[start : start + size], start)
        end, begin = _seam(before, piece, start) if before else (0, 0)
        ids.extend(token for token, *_ in before[:end])
        before = piece[begin:]
    ids.extend(token for token, *_ in before)
    return ids


def encode_in_place(tokenizer: Any, text: str, start: int = 0) -> list[Token]:
    """Tokens of a text with their places in it, or in the one that it begins at `start` of; raises as `encode`."""
    with as_input_error("the model's tokenizer cannot take the text"):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(token, start + first, start + last) for token, (first, last) in pairs]


def _seam(before: Sequence[Token], after: Sequence[Token], start: int) -> tuple[int, int]:
    """Where to leave the one piece and to enter the next, which begins at `start` in the text."""
    first = bisect_left(before, start, key=lambda token: token[1])
    shared = before[first:]
    known = {tuple(after[i : i + _AGREEING]): i for i in range(min(len(after), 2 * len(shared)))}
    middle = len(shared) // 2
    for place in (*range(middle, len(shared)), *range(middle)):
        run = tuple(shared[place : place + _AGREEING])
        if len(run) == _AGREEING and run in known:
            return first + place + _AGREEING // 2, known[run] + _AGREEING // 2
    end = before[-1][2]
    return len(before), bisect_left(after, end, key=lambda token: token[1])
