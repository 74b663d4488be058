"""Text that others wrote is shown as it is and does nothing."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_bench.presentation.markup import (
    Markdown,
    escape_cell,
    escape_markdown,
    finalize_markdown,
    printable,
    visible,
)


@given(st.text())
def test_nothing_hidden_is_left(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode()


def test_escapes() -> None:
    assert visible("a\x1b[31m\u202eb\tc\r\nd") == "a\\x1b[31m\\u202eb c d"
    assert escape_markdown("Q4_0 <b> [a](b) `c` *d*") == "Q4_0 \\<b\\> \\[a\\](b) \\`c\\` \\*d\\*"
    assert escape_cell("a|b\\|c") == "a\\|b\\\\\\|c"


def test_no_property_asserts_on_time() -> None:
    assert settings().deadline is None


def test_what_is_printed_moves_no_cursor_and_json_stays_json() -> None:
    hostile = "a\x1b[31m\u202eb\x9bc\u2028d\x7f\r\ud800"
    shown = printable(f"{hostile}\tx\ny")
    assert shown == "a\\u001b[31m\\u202eb\\u009bc\\u2028d\\u007f\\r\\ud800\tx\ny"
    assert json.loads(printable(json.dumps({"a": hostile}, ensure_ascii=False))) == {"a": hostile}
    assert printable("naïve 你好 👩‍🚀") == "naïve 你好 👩‍🚀"


def test_markdown_in_cells_and_templates_is_escaped_once() -> None:
    assert escape_cell("<img>|") == "\\<img\\>\\|"
    assert escape_cell(Markdown("**a**|")) == "**a**\\|"
    assert finalize_markdown("[a](b)") == "\\[a\\](b)"
    assert finalize_markdown(Markdown("[a](b)")) == "[a](b)"
    assert finalize_markdown(3) == 3
