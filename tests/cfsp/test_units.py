"""Sizes and times as people write them."""

from __future__ import annotations

import pytest

from cfsp.errors import InputError
from cfsp.units import parse_bytes, parse_ms


@pytest.mark.parametrize(
    ("text", "count"), [("400M", 400 * 2**20), ("80 MB", 80_000_000), ("1.5 GiB", 3 * 2**29)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text, "--memory") == count


@pytest.mark.parametrize("text", ["", "-1M", "1e9", "much", "9" * 400, "1." + "9" * 400, "1 parsec"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        parse_bytes(text, "--memory")
    with pytest.raises(InputError, match="ttft"):
        parse_ms(f"{text} s", "ttft")
