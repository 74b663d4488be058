"""In which order the tokens of a vocabulary go, and what that costs.

Removed are leaves of the token trees alone, so that all other tokens come about as before; the cheapest first, by

    count(t) (split + max(0, sum of -ln p(part) over the parts + ln p(t)))        nats on the text counted

where p are the shares that tokens have of the text in the dense model's segmentation, and `split` is what any split
costs a model, however well known the parts are: it reads a word in a way in which it has not met it. A part that never
stands alone is one that the model has hardly ever read; where its own parts say the same for less, these are meant, as
it will be removed next. Of a script's tokens that the text does not have, those go first that merging learned last,
which is how often the tokenizer's own training text had them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cfsp.models.token_trees import TokenTrees

Counts = npt.NDArray[np.float64]
"""How often the text has every token, (tokens,)."""
_SPLIT_NATS = 6.0
"""What a split costs at the least; measured are 4 to 8 nats for each further token of a text."""
_LEFT = 0.6
"""Share of these nats that held-out texts of several kinds lose, where rows have learned to spell (spelling.py)."""
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


@dataclass(frozen=True)
class TokenOrder:
    """The order in which tokens go.

    Attributes:
        removed: Ids, the cheapest first; all that may go.
        losses: What it costs when the first 0, 1, ... of them are gone, nats a token of the counted text as the dense
            model reads it, (len(removed) + 1,).
    """

    removed: tuple[int, ...]
    losses: npt.NDArray[np.float64]


def order_tokens(trees: TokenTrees, expected: Counts, required: frozenset[int]) -> TokenOrder:
    """Take away one leaf after the other.

    Args:
        trees: What tokens are built of.
        expected: How often text has every token, of `expected_counts`.
        required: Ids that stay.
    """
    remover = _Remover(trees, expected, required)
    total = float(remover.needed.sum())
    steps = list(remover.steps())
    losses = _LEFT * np.cumsum([0.0, *(cost for _, cost in steps)]) / total
    return TokenOrder(tuple(index for index, _ in steps), losses)


def expected_counts(trees: TokenTrees, counts: Counts, scripts: Mapping[int, str]) -> Counts:
    """How often text like the counted one has every token: the counts, and a little of what is known without them.

    Tokens that a text does not have are in all about as frequent in other text of its kind as those that it has once
    (Good 1953, who names Turing): that many of each script's, so that English says nothing of Bengali. They go to its
    tokens by their ranks. A short text says little even of that: there a part of a token is expected of each, by rank.

    Args:
        trees: What tokens are built of.
        counts: How often the text has every token.
        scripts: Of every id.
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


class _Remover:
    def __init__(self, trees: TokenTrees, expected: Counts, required: frozenset[int]) -> None:
        self._trees = trees
        self._required = required
        self._users = {part: len(users) for part, users in trees.built_on.items()}
        # What a token says is what it said before any was removed; how often it is needed grows with its users' end.
        self.needed = expected.copy()
        known = np.maximum(self.needed, 1e-9 * max(float(expected.sum()), 1.0))
        self._nats = -np.log(known / known.sum())
        self._best = self._nats.copy()
        for index in sorted(trees.ranks, key=lambda token: trees.ranks[token]):
            self._best[index] = min(self._nats[index], self._parts_cost(index))

    def steps(self) -> Iterator[tuple[int, float]]:
        """Every token that may go, in the order in which they go, and the nats that its end costs."""
        queue = [self._key(index) for index in self._trees.parts if self._may_go(index)]
        heapq.heapify(queue)
        while queue:
            *key, index = heapq.heappop(queue)
            if (current := self._key(index))[0] > key[0]:
                heapq.heappush(queue, current)
                continue
            yield index, current[0]
            for part in self._trees.parts[index]:
                self.needed[part] += self.needed[index]
            for part in set(self._trees.parts[index]):
                if index in self._trees.built_on.get(part, ()):
                    self._users[part] -= 1
                    if self._may_go(part):
                        heapq.heappush(queue, self._key(part))

    def _may_go(self, index: int) -> bool:
        return index in self._trees.parts and not self._users.get(index) and index not in self._required

    def _parts_cost(self, index: int) -> float:
        return float(sum(self._best[part] for part in self._trees.parts[index]))

    def _key(self, index: int) -> tuple[float, int, int]:
        dearer = max(0.0, self._parts_cost(index) - float(self._nats[index]))
        return float(self.needed[index]) * (_SPLIT_NATS + dearer), -self._trees.ranks[index], index
