"""Targets as `bench --on` names them."""

from __future__ import annotations

import pytest

from cfsp.errors import InputError
from runtime_bench.targets.table import (
    TARGETS,
    TargetOptions,
    check_target,
    open_target,
    parse_target,
    target_slug,
)


@pytest.mark.parametrize(
    "on", ["", "phone", "local:here", "native:", ":", "ssh", "ssh:", "constrained:1G,,2"]
)
def test_what_is_no_target_is_refused_with_those_there_are(on: str) -> None:
    with pytest.raises(InputError, match="unknown target") as caught:
        open_target(on)
    assert all(row.form in str(caught.value) for row in TARGETS.values())


@pytest.mark.parametrize(
    ("on", "why"),
    [
        ("qemu-aarch64:cores=0", "unknown target"),
        ("native:cores=0", r"cores=0: not for this target.*allowed: runner="),
        ("ssh:x,400M", "400M: not for this target"),
        ("constrained:cores=a", "cores=a: not core numbers"),
        ("constrained:nokia-3310", "no profile of this name"),
        ("browser:score=fast", "score=fast"),
        ("adb:x,folder=here", "not an absolute path"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_opened(on: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        check_target(on)


def test_options_follow_the_address() -> None:
    assert parse_target("constrained:400M,cores=0+1")[2] == TargetOptions(memory=400 * 2**20, cores=(0, 1))
    assert parse_target("browser:pixel-8a,score=900")[2] == TargetOptions(device="pixel-8a", score=900.0)
    row, address, options = parse_target("ssh:me@board:22,folder=/x y,retries=0")
    assert (row.form, address, options) == (
        "ssh:HOST",
        "me@board:22",
        TargetOptions(folder="/x y", retries=0),
    )
    assert target_slug("constrained:400M,cores=0+1") == "constrained-400M-cores-0-1"
