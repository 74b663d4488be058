"""The vocabulary as an axis of pruning: tokens that the text hardly has go, and what they said is spelled in others.

A token that is removed is read and written as its parts (`TokenTrees.parts`), so no text is lost; it costs more tokens,
and tokens that the model has seldom seen where it needs them. No forward pass is needed. Removed are leaves of the
token trees alone, so that all other tokens come about as before; the cheapest first, by

    count(t) (split + max(0, sum of -ln p(part) over the parts + ln p(t)))        nats on the text counted

where p are the shares that tokens have of the text in the dense model's segmentation, and `split` is what any split
costs a model, however well known the parts are: it reads a word in a way in which it has not met it. A part that never
stands alone is one that the model has hardly ever read; where its own parts say the same for less, these are meant, as
it will be removed next. Of a script's tokens that the text does not have, those go first that merging learned last,
which is how often the tokenizer's own training text had them.
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
"""What a split costs at the least; measured are 4 to 8 nats for each further token of a text."""
_SHORT, _SHORT_PRIOR = 5.0, 0.25
"""Tokens of text for each token that there is, below which a text is short; what is expected of each beside it then."""
_UNSEEN = 3.0
"""What is expected of tokens that the text does not have, over Good and Turing's estimate: other text is not quite of
the same kind."""
_LEAST = 1e-6
"""Share of all text that is expected of any script at the least: no token is worth nothing."""
_ONCE = 1.5
"""Of texts that are weighed to count alike, what is less was seen once."""
_PRIOR_RANK = 1000.0
"""Zipf's law with an offset: the share of the token that merging learned as the r-th is as 1 / (r + this)."""
_SHOWN = 8
"""Scripts of more tokens than any others; these are told as one."""
_SPECIAL, _DIGITS, _SIGNS, _PARTS = "special", "digits", "signs and spaces", "parts of characters"
_NAMES = {"CJK": "Han", "FULLWIDTH": "Latin", "MODIFIER": "Latin"}
"""Where the first word of a character's name in Unicode is not its script."""
_BINS = ((0, "not in the text"), (1, "below 10 times"), (10, "10 to 99 times"), (100, "100 times or more"))
_ID_SETTINGS = ("suppress_tokens", "begin_suppress_tokens")
_CHAT = ({"role": "user", "content": " "}, {"role": "assistant", "content": " "})


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


@dataclass(frozen=True)
class VocabularyPlan:
    """Which tokens are kept, and what that costs on the text that was counted.

    Attributes:
        dense_size: Rows of the dense model's embedding.
        kept: Ids of the kept tokens, ascending; their places are the new ids. Where more rows are kept than there are
            tokens, then those of rows that none has.
        sources: References of the text that was counted.
        counted_tokens: Tokens of that text, as the dense model reads it.
        growth: Tokens after trimming to tokens before, on that text, each spelled by itself, as BPE does.
        by_script: What stays of every script.
        by_count: What stays of rare and of common tokens.
        counts: How often the counted text has every token; what is left learns to spell the others by it.
    """

    dense_size: int
    kept: tuple[int, ...]
    sources: tuple[str, ...]
    counted_tokens: int
    growth: float
    by_script: tuple[TokenKind, ...] = ()
    by_count: tuple[TokenKind, ...] = ()
    counts: tuple[NonNegativeInt, ...] = ()


def plan_vocabulary(
    loaded: LoadedModel, counts: Counts, size: int, *, sources: Sequence[str]
) -> VocabularyPlan:
    """Choose the tokens that a vocabulary of `size` keeps.

    Bytes, characters that bytes cannot stand for, added and special tokens, and all that the chat template writes are
    kept, and what these are built of. Of rows that no token has, as many are kept as `size` is above the tokens.

    Args:
        loaded: The dense model.
        counts: How often the text has every token.
        size: Rows to keep.
        sources: References of the text, for the record.

    Raises:
        InputError: More tokens than there are, or fewer than must be kept; a tokenizer that cannot be trimmed.
    """
    trees, tokenizer = token_trees(loaded.tokenizer), loaded.tokenizer
    rows, tokens = int(loaded.model.get_input_embeddings().weight.shape[0]), len(tokenizer)
    removed, ids = token_order(loaded, counts), sorted(tokenizer.get_vocab().values())
    padding = range(max(ids) + 1, rows)
    most = tokens + len(padding)
    if not 0 < size <= most:
        raise InputError("out of range", field="vocabulary", value=size, allowed=f"1 to {most}")
    if size < tokens - len(removed):
        raise InputError(
            "smaller than what has to stay: bytes, special tokens and what the chat template writes",
            field="vocabulary",
            value=size,
            allowed=f"at least {tokens - len(removed)}",
        )
    gone = set(removed[: max(0, tokens - size)])
    kept = (*(index for index in ids if index not in gone), *padding[: max(0, size - tokens)])
    before = float(counts.sum())
    after = float(
        sum(counts[index] * len(spelled(index, gone, trees)) for index in np.flatnonzero(counts).tolist())
    )
    return VocabularyPlan(
        dense_size=rows,
        kept=kept,
        sources=tuple(sources),
        counted_tokens=int(before),
        growth=after / before if before else 1.0,
        by_script=kinds_by_script(tokenizer, counts, kept),
        by_count=kinds_by_count(ids, counts, kept),
        counts=tuple(np.rint(counts).astype(int).tolist()),
    )


