"""What a trimmed vocabulary still has of each script, and of tokens as often as the counted text has them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_SHOWN = 8
"""Scripts of more tokens than any others; these are told as one."""
_SPECIAL, _DIGITS, _SIGNS, _PARTS = "special", "digits", "signs and spaces", "parts of characters"
_NAMES = {"CJK": "Han", "FULLWIDTH": "Latin", "MODIFIER": "Latin"}
"""Where the first word of a character's name in Unicode is not its script."""
_BINS = ((0, "not in the text"), (1, "below 10 times"), (10, "10 to 99 times"), (100, "100 times or more"))


@dataclass(frozen=True)
class TokenKind:
    """Tokens of one kind.

    Attributes:
        name: Such as `Latin`, or `below 10 times`.
        tokens: How many the dense model has.
        kept: How many stay.
        share: Of the counted text, as the dense model reads it.
        kept_share: Of that text, what is still one token.
    """

    name: str
    tokens: int
    kept: int
    share: float
    kept_share: float


def kinds_by_script(
    tokenizer: Any, counts: npt.NDArray[np.float64], kept: Sequence[int]
) -> tuple[TokenKind, ...]:
    """By the script of a token's first letter, the largest first; tokens without letters are kinds of their own.

    Args:
        tokenizer: The dense model's.
        counts: How often the text has every token, (tokens,).
        kept: Ids that stay.
    """
    special = set(tokenizer.all_special_ids)
    scripts = {
        index: _SPECIAL if index in special else script for index, script in scripts_of(tokenizer).items()
    }
    plain = {_SPECIAL, _DIGITS, _SIGNS, _PARTS}
    sizes = Counter(name for name in scripts.values() if name not in plain)
    common = plain | {name for name, _ in sizes.most_common(_SHOWN)}
    named = {index: name if name in common else "other" for index, name in scripts.items()}
    return tuple(sorted(_kinds(named, counts, kept), key=lambda kind: (kind.name == "other", -kind.tokens)))


def kinds_by_count(
    ids: Iterable[int], counts: npt.NDArray[np.float64], kept: Sequence[int]
) -> tuple[TokenKind, ...]:
    """By how often the text has them, the rarest first. Arguments as in `kinds_by_script`."""
    lowest = np.array([low for low, _ in _BINS])
    bins = {index: int(np.searchsorted(lowest, np.ceil(counts[index]), side="right")) - 1 for index in ids}
    rarest_first = sorted(bins, key=lambda index: bins[index])
    return tuple(_kinds({index: _BINS[bins[index]][1] for index in rarest_first}, counts, kept))


def scripts_of(tokenizer: Any) -> dict[int, str]:
    """The script of every token, in the order of their ids."""
    ids = sorted(tokenizer.get_vocab().values())
    words = tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)
    return {index: script_of(text) for index, text in zip(ids, words, strict=True)}


def script_of(text: str) -> str:
    """The script of its first letter, by Unicode's names; else what it is made of."""
    for character in text:
        if character.isalpha():
            first = unicodedata.name(character, "other").split()[0].partition("-")[0]
            return _NAMES.get(first, first.capitalize())
    if "\ufffd" in text:
        return _PARTS
    return _DIGITS if any(character.isdigit() for character in text) else _SIGNS


def _kinds(names: Mapping[int, str], counts: npt.NDArray[np.float64], kept: Sequence[int]) -> list[TokenKind]:
    """One of every name, in the order in which the names come."""
    stay, total = set(kept), max(float(counts.sum()), 1.0)
    kinds = []
    for name in dict.fromkeys(names.values()):
        ids = [index for index, other in names.items() if other == name]
        left = [index for index in ids if index in stay]
        shares = (float(counts[chosen].sum()) / total if chosen else 0.0 for chosen in (ids, left))
        kinds.append(TokenKind(name, len(ids), len(left), *shares))
    return kinds
