"""What a tokenizer makes of a token's text without that token, and the same tokenizer with some of its tokens only.

BPE builds a token by one last merge of two others, which are built before it: a forest whose leaves no other token
needs. Where merges are listed in every way in which a token can be cut (SentencePiece's, converted), the one is meant
that merging takes. Taking away a leaf changes no other token's building: the merges that are gone were not used there.

Unigram (Kudo, arXiv 1804.10959) takes of all ways to cut a text the one with the largest sum of scores. A token's parts
are the best way for its text without it; leaves are those that are no other token's parts. Taking one away changes no
text of whose best way it was no part.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from cfsp.errors import look_up

_BYTE = "<0x{:02X}>"
_UNKNOWN_PENALTY = 10.0
"""tokenizers counts an unknown character as so much less than the least score."""


@dataclass(frozen=True)
class TokenTrees:
    """What every token is made of."""

    size: int  # one more than the largest id
    # Id -> ids that take the token's place where it is gone; for a token that merging makes its last two, for a
    # character that bytes can stand for these, for a token that only a lookup of whole words gives all pieces.
    parts: Mapping[int, tuple[int, ...]]
    # Id -> ids of the tokens that merging makes of it in the next step, or whose parts it is one of.
    built_on: Mapping[int, frozenset[int]]
    # Id -> when merging learned it, 0 the first, or its place by score; tokens without `parts` have none.
    ranks: Mapping[int, int]


def token_trees(tokenizer: Any) -> TokenTrees:
    """The trees of a transformers fast tokenizer.

    Added tokens are in none, nor are bytes, nor characters that no bytes can stand for.

    Raises:
        InputError: Neither BPE nor Unigram.
    """
    state = _state(tokenizer)
    model = _kind(state)(state["model"])
    apart = model.apart | {added["id"] for added in state["added_tokens"]}
    parts: dict[int, tuple[int, ...]] = {}
    ranks: dict[int, int] = {}
    built_on: dict[int, list[int]] = {}
    for text, index in model.vocab.items():
        ids, rank = ((), None) if index in apart else model.last_step(text)
        if not ids or index in ids:
            continue
        parts[index], ranks[index] = ids, model.last if rank is None else rank
        for part in set(ids) if rank is not None else ():
            built_on.setdefault(part, []).append(index)
    size = 1 + max([*model.vocab.values(), *apart])
    return TokenTrees(size, parts, {part: frozenset(users) for part, users in built_on.items()}, ranks)


class _Merges:
    """BPE: a table of merges, the first learned first.

    `vocab`: text -> id. `apart`: ids that stand for no text of their own: bytes of characters without a token, and what
    is unknown. `last`: a rank after all others.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.vocab: Mapping[str, int] = model["vocab"]
        self.ranks: dict[tuple[str, str], int] = {}
        self._ways: dict[str, list[tuple[str, str]]] = {}
        for pair in merge_pairs(model):
            if pair not in self.ranks:
                self.ranks[pair] = len(self.ranks)
                self._ways.setdefault("".join(pair), []).append(pair)
        self.apart = _byte_ids(model, self.vocab)
        self.last = len(self.ranks)

    def last_step(self, text: str) -> tuple[tuple[int, ...], int | None]:
        """Ids of what a token is made of, none if nothing is; its rank, None if it is built on none of them."""
        ways = self._ways.get(text, [])
        pieces: Sequence[str] = ways[0] if len(ways) == 1 else self._merged(text)
        rank = self.ranks.get((pieces[0], pieces[1])) if len(pieces) == 2 else None
        if len(pieces) == 1:
            pieces = _bytes_of(text) if self.apart else []
        ids = tuple(self.vocab[piece] for piece in pieces if piece in self.vocab)
        return (ids, rank) if len(ids) == len(pieces) else ((), None)

    def _merged(self, text: str) -> list[str]:
        """The pieces that merging comes to before the last merge, or where it can go no further."""
        pieces = list(text)
        while len(pieces) > 2:
            best = min(itertools.pairwise(pieces), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, at = [], 0
            while at < len(pieces):
                joins = tuple(pieces[at : at + 2]) == best
                merged.append("".join(best) if joins else pieces[at])
                at += 2 if joins else 1
            pieces = merged
        return pieces

    @staticmethod
    def cut(model: dict[str, Any], renumbered: Mapping[int, int]) -> None:
        """Leave tokenizer.json's model, in place, the tokens that have a new id."""
        known = {text: renumbered[index] for text, index in model["vocab"].items() if index in renumbered}
        model["vocab"] = known
        model["merges"] = [
            [left, right]
            for left, right in merge_pairs(model)
            if left in known and right in known and left + right in known
        ]


class _Pieces:
    """Unigram: a table of pieces with scores; its members are those of `_Merges`."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        scores = [score for _, score in model["vocab"]]
        self.vocab: Mapping[str, int] = {text: index for index, (text, _) in enumerate(model["vocab"])}
        self._scores = dict(map(tuple, model["vocab"]))
        by_score = sorted(range(len(scores)), key=lambda index: -scores[index])
        self._ranks = {index: rank for rank, index in enumerate(by_score)}
        self._unknown = min(scores, default=0.0) - _UNKNOWN_PENALTY
        self._bytes = _byte_ids(model, self.vocab)
        self.apart = self._bytes | ({model["unk_id"]} if model.get("unk_id") is not None else frozenset())
        self.last = len(scores)

    def last_step(self, text: str) -> tuple[tuple[int, ...], int | None]:
        best: list[tuple[float, list[str]]] = [(0.0, [])]
        for end in range(1, len(text) + 1):
            ways = [
                (best[start][0] + score, [*best[start][1], *pieces])
                for start in range(end)
                for score, pieces in self._choices(text, start, end)
            ]
            best.append(max(ways, key=lambda way: way[0], default=(-math.inf, [])))
        total, pieces = best[-1]
        ids = tuple(self.vocab[piece] for piece in pieces if piece in self.vocab)
        whole = total > -math.inf and len(ids) == len(pieces)
        return (ids, self._ranks[self.vocab[text]]) if whole else ((), None)

    def _choices(self, text: str, start: int, end: int) -> Iterator[tuple[float, list[str]]]:
        """Score and tokens of a piece of a token's text that is not all of it."""
        piece = text[start:end]
        if piece != text and piece in self._scores:
            yield self._scores[piece], [piece]
        elif len(piece) == 1 and self._bytes:
            yield self._unknown, _bytes_of(piece)

    @staticmethod
    def cut(model: dict[str, Any], renumbered: Mapping[int, int]) -> None:
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in renumbered]
        if model.get("unk_id") is not None:
            model["unk_id"] = renumbered[model["unk_id"]]


