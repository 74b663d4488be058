"""The vocabulary as an axis of pruning: tokens that the text hardly has go, and are spelled in others.

A token that is removed is read and written as its parts (`TokenTrees.parts`): no text is lost, but it takes more
tokens, which the model has seldom seen in that place. Only leaves of the token trees go, so that all other tokens come
about as before; the cheapest first, by

    count(t) (split + max(0, sum of -ln p(part) over the parts + ln p(t)))        nats on the text counted

where p are the shares that tokens have of the text in the dense model's segmentation, and `split` is what any split
costs a model. A part that never stands alone is one that the model has hardly ever read; if its own parts say the same
for less, these are meant, as it will be removed next. Of a script's tokens that the text does not have, those go first
that merging learned last: so often did the tokenizer's own training text have them.
"""

from __future__ import annotations

import heapq
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import NonNegativeInt
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import spec_for, token_tables
from cfsp.models.source import LoadedModel
from cfsp.models.token_trees import TokenTrees, token_trees, trimmed_tokenizer
from cfsp.text.tokens import render_chat

Counts = npt.NDArray[np.float64]
"""How often the text has every token, (tokens,)."""
_SPLIT_NATS = 6.0
"""What a split costs at least; measured are 4 to 8 nats for each further token of a text."""
_SHORT, _SHORT_PRIOR = 5.0, 0.25
"""A text of fewer tokens than this times the vocabulary is short: then so much is expected of each token beside it."""
_UNSEEN = 3.0
"""Factor on Good and Turing's estimate of unseen tokens: other text is not quite of the same kind."""
_LEAST = 1e-6
"""Least share of all text that is expected of a script: no token is worth nothing."""
_ONCE = 1.5
"""What was seen less often was seen once: counts of texts that count alike are fractions."""
_PRIOR_RANK = 1000.0
"""Zipf's law with an offset: the share of the token that merging learned as the r-th is as 1 / (r + this)."""
_SHOWN = 8
"""Scripts that are named, those of the most tokens; the rest are one."""
_SPECIAL, _DIGITS, _SIGNS, _PARTS = "special", "digits", "signs and spaces", "parts of characters"
_NAMES = {"CJK": "Han", "FULLWIDTH": "Latin", "MODIFIER": "Latin"}
"""Scripts of characters whose Unicode name begins with another word."""
_ID_SETTINGS = ("suppress_tokens", "begin_suppress_tokens")
_CHAT = ({"role": "user", "content": " "}, {"role": "assistant", "content": " "})


@dataclass(frozen=True)
class TokenKind:
    """Tokens of one script, or of none: how many the dense model has, and how many stay.

    `share` is of the counted text, as the dense model reads it; `kept_share` is the part of it that is still one token.
    """

    name: str
    tokens: int
    kept: int
    share: float
    kept_share: float


@dataclass(frozen=True)
class VocabularyPlan:
    """Which tokens are kept, and what that costs on the text that was counted."""

    dense_size: int  # rows of the dense model's embedding
    # ids of the kept tokens, ascending; their places are the new ids. If more rows are kept than there
    # are tokens, then also rows that no token has.
    kept: tuple[int, ...]
    sources: tuple[str, ...]  # references of the text that was counted
    counted_tokens: int  # tokens of that text, as the dense model reads it
    growth: float  # tokens after trimming to tokens before, on that text, each spelled by itself
    by_script: tuple[TokenKind, ...] = ()  # what stays of every script
    # how often the counted text has every token; what is left learns to spell the others by it.
    counts: tuple[NonNegativeInt, ...] = ()


