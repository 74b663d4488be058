"""Tables (Markdown, CSV, plain objects for JSON), and text from files and models made safe to show in them.

What a terminal or a Markdown reader would act upon is escaped.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

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


NOTHING = "-"
"""Shown for what is not known."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet compute a cell."""

Row = TypeVar("Row")
Cell = TypeVar("Cell")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column."""

    title: str  # Its heading, and its key in CSV and JSON
    cell: Callable[[Row], Any]  # Makes the cell of a row; None is what is not known
    right: bool = False  # Whether its cells are right-aligned, as numbers are


@dataclass(frozen=True)
class Table(Generic[Row]):
    """Rows of anything, and the columns that show them."""

    columns: Sequence[Column[Row]]
    rows: Sequence[Row]

    def markdown(self) -> str:
        """Aligned columns and a final newline; cells show their text as it is. Empty without rows."""
        if not self.rows:
            return ""
        shown = [[NOTHING if cell is None else str(cell) for cell in row] for row in self.cells()]
        cells = [list(map(escape_cell, row)) for row in shown]
        right = [index for index, column in enumerate(self.columns) if column.right]
        return lay_out_table([escape_cell(column.title) for column in self.columns], cells, right)

    def cells(self) -> list[list[Any]]:
        """Each row's cells in the order of the columns."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def csv(self) -> str:
        """A line a row: lists as JSON, unknown values empty, text never a formula. Empty without columns."""
        if not self.columns:
            return ""

        def safe(value: Any) -> Any:
            if isinstance(value, list | tuple | dict):
                return json.dumps(value, ensure_ascii=False)
            return (
                visible("'" + value if value[:1] in _FORMULA else value) if isinstance(value, str) else value
            )

        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([column.title for column in self.columns])
        writer.writerows([safe(cell) for cell in row] for row in self.cells())
        return stream.getvalue()

    def objects(self) -> list[dict[str, Any]]:
        """Each row's cells by the titles of their columns, as JSON has them."""
        return [{column.title: column.cell(row) for column in self.columns} for row in self.rows]


def table_of_cells(
    header: Sequence[str], rows: Sequence[Sequence[Cell]], words: int = 1
) -> Table[Sequence[Cell]]:
    """A table of ready cells; the columns after the first `words` are right-aligned."""
    return Table([Column(title, itemgetter(i), i >= words) for i, title in enumerate(header)], rows)


def table_of(rows: Sequence[Mapping[str, Any]], right: Iterable[str] = ()) -> Table[Mapping[str, Any]]:
    """A table of mappings with the same keys; those in `right` are right-aligned."""
    numbers = frozenset(right)
    return Table([Column(key, itemgetter(key), key in numbers) for key in (rows[0] if rows else ())], rows)


def indented_json(payload: Any) -> str:
    """A JSON document for people, with a final newline."""
    return json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def short_names(files: Iterable[str]) -> dict[str, str]:
    """Each file's name, with as many of its folders as it takes to tell the files apart."""
    parts = {file: Path(file).parts for file in files}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {file: str(Path(*path[-depth:])) for file, path in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {file: file for file in parts}
