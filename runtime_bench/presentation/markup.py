"""Text from files and models, made safe to show: what a terminal or a Markdown reader would act upon is escaped."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

_ACTIVE = re.compile(r"([\\`*\[\]<>])")
"""What begins code, emphasis, a link, an image or HTML; an underscore inside a word, as in Q4_0, begins nothing."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control, format (direction marks among them) and surrogate characters, and separators of lines."""


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
    return escape_markdown(text).replace("|", "\\|")


def lay_out_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """A Markdown table with aligned columns and a final newline.

    Args:
        header: Names of the columns.
        rows: Cells, escaped already.
        right: Indices of the columns that are right-aligned.
    """
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