def plan_vocabulary(
    loaded: LoadedModel, counts: Counts, size: int, *, sources: Sequence[str]
) -> VocabularyPlan:
    """Choose the tokens that a vocabulary of `size` keeps.

    Bytes, characters that bytes cannot stand for, added and special tokens, and all that the chat template writes are
    kept, and what these are built of. A `size` above the number of tokens keeps rows that no token has. Raises
    InputError: more tokens than there are, or fewer than must be kept; a tokenizer that cannot be trimmed.
    """
    trees, tokenizer = token_trees(loaded.tokenizer), loaded.tokenizer
    rows, tokens = int(loaded.model.get_input_embeddings().weight.shape[0]), len(tokenizer)
    scripts = scripts_of(tokenizer)
    removed, ids = _removal_order(loaded, trees, counts, scripts), sorted(tokenizer.get_vocab().values())
    padding = range(max(ids) + 1, rows)
    most, least = tokens + len(padding), tokens - len(removed)
    if not 0 < size <= most:
        raise InputError("out of range", field="vocabulary", value=size, allowed=f"1 to {most}")
    if size < least:
        why = "smaller than what has to stay: bytes, special tokens and what the chat template writes"
        raise InputError(why, field="vocabulary", value=size, allowed=f"at least {least}")
    gone = set(removed[: max(0, tokens - size)])
    kept = (*(index for index in ids if index not in gone), *padding[: max(0, size - tokens)])
    before = float(counts.sum())
    after = float(
        sum(counts[index] * len(spelled(index, gone, trees)) for index in np.flatnonzero(counts).tolist())
    )
    scripts |= dict.fromkeys(set(tokenizer.all_special_ids) & scripts.keys(), _SPECIAL)
    plain = {_SPECIAL, _DIGITS, _SIGNS, _PARTS}
    sizes = Counter(name for name in scripts.values() if name not in plain)
    named = plain | {name for name, _ in sizes.most_common(_SHOWN)}
    of_script: dict[str, list[int]] = {}
    for index, name in scripts.items():
        of_script.setdefault(name if name in named else "other", []).append(index)
    kinds = []
    for name, members in of_script.items():
        left = [index for index in members if index not in gone]
        shares = (
            float(counts[chosen].sum()) / max(before, 1.0) if chosen else 0.0 for chosen in (members, left)
        )
        kinds.append(TokenKind(name, len(members), len(left), *shares))
    return VocabularyPlan(
        dense_size=rows,
        kept=kept,
        sources=tuple(sources),
        counted_tokens=int(before),
        growth=after / before if before else 1.0,
        by_script=tuple(sorted(kinds, key=lambda kind: (kind.name == "other", -kind.tokens))),
        counts=tuple(np.rint(counts).astype(int).tolist()),
    )


def count_alike(texts: Sequence[Iterable[Sequence[int]]], size: int) -> Counts:
    """How often every token stands in texts of token ids, each of which counts alike; the sum stays."""
    counts = np.zeros((len(texts), size))
    for row, text in zip(counts, texts, strict=True):
        for ids in text:
            row += np.bincount(np.asarray(ids, dtype=np.int64), minlength=size)[:size]
    sums = counts.sum(axis=1, keepdims=True)
    return np.asarray((counts * (sums.sum() / len(counts) / np.maximum(sums, 1.0))).sum(axis=0))


def cut_vocabulary(loaded: LoadedModel, plan: VocabularyPlan) -> LoadedModel:
    """Give the model only the rows of the kept tokens, in place, and a tokenizer to match.

    Raises InputError: the plan was made for another vocabulary.
    """
    model, rows = loaded.model, loaded.model.get_input_embeddings().weight.shape[0]
    if plan.dense_size != rows:
        why = "the plan was made for another vocabulary"
        raise InputError(why, field="vocabulary", value=plan.dense_size, allowed=str(rows))
    tokenizer = trimmed_tokenizer(loaded.tokenizer, plan.kept)
    cut_rows(model, torch.tensor(plan.kept))
    renumbered = {old: new for new, old in enumerate(plan.kept)}
    for config, name, ids in list(_named_ids(model)):
        new = [renumbered[index] for index in ids if index in renumbered]
        alone = isinstance(getattr(config, name), int)
        setattr(config, name, (new[0] if alone else new) if new else None)
    return replace(loaded, tokenizer=tokenizer)


def spelled(index: int, gone: Collection[int], trees: TokenTrees) -> list[int]:
    """The kept tokens that stand for a token."""
    if index not in gone:
        return [index]
    return [part for piece in trees.parts.get(index, ()) for part in spelled(piece, gone, trees)]


