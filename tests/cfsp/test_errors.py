"""What errors and published settings tell of a login: nothing."""

from __future__ import annotations

import pytest

from cfsp.errors import InputError, without_credentials


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://me:secret@host:5000/a@b", "https://host:5000/a@b"),
        ("https://token@host", "https://host"),
        ("postgresql://me:se/cr@et@host/runs", "postgresql://host/runs"),
        (
            "postgresql://host/runs?user=me&password=secret&a=b",
            "postgresql://host/runs?user=me&password=***&a=b",
        ),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////runs@home.db", "sqlite:////runs@home.db"),
        ("ssh:me@host", "ssh:me@host"),
        ("Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B@main"),
    ],
)
def test_urls_lose_their_login(url: str, told: str) -> None:
    assert without_credentials({"tracking": [{"mlflow": url}, 3]}) == {"tracking": [{"mlflow": told}, 3]}
    assert str(InputError(f"cannot reach {url}", value=url)) == f"cannot reach {told} (got '{told}')"