_KINDS: Mapping[str, type[_Merges | _Pieces]] = {"BPE": _Merges, "Unigram": _Pieces}


def _kind(state: Mapping[str, Any]) -> type[_Merges | _Pieces]:
    """Of a tokenizer.json; raises InputError for one that is not in the table."""
    what = "the vocabulary of this kind of tokenizer cannot be trimmed"
    return look_up(_KINDS, str(state["model"].get("type")), what, field="tokenizer")


def _byte_ids(model: Mapping[str, Any], vocab: Mapping[str, int]) -> frozenset[int]:
    """Tokens that stand for bytes of characters without a token of their own."""
    names = map(_BYTE.format, range(256 if model.get("byte_fallback") else 0))
    return frozenset(vocab[name] for name in names if name in vocab)


def _bytes_of(text: str) -> list[str]:
    return [_BYTE.format(byte) for byte in text.encode("utf-8")]


def trimmed_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """The tokenizer with some of its tokens, numbered anew in their old order.

    Args:
        kept: Ids, ascending; all added tokens are among them, and of every token what it is built of.
    """
    state = _state(tokenizer)
    renumbered = {old: new for new, old in enumerate(kept)}
    _kind(state).cut(state["model"], renumbered)
    for added in state["added_tokens"]:
        added["id"] = renumbered[added["id"]]
    _renumber_processor(state.get("post_processor") or {}, renumbered)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    return trimmed


def _state(tokenizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return state


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json's BPE model, the first learned first."""
    # Older files have "left right", newer ones ["left", "right"].
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


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
