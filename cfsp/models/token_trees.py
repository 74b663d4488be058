"""How a BPE tokenizer builds each of its tokens, and the same tokenizer with some of them only.

A token is built by one last merge of two others, which are built before it: a forest whose leaves no other token
needs. Where merges are listed in every way in which a token can be cut (SentencePiece's, converted), the one is meant
that merging takes. Taking away a leaf changes no other token's building: the merges that are gone were not used there.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from cfsp.errors import InputError

_BYTE = "<0x{:02X}>"


@dataclass(frozen=True)
class TokenTrees:
    """What every token is made of.

    Attributes:
        size: One more than the largest id.
        parts: Id -> ids that take the token's place where it is gone; for a token that merging makes its last two, for
            a character that bytes can stand for these, for a token that only a lookup of whole words gives all pieces.
        built_on: Id -> ids of the tokens that merging makes of it in the next step.
        ranks: Id -> when merging learned it, 0 the first; tokens without `parts` have none.
    """

    size: int
    parts: Mapping[int, tuple[int, ...]]
    built_on: Mapping[int, frozenset[int]]
    ranks: Mapping[int, int]


def token_trees(tokenizer: Any) -> TokenTrees:
    """The trees of a transformers fast tokenizer.

    Added tokens are in none, nor are bytes, nor characters that no bytes can stand for.

    Raises:
        InputError: Not a BPE tokenizer.
    """
    state = _state(tokenizer)
    merges = _Merges(state["model"])
    apart = merges.bytes | {added["id"] for added in state["added_tokens"]}
    parts: dict[int, tuple[int, ...]] = {}
    ranks: dict[int, int] = {}
    built_on: dict[int, list[int]] = {}
    for text, index in merges.vocab.items():
        ids, rank = ((), None) if index in apart else merges.last_step(text)
        if not ids or index in ids:
            continue
        parts[index], ranks[index] = ids, len(merges.ranks) if rank is None else rank
        for part in set(ids) if rank is not None else ():
            built_on.setdefault(part, []).append(index)
    size = 1 + max([*merges.vocab.values(), *apart])
    return TokenTrees(size, parts, {part: frozenset(users) for part, users in built_on.items()}, ranks)


class _Merges:
    """A BPE model's table of merges.

    Attributes:
        vocab: Text -> id.
        ranks: Pair -> when it was learned.
        bytes: Ids of the tokens that stand for bytes of characters without a token of their own.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.vocab: dict[str, int] = model["vocab"]
        self.ranks: dict[tuple[str, str], int] = {}
        self._ways: dict[str, list[tuple[str, str]]] = {}
        for pair in merge_pairs(model):
            if pair not in self.ranks:
                self.ranks[pair] = len(self.ranks)
                self._ways.setdefault("".join(pair), []).append(pair)
        names = map(_BYTE.format, range(256 if model.get("byte_fallback") else 0))
        self.bytes = {self.vocab[name] for name in names if name in self.vocab}

    def last_step(self, text: str) -> tuple[tuple[int, ...], int | None]:
        """Ids of what a token is made of, and the rank of the merge that joins them; no rank where none does."""
        ways = self._ways.get(text, [])
        pieces: Sequence[str] = ways[0] if len(ways) == 1 else self._merged(text)
        rank = self.ranks.get((pieces[0], pieces[1])) if len(pieces) == 2 else None
        if len(pieces) == 1:
            pieces = [_BYTE.format(byte) for byte in text.encode("utf-8")] if self.bytes else []
        ids = tuple(self.vocab[piece] for piece in pieces if piece in self.vocab)
        return (ids, rank) if len(ids) == len(pieces) else ((), None)

    def _merged(self, text: str) -> list[str]:
        """The pieces that merging comes to before the last merge, or where it can go no further."""
        pieces = list(text)
        while len(pieces) > 2:
            best = min(itertools.pairwise(pieces), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            pieces = _merge(pieces, best)
        return pieces


def trimmed_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """The tokenizer with some of its tokens, numbered anew in their old order.

    Args:
        tokenizer: A transformers fast tokenizer with a BPE model.
        kept: Ids, ascending; all added tokens are among them, and of every token what it is built of.
    """
    state = _state(tokenizer)
    renumbered = {old: new for new, old in enumerate(kept)}
    model = state["model"]
    model["vocab"] = {text: renumbered[i] for text, i in model["vocab"].items() if i in renumbered}
    known = model["vocab"].keys()
    model["merges"] = [
        [left, right]
        for left, right in merge_pairs(model)
        if left in known and right in known and left + right in known
    ]
    for added in state["added_tokens"]:
        added["id"] = renumbered[added["id"]]
    _renumber_processor(state.get("post_processor") or {}, renumbered)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    return trimmed


def _state(tokenizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"].get("type")
    if kind != "BPE":
        raise InputError(
            "the vocabulary of this kind of tokenizer cannot be trimmed", value=kind, allowed="BPE"
        )
    return state


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json's BPE model, the first learned first."""
    # Older files have "left right", newer ones ["left", "right"].
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _merge(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    at = 0
    while at < len(pieces):
        joins = tuple(pieces[at : at + 2]) == pair
        merged.append("".join(pair) if joins else pieces[at])
        at += 2 if joins else 1
    return merged


def _renumber_processor(processor: dict[str, Any], renumbered: Mapping[int, int]) -> None:
    """Token ids in a post-processor, in place."""
    for inner in processor.get("processors") or ():
        _renumber_processor(inner, renumbered)
    if processor.get("type") == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [renumbered[index] for index in special["ids"]]
    for end in ("sep", "cls"):
        if end in processor:
            processor[end][1] = renumbered[processor[end][1]]
