"""Settings that are declared once, sizes and times as people write them, and what errors tell of a login: nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pydantic
import pytest

from cfsp.errors import InputError, without_credentials
from cfsp.settings import SEED, Reads, Settings, as_read, check_settings, declared, pick, setting
from cfsp.units import parse_bytes, parse_ms


@dataclass(frozen=True)
class Small(Settings):
    rank: int = setting(4, "Rank.", ge=1, le=64)
    ratio: float = setting(0.5, "Share.", ge=0, lt=1)
    name: str = setting("a", "Name.", choices=("a", "b"))
    sizes: tuple[int, ...] = setting((1,), "Sizes.", ge=0, least=1)
    limit: int | None = setting(None, "Most.", ge=1)
    seed: int = setting(0, SEED)
    internal: int = 7


@dataclass(frozen=True)
class Larger(Small):
    ratio: float = setting(0.9, "Another share.", gt=0)
    more: bool = setting(False, "More.")


def test_declarations_are_found_with_what_a_subclass_changes() -> None:
    assert [row.name for row in declared(Small)] == ["rank", "ratio", "name", "sizes", "limit", "seed"]
    (ratio,) = (row for row in declared(Larger) if row.name == "ratio")
    assert (ratio.default, ratio.kind, ratio.setting.help) == (0.9, float, "Another share.")
    assert pick(Small, Larger(rank=3), seed=5) == Small(rank=3, ratio=0.9, seed=5)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"rank": 0}, r"rank: out of range \(got 0\); allowed: 1 to 64"),
        ({"rank": 10**30}, "rank: out of range"),
        ({"ratio": 1.0}, "ratio: out of range .*0 or more and below 1"),
        ({"ratio": float("nan")}, "ratio: out of range"),
        ({"name": "c"}, r"name: unknown \(got 'c'\); allowed: a, b"),
        ({"sizes": ()}, "sizes: empty"),
        ({"sizes": (1, 2**40)}, "sizes: out of range"),
        ({"limit": 0}, "limit: out of range"),
        ({"seed": 2**63}, "seed: out of range .*0 to 4294967292"),
        ({"seed": None}, "seed: not set"),
        ({"rank": 0, "name": "c"}, "rank: .*; name: unknown"),
    ],
)
def test_what_cannot_be_used_is_named_in_python_and_by_pydantic(change: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InputError, match=f"^{wrong}"):
        check_settings(Small(**change))
    with pytest.raises(pydantic.ValidationError) as caught:
        pydantic.TypeAdapter(Small).validate_python(change)
    assert {error["loc"][0] for error in caught.value.errors()} == set(change)


READS: Reads = {
    "name": (lambda asked, few: few, "without few"),
    "rank": (lambda asked, few: asked.name == "b", "without --name b"),
}


def test_what_nothing_reads_has_its_default_and_a_warning() -> None:
    read, warnings = as_read(Small(rank=8, name="b", ratio=0.1), READS, False)
    assert read == Small(ratio=0.1)
    assert warnings == ("--name has no effect without few", "--rank has no effect without --name b")
    assert as_read(Small(rank=8), READS, False, section="small")[1] == (
        "small.rank has no effect without --name b",
    )
    assert as_read(Small(rank=8, name="b"), READS, True) == (Small(rank=8, name="b"), ())
    assert as_read(Small(rank=4), READS, False) == (Small(), ())


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


@pytest.mark.parametrize(
    ("text", "count"),
    [("400M", 400 * 2**20), ("80 MB", 80_000_000), ("1.5 GiB", 3 * 2**29), ("75B", 75), ("1000000", 10**6)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text, "--memory") == count


@pytest.mark.parametrize("text", ["", "-1M", "1e9", "much", "9" * 400, "1." + "9" * 400, "1 parsec"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        parse_bytes(text, "--memory")
    with pytest.raises(InputError, match="ttft"):
        parse_ms(f"{text} s", "ttft")


def test_a_small_size_needs_a_unit() -> None:
    with pytest.raises(InputError, match=r"--max-size: a size without a unit .*allowed: 75MB, or 75B"):
        parse_bytes("75", "--max-size")
