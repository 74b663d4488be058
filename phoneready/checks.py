"""One line of what `doctor` says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the examination.

    Attributes:
        name: What was looked at.
        state: `ok`, `warning`, `missing` (an optional part) or `failed` (nothing works without it).
        found: What was found.
        hint: What to do about it.
    """

    name: str
    state: str
    found: str
    hint: str = ""
