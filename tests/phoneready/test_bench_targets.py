"""Targets as `bench --on` names them."""

from __future__ import annotations

import os

import pytest

from cfsp.errors import InputError
from runtime_bench.targets.table import TARGETS, TargetOptions, open_targets


@pytest.mark.parametrize("on", ["", "phone", "local:here", "native:", ":"])
def test_what_is_no_target_is_refused_with_those_there_are(on: str) -> None:
    with pytest.raises(InputError, match="unknown target") as caught:
        open_targets([on], TargetOptions())
    assert all(row.form in str(caught.value) for row in TARGETS.values())


@pytest.mark.parametrize("on", ["local", "native", "qemu-aarch64"])
def test_limits_are_for_targets_that_take_them(on: str) -> None:
    with pytest.raises(InputError, match=r"--cores: not for this target.*--on constrained"):
        open_targets([on], TargetOptions(cores=(0,)))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are pinned on Linux alone")
def test_a_constrained_target_has_its_limits() -> None:
    core = min(os.sched_getaffinity(0))
    (target,) = open_targets(["constrained"], TargetOptions(cores=(core,)))
    assert (target.name, target.memory_limit_bytes) == (f"constrained(cores={core})", None)