def count_tokens(ids: Iterable[Sequence[int]], size: int) -> Counts:
    """How often every token stands in texts of token ids."""
    counts = np.zeros(size)
    for text in ids:
        counts += np.bincount(np.asarray(text, dtype=np.int64), minlength=size)[:size]
    return counts


def count_alike(texts: Sequence[Iterable[Sequence[int]]], size: int) -> Counts:
    """How often every token stands in the texts, each of which counts as much as any other; the sum stays."""
    counts = [count_tokens(text, size) for text in texts]
    alike = sum(each.sum() for each in counts) / len(counts)
    weighed = np.stack([each * (alike / max(each.sum(), 1.0)) for each in counts])
    return np.asarray(weighed.sum(axis=0), dtype=np.float64)


def required_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Tokens that something else than text names: the configuration's special ids, and the chat template's words."""
    tokenizer = loaded.tokenizer
    known = frozenset(tokenizer.get_vocab().values())
    named = {index for config in _configs(loaded.model) for _, ids in _named_ids(config) for index in ids}
    if tokenizer.chat_template:
        for generate in (False, True):
            text = render_chat(tokenizer, _CHAT, add_generation_prompt=generate)
            named |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    return known & named


def cut_vocabulary(loaded: LoadedModel, plan: VocabularyPlan) -> LoadedModel:
    """Give the model the rows of the kept tokens alone, in place, and a tokenizer to match.

    Raises:
        InputError: The plan was made for another vocabulary.
    """
    model = loaded.model
    if plan.dense_size != model.get_input_embeddings().weight.shape[0]:
        raise InputError(
            "the plan was made for another vocabulary",
            field="vocabulary",
            value=plan.dense_size,
            allowed=str(model.get_input_embeddings().weight.shape[0]),
        )
    kept = torch.tensor(plan.kept)
    tokenizer = trimmed_tokenizer(loaded.tokenizer, plan.kept)
    cut_rows(model, kept)
    renumbered = {old: new for new, old in enumerate(plan.kept)}
    for config in _configs(model):
        for name, ids in list(_named_ids(config)):
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


def _configs(model: Any) -> list[Any]:
    generation = getattr(model, "generation_config", None)
    return [model.config] if generation is None else [model.config, generation]


def _named_ids(config: Any) -> Iterable[tuple[str, list[int]]]:
    """(setting, token ids) of all settings that name tokens."""
    for name, value in vars(config).items():
        if name.endswith("_token_id") or name in _ID_SETTINGS:
            ids = value if isinstance(value, list) else [value]
            if ids and all(type(index) is int for index in ids):
                yield name, ids


def token_order(loaded: LoadedModel, counts: Counts) -> list[int]:
    """Ids of all tokens that may go, the cheapest first: one leaf of the token trees after the other.

    Raises:
        InputError: A tokenizer that cannot be trimmed.
    """
    trees, required = token_trees(loaded.tokenizer), required_tokens(loaded)
    expected = expected_counts(trees, counts, scripts_of(loaded.tokenizer))
    users = {part: len(of_part) for part, of_part in trees.built_on.items()}
    # What a token says is what it said before any was removed; how often it is needed grows with its users' end.
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
    tokens by their ranks. A short text says little even of that: there a part of a token is expected of each, by rank.
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


def kinds_by_script(
    tokenizer: Any, counts: npt.NDArray[np.float64], kept: Sequence[int]
) -> tuple[TokenKind, ...]:
    """By the script of a token's first letter, the largest first; tokens without letters are kinds of their own."""
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
