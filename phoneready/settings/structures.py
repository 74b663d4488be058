"""What goes of a model beside FFN channels: one row an axis, for all that says or searches it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import NonNegativeInt

from cfsp.settings import Settings, setting
from cfsp.validation import Share


@dataclass(frozen=True, kw_only=True)
class Structures:
    """What goes, as in `cfsp.pruning.settings.PruneSettings`; 0: nothing of it.

    Attributes:
        vocabulary: Tokens that are kept; 0: all.
        blocks: Whole blocks that go.
        attentions: Attentions that go, of blocks that stay.
        kv_groups: Share of key-value groups that go, of attentions that stay.
    """

    vocabulary: NonNegativeInt = 0
    blocks: NonNegativeInt = 0
    attentions: NonNegativeInt = 0
    kv_groups: Share = 0.0

    @staticmethod
    def of(one: Any) -> Structures:
        """Those of anything that has fields of these names."""
        return Structures(**{name: getattr(one, name) for name in STRUCTURES})

    @property
    def plain(self) -> dict[str, Any]:
        """By name."""
        return {name: getattr(self, name) for name in STRUCTURES}

    @property
    def is_whole(self) -> bool:
        """Whether nothing of any goes."""
        return not any(self.plain.values())

    @property
    def in_names(self) -> str:
        """For names of files; empty where nothing goes."""
        return "".join(row.in_names(self.plain[name]) for name, row in STRUCTURES.items() if self.plain[name])

    @property
    def words(self) -> list[str]:
        """For people, a part for each that goes."""
        return [row.words(self.plain[name]) for name, row in STRUCTURES.items() if self.plain[name]]


class _Row(NamedTuple):
    """How an amount is said.

    Attributes:
        searched: The setting that lists several.
        in_names: For names of files.
        words: For people.
    """

    searched: str
    in_names: Callable[[Any], str]
    words: Callable[[Any], str]


STRUCTURES: Mapping[str, _Row] = MappingProxyType(
    {
        "vocabulary": _Row("vocabularies", "-{}tokens".format, "{} tokens".format),
        "blocks": _Row("blocks", "-minus{}blocks".format, "-{} blocks".format),
        "attentions": _Row("attentions", "-minus{}attentions".format, "-{} attentions".format),
        "kv_groups": _Row(
            "kv_groups", "-minus{}ofkvgroups".format, lambda share: f"KV groups -{100 * share:g} %"
        ),
    }
)
"""Field of `Structures` -> how it is said."""


@dataclass(frozen=True)
class SearchedStructures(Settings):
    """Several of each, of which each goes with each; what is empty is as it is elsewhere."""

    vocabularies: tuple[int, ...] = setting(
        (),
        "Tokens to keep, each with everything else; 0: all.",
        ge=0,
        le=2**24,
        metavar="N,...",
        shown="not varied",
    )
    blocks: tuple[int, ...] = setting(
        (),
        "Whole blocks to remove, each with everything else.",
        ge=0,
        le=512,
        metavar="N,...",
        shown="not varied",
    )
    attentions: tuple[int, ...] = setting(
        (),
        "Attentions to remove from blocks that stay, each with everything else.",
        ge=0,
        le=512,
        metavar="N,...",
        shown="not varied",
    )
    kv_groups: tuple[float, ...] = setting(
        (),
        "Shares of key-value groups to remove from attentions that stay, each with everything else.",
        ge=0,
        lt=1,
        metavar="SHARE,...",
        shown="not varied",
    )

    def choices(self, fixed: Structures) -> dict[str, list[Any]]:
        """Field of `Structures` -> its amounts, ascending; that of `fixed` where none is listed."""
        listed = {name: getattr(self, row.searched) for name, row in STRUCTURES.items()}
        return {name: sorted(set(values or (fixed.plain[name],))) for name, values in listed.items()}

    def combined(self, fixed: Structures) -> Iterator[Structures]:
        """All combinations, those of one vocabulary together: all tokens, then ever fewer.

        The model with fewer tokens, and its statistics, are there for one vocabulary at a time.
        """
        choices = self.choices(fixed)
        choices["vocabulary"].sort(key=lambda size: (size > 0, -size))
        for values in itertools.product(*choices.values()):
            yield Structures(**dict(zip(choices, values, strict=True)))
