"""Text that others wrote is shown as it is and does nothing."""

from __future__ import annotations

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_bench.presentation.markup import escape_cell, escape_markdown, visible


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
