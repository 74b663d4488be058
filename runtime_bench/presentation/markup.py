"""Text from files and models, made safe to show: what a terminal or a Markdown reader would act upon is escaped."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

_ACTIVE = re.compile(r"([\\`*\[\]<>])")
"""What begins code, emphasis, a link, an image or HTML; an underscore inside a word, as in Q4_0, begins nothing."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control, format (direction marks among them) and surrogate characters, and separators of lines."""

_TERMINAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal acts upon, or shows text in another order for, but for tabs and line breaks."""


class Markdown(str):
    """Text that is Markdown already: in tables and templates it stays as it is."""

    __slots__ = ()


def printable(text: str) -> str:
    """Lines that a terminal only shows: escape codes and the like as JSON has them, so that JSON stays JSON."""
    return _TERMINAL.sub(lambda match: json.dumps(match[0])[1:-1], text)


def visible(text: str) -> str:
    """`text` on one line, with every character that would not be seen, or would move the cursor, as its escape."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _HIDDEN else c
        for c in re.sub(r"[\t\n\r]+", " ", text)
    )


def escape_markdown(text: str) -> str:
    """`text` as Markdown that shows it as it is."""
    return visible(_ACTIVE.sub(r"\\\1", text))


def escape_cell(text: str) -> str:
    """`text` as a cell of a Markdown table."""
    return (text if isinstance(text, Markdown) else escape_markdown(text)).replace("|", "\\|")


def finalize_markdown(value: Any) -> Any:
    """For templates of Markdown: each text that is put into them is shown as it is."""
    return escape_markdown(value) if isinstance(value, str) and not isinstance(value, Markdown) else value


def lay_out_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """A Markdown table with aligned columns and a final newline."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = ("-" * (width + 1) + ":" if i in right else "-" * (width + 2) for i, width in enumerate(widths))
    head, *body = (
        "| "
        + " | ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in (header, *rows)
    )
    return "\n".join([head, f"|{'|'.join(rule)}|", *body]) + "\n"
