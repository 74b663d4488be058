"""What a tokenizer makes of a token's text without that token, and the same tokenizer with some of its tokens only.

BPE builds a token by one last merge of two others, which are built before it: a forest whose leaves no other token
needs. If merges are listed in every way in which a token can be cut (converted SentencePiece), the one counts that
merging takes. Removing a leaf changes no other token's building.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers

from cfsp.errors import InputError

_BYTE = "<0x{:02X}>"


class TokenTrees(NamedTuple):
    """What every token is made of."""

    size: int  # one more than the largest id
    # Id -> ids that replace the token once it is gone: the last two that merging joins, bytes for a character, or all
    # pieces of a token that only a lookup of whole words gives.
    parts: Mapping[int, tuple[int, ...]]
    # Id -> ids of the tokens that merging makes of it in the next step.
    built_on: Mapping[int, frozenset[int]]
    # Id -> when merging learned it, 0 the first; tokens without `parts` have none.
    ranks: Mapping[int, int]


def token_trees(tokenizer: Any) -> TokenTrees:
    """The trees of a fast tokenizer, without added tokens and bytes; raises InputError unless it is BPE."""
    state = _state(tokenizer)
    vocab: Mapping[str, int] = state["model"]["vocab"]
    merge_ranks: dict[tuple[str, str], int] = {}
    ways: dict[str, list[tuple[str, str]]] = {}
    for pair in merge_pairs(state["model"]):
        if pair not in merge_ranks:
            merge_ranks[pair] = len(merge_ranks)
            ways.setdefault("".join(pair), []).append(pair)
    last = len(merge_ranks)
    names = map(_BYTE.format, range(256 if state["model"].get("byte_fallback") else 0))
    byte_ids = {vocab[name] for name in names if name in vocab}

    def merged(text: str) -> list[str]:
        """The pieces that merging comes to before the last merge, or where it can go no further."""
        pieces = list(text)
        while len(pieces) > 2:
            best = min(itertools.pairwise(pieces), key=lambda pair: merge_ranks.get(pair, last))
            if best not in merge_ranks:
                break
            joined, at = [], 0
            while at < len(pieces):
                joins = tuple(pieces[at : at + 2]) == best
                joined.append("".join(best) if joins else pieces[at])
                at += 2 if joins else 1
            pieces = joined
        return pieces

    apart = byte_ids | {added["id"] for added in state["added_tokens"]}
    parts: dict[int, tuple[int, ...]] = {}
    ranks: dict[int, int] = {}
    built_on: dict[int, list[int]] = {}
    for text, index in vocab.items():
        if index in apart:
            continue
        pieces: Sequence[str] = ways[text][0] if len(ways.get(text, ())) == 1 else merged(text)
        rank = merge_ranks.get((pieces[0], pieces[1])) if len(pieces) == 2 else None
        if len(pieces) == 1:
            pieces = [_BYTE.format(byte) for byte in text.encode("utf-8")] if byte_ids else []
        ids = tuple(vocab[piece] for piece in pieces if piece in vocab)
        if not ids or len(ids) != len(pieces) or index in ids:
            continue
        parts[index], ranks[index] = ids, last if rank is None else rank
        for part in set(ids) if rank is not None else ():
            built_on.setdefault(part, []).append(index)
    size = 1 + max([*vocab.values(), *apart])
    return TokenTrees(size, parts, {part: frozenset(users) for part, users in built_on.items()}, ranks)


def trimmed_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """The tokenizer with some tokens; kept: ids, ascending, with all added tokens and what each is built of."""
    state = _state(tokenizer)
    renumbered = {old: new for new, old in enumerate(kept)}
    model = state["model"]
    pairs = merge_pairs(model)
    known = {text: renumbered[index] for text, index in model["vocab"].items() if index in renumbered}
    model["vocab"] = known
    model["merges"] = [[a, b] for a, b in pairs if a in known and b in known and a + b in known]
    for added in state["added_tokens"]:
        added["id"] = renumbered[added["id"]]
    _renumber_processor(state.get("post_processor") or {}, renumbered)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    return trimmed


def _state(tokenizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if (kind := state["model"].get("type")) != "BPE":
        what = "the vocabulary of this kind of tokenizer cannot be trimmed"
        raise InputError(what, field="tokenizer", value=kind, allowed="BPE")
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
