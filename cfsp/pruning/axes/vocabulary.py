"""The vocabulary as an axis of pruning: tokens that the text hardly has go, and what they said is spelled in others.

A token that is removed is read and written as its parts (`TokenTrees.parts`), so no text is lost; it costs more tokens,
and tokens that the model has seldom seen where it needs them. In which order tokens go says token_order.py. No forward
pass is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import spec_for, token_tables
from cfsp.models.source import LoadedModel
from cfsp.models.token_trees import TokenTrees, token_trees, trimmed_tokenizer
from cfsp.pruning.axes.token_kinds import TokenKind, kinds_by_count, kinds_by_script, scripts_of
from cfsp.pruning.axes.token_order import Counts, TokenOrder, expected_counts, order_tokens
from cfsp.text.tokens import render_chat

_ID_SETTINGS = ("suppress_tokens", "begin_suppress_tokens")
_CHAT = ({"role": "user", "content": " "}, {"role": "assistant", "content": " "})


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
    loaded: LoadedModel,
    counts: Counts,
    size: int,
    *,
    sources: Sequence[str],
    order: TokenOrder | None = None,
) -> VocabularyPlan:
    """Choose the tokens that a vocabulary of `size` keeps.

    Bytes, characters that bytes cannot stand for, added and special tokens, and all that the chat template writes are
    kept, and what these are built of.

    Args:
        loaded: The dense model.
        counts: How often the text has every token.
        size: Tokens to keep; of rows that no token has, as many as it is more than there are tokens.
        sources: References of the text, for the record.
        order: In which order tokens go by these counts, where that is known already.

    Raises:
        InputError: More tokens than there are, or fewer than must be kept; a tokenizer that cannot be trimmed.
    """
    trees = token_trees(loaded.tokenizer)
    rows = int(loaded.model.get_input_embeddings().weight.shape[0])
    tokens = len(loaded.tokenizer)
    removed = (order or token_order(loaded, counts)).removed
    padding = padding_rows(loaded.tokenizer, rows)
    check_vocabulary(size, tokens + len(padding), tokens - len(removed))
    gone = set(removed[: max(0, tokens - size)])
    kept = (*kept_tokens(loaded.tokenizer, gone), *padding[: max(0, size - tokens)])
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
        by_script=kinds_by_script(loaded.tokenizer, counts, kept),
        by_count=kinds_by_count(loaded.tokenizer.get_vocab().values(), counts, kept),
        counts=tuple(np.rint(counts).astype(int).tolist()),
    )


def check_vocabulary(size: int, most: int, least: int) -> None:
    """Raise InputError for a number of tokens that no vocabulary can keep.

    Args:
        size: Tokens to keep.
        most: That there are, and rows behind them.
        least: That have to stay.
    """
    if not 0 < size <= most:
        raise InputError("out of range", field="vocabulary", value=size, allowed=f"1 to {most}")
    if size < least:
        raise InputError(
            "smaller than what has to stay: bytes, special tokens and what the chat template writes",
            field="vocabulary",
            value=size,
            allowed=f"at least {least}",
        )


def token_order(loaded: LoadedModel, counts: Counts) -> TokenOrder:
    """In which order the model's tokens go; raises InputError for a tokenizer that cannot be trimmed."""
    trees = token_trees(loaded.tokenizer)
    expected = expected_counts(trees, counts, scripts_of(loaded.tokenizer))
    return order_tokens(trees, expected, required_tokens(loaded))


def kept_tokens(tokenizer: Any, gone: Collection[int]) -> tuple[int, ...]:
    """Ids of a tokenizer without those that go, ascending."""
    return tuple(index for index in sorted(tokenizer.get_vocab().values()) if index not in gone)


def padding_rows(tokenizer: Any, rows: int) -> range:
    """Rows of an embedding of so many that no token has, behind all those that one has."""
    return range(max(tokenizer.get_vocab().values()) + 1, rows)


def count_tokens(ids: Iterable[Sequence[int]], size: int) -> Counts:
    """How often every token stands in texts of token ids."""
    counts = np.zeros(size)
    for text in ids:
        counts += np.bincount(np.asarray(text, dtype=np.int64), minlength=size)[:size]
    return counts


def count_alike(texts: Sequence[Iterable[Sequence[int]]], size: int) -> Counts:
    """How often every token stands in the texts, each of which counts as much as any other, however long it is.

    Args:
        texts: Documents' token ids, text by text.
        size: Rows of the embedding.

    Returns:
        (size,); the sum is the number of all tokens.
    """
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

    Args:
        loaded: The dense model.
        plan: Which tokens are kept.

    Returns:
        The same model with the trimmed tokenizer.

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
