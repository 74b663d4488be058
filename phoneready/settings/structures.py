"""What goes of a model beside FFN channels: one row an axis, for all that says or searches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import NonNegativeInt

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
        in_names: For names of files.
        words: For people.
    """

    in_names: Callable[[Any], str]
    words: Callable[[Any], str]


STRUCTURES: Mapping[str, _Row] = MappingProxyType(
    {
        "vocabulary": _Row("-{}tokens".format, "{} tokens".format),
        "blocks": _Row("-minus{}blocks".format, "-{} blocks".format),
        "attentions": _Row("-minus{}attentions".format, "-{} attentions".format),
        "kv_groups": _Row("-minus{}ofkvgroups".format, lambda share: f"KV groups -{100 * share:g} %"),
    }
)
"""Field of `Structures` -> how it is said."""
