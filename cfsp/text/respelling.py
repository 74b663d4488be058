"""How a vocabulary that lost tokens spells them, and what a model that has them all would predict in it.

Predictions are comparable where a token of the larger vocabulary ends: the probability that a kept token comes next is
that of all tokens whose spelling begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from cfsp.errors import InputError


class Respelled(NamedTuple):
    """A text (n,) int64 in the tokens that are left, and which token of the larger vocabulary each is a part of."""

    ids: torch.Tensor
    owners: torch.Tensor

    @property
    def ends(self) -> torch.Tensor:
        """(n,) bool, whether it is the last part: there both models have read the same."""
        return self.owners.diff(append=self.owners.new_full((1,), -1)) != 0


@dataclass(frozen=True)
class Respelling:
    """Every token of a vocabulary in those of a smaller one.

    `kept` (n_kept,) int64 are the larger vocabulary's ids in the order of the smaller one's; `spellings` are the larger
    one's ids to the smaller one's, nothing for a row without text.
    """

    kept: torch.Tensor
    spellings: Mapping[int, tuple[int, ...]]

    def spell(self, ids: Sequence[int]) -> Respelled:
        """A text in the tokens that are left."""
        pairs = [(new, place) for place, old in enumerate(ids) for new in self.spellings.get(old, ())]
        numbers, owners = zip(*pairs, strict=True) if pairs else ((), ())
        return Respelled(*(torch.tensor(column, dtype=torch.int64) for column in (numbers, owners)))

    def windows(self, ids: torch.Tensor) -> torch.Tensor:
        """Windows (n_windows, seqlen) in the tokens that are left, each as long as before: their ends are cut."""
        return torch.stack([self.spell(window.tolist()).ids[: ids.shape[1]] for window in ids])

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What the larger vocabulary's model predicts, in the tokens that are left.

        p(b) is the sum of p(t) over all tokens t whose spelling begins with b. Logits (n, rows) float32 of the larger
        vocabulary, padding included; returns (n, n_kept) float32.
        """
        p = logits.softmax(-1)
        kept, removed, first = (index.to(logits.device) for index in (self.kept, *self._firsts))
        probabilities = p.index_select(1, kept).index_add_(1, first, p.index_select(1, removed))
        return probabilities.clamp_min_(torch.finfo(probabilities.dtype).tiny).log_()

    @cached_property
    def _firsts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Removed tokens and the token that each one's spelling begins with."""
        kept = set(self.kept.tolist())
        pairs = [(old, parts[0]) for old, parts in self.spellings.items() if parts and old not in kept]
        both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        return both[:, 0], both[:, 1]


def respelling(tokenizer: Any, smaller: Any) -> Respelling:
    """How a tokenizer that lost tokens spells them.

    Raises InputError: it knows tokens that the other does not, or leaves ids out.
    """
    olds, news = tokenizer.get_vocab(), smaller.get_vocab()
    strange = next((token for token in news if token not in olds), None)
    if strange is not None or max(news.values()) != len(news) - 1:
        raise InputError(
            f"one vocabulary ({len(news)} tokens) is no part of the other ({len(olds)} tokens)",
            field="vocabulary",
            value=strange,
        )
    merging = smaller.backend_tokenizer.model
    spellings = {
        old: (news[token],) if token in news else tuple(part.id for part in merging.tokenize(token))
        for token, old in olds.items()
    }
    return Respelling(torch.tensor([olds[token] for token in sorted(news, key=news.__getitem__)]), spellings)