def cut_rows(model: Any, kept: torch.Tensor) -> None:
    """Keep rows of the embeddings and of the output matrix; tied ones stay one tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    tables = token_tables(model)
    for module in (*tables, head):
        rows = module.weight[kept].detach().clone().contiguous()
        module.weight = nn.Parameter(rows, requires_grad=module.weight.requires_grad)
    if tied:
        head.weight = embedding.weight
    head.out_features = len(kept)
    for table in tables:
        table.num_embeddings, table.padding_idx = len(kept), None
    if inputs := spec_for(model.config).block_inputs:
        setattr(model.config, inputs.rows_setting, len(kept))
    for holder in (model, model.get_decoder(), model.config):
        holder.vocab_size = len(kept)


def _named_ids(model: Any) -> Iterable[tuple[Any, str, list[int]]]:
    """(configuration, setting, token ids) of all settings that name tokens."""
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        for name, value in vars(config).items():
            if name.endswith("_token_id") or name in _ID_SETTINGS:
                ids = value if isinstance(value, list) else [value]
                if ids and all(type(index) is int for index in ids):
                    yield config, name, ids


def _removal_order(
    loaded: LoadedModel, trees: TokenTrees, counts: Counts, scripts: Mapping[int, str]
) -> list[int]:
    """Ids of all tokens that may go, the cheapest first: one leaf of the token trees after the other.

    Special ids of the configuration stay, and what the chat template writes.
    """
    tokenizer = loaded.tokenizer
    required = {index for _, _, ids in _named_ids(loaded.model) for index in ids}
    for generate in (False, True) if tokenizer.chat_template else ():
        text = render_chat(tokenizer, _CHAT, add_generation_prompt=generate)
        required |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    expected = expected_counts(trees, counts, scripts)
    users = {part: len(of_part) for part, of_part in trees.built_on.items()}
    # What a token says is what it said before any was removed; how often it is needed grows as its users go.
    needed = expected.copy()
    known = np.maximum(needed, 1e-9 * max(float(expected.sum()), 1.0))
    nats = -np.log(known / known.sum())
    best = nats.copy()

    def parts_cost(index: int) -> float:
        return float(sum(best[part] for part in trees.parts[index]))

    def may_go(index: int) -> bool:
        return index in trees.parts and not users.get(index) and index not in required

    def key(index: int) -> tuple[float, int, int]:
        dearer = max(0.0, parts_cost(index) - float(nats[index]))
        return float(needed[index]) * (_SPLIT_NATS + dearer), -trees.ranks[index], index

    for index in sorted(trees.ranks, key=lambda token: trees.ranks[token]):
        best[index] = min(nats[index], parts_cost(index))
    removed = list[int]()
    queue = [key(index) for index in trees.parts if may_go(index)]
    heapq.heapify(queue)
    while queue:
        cost, _, index = heapq.heappop(queue)
        if (current := key(index))[0] > cost:
            heapq.heappush(queue, current)
            continue
        removed.append(index)
        for part in trees.parts[index]:
            needed[part] += needed[index]
        for part in set(trees.parts[index]):
            if index in trees.built_on.get(part, ()):
                users[part] -= 1
                if may_go(part):
                    heapq.heappush(queue, key(part))
    return removed


def expected_counts(trees: TokenTrees, counts: Counts, scripts: Mapping[int, str]) -> Counts:
    """How often text like the counted one has every token: the counts, and a little of what is known without them.

    Tokens that a text does not have are in all about as frequent in other text of its kind as those that it has once
    (Good 1953, who names Turing): that many of each script's, so that English says nothing of Bengali. They go to its
    tokens by rank. A short text says little even of that: there a fraction of a token is expected of each, by rank.
    """
    prior = np.zeros(len(counts))
    of_script: dict[str, list[int]] = {}
    for index, rank in trees.ranks.items():
        prior[index] = 1 / (rank + _PRIOR_RANK)
        of_script.setdefault(scripts[index], []).append(index)
    if counts.sum() < _SHORT * len(trees.ranks):
        prior *= _SHORT_PRIOR * len(trees.ranks) / float(prior.sum())
        return np.asarray(counts + prior, dtype=np.float64)
    least = _LEAST * max(float(counts.sum()), 1.0)
    for ids in of_script.values():
        seen = counts[ids]
        unseen = max(_UNSEEN * float(seen[seen < _ONCE].sum()), least)
        prior[ids] *= unseen / float(prior[ids].sum())
    return np.asarray(counts + prior, dtype=np.float64)


def scripts_of(tokenizer: Any) -> dict[int, str]:
    """The script of every token's first letter by Unicode's names, else what it is made of, in the order of ids."""
    ids = sorted(tokenizer.get_vocab().values())
    words = tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)
    return {index: script_of(text) for index, text in zip(ids, words, strict=True)}


def script_of(text: str) -> str:
    """As `scripts_of`, of a token's text."""
    for character in text:
        if character.isalpha():
            first = unicodedata.name(character, "other").split()[0].partition("-")[0]
            return _NAMES.get(first, first.capitalize())
    if "\ufffd" in text:
        return _PARTS
    return _DIGITS if any(character.isdigit() for character in text) else _SIGNS
