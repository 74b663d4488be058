"""A process begins when its machine is nominal, and a row for which it never is fails in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runtime_bench.measuring import nominal
from runtime_bench.measuring.measure import run_bench
from runtime_bench.measuring.nominal import lacking, wait_nominal
from runtime_bench.records.reported import Conditions, unknown_conditions
from runtime_bench.targets import Local
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings

SETTINGS = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(4,), ttft=(), load=False, repetitions=2, n_threads=(1,),
    wait_nominal_s=60.0, spread_limit=1e9,
)  # fmt: skip
COOL = Conditions((0.0,), caps=(1.0,), hottest_c=(30.0,), thermal_status=(0,), charging=(True,))


class Device(Local):
    """This machine, with the looks of another one; keeps in which order it was looked at and used."""

    def __init__(self, looks: Iterator[Conditions]) -> None:
        self.looks, self.order = looks, [""]

    def conditions(self) -> Conditions:
        self.order.append("look")
        return next(self.looks)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        self.order.append("run")
        return super().run(request, timeout_s)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"caps": (1.0, 0.6)}, "clocks are capped at 60%"),
        ({"caps": (0.6, 0.9)}, None),
        ({"hottest_c": (52.25,)}, "a thermal zone has 52.2 °C, above 45"),
        ({"thermal_status": (2, None)}, "the system's thermal status is 2"),
        (
            {"hottest_c": (60.0,), "thermal_status": (1,)},
            "60.0 °C, above 45, the system's thermal status is 1",
        ),
    ],
)
def test_what_is_not_nominal(change: dict[str, tuple[float | None, ...]], why: str | None) -> None:
    found = lacking(replace(COOL, **change), SETTINGS)  # type: ignore[arg-type]
    assert found == why or (why is not None and str(found).endswith(why))


def test_power_counts_where_it_is_asked_for() -> None:
    assert lacking(COOL, replace(SETTINGS, unplugged=True)) == "power comes from outside"
    assert lacking(replace(COOL, charging=(False,)), replace(SETTINGS, unplugged=True)) is None


def test_what_a_machine_does_not_tell_is_not_waited_for() -> None:
    hidden, settings = unknown_conditions("it hides all"), replace(SETTINGS, unplugged=True)
    assert lacking(hidden, settings) is None
    assert wait_nominal(Device(iter([hidden])), settings) is None


def test_a_process_begins_when_its_machine_is_nominal(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(nominal, "_POLL_S", 0.01)
    hot = replace(COOL, caps=(0.5,))
    device = Device(iter([hot, hot, COOL, COOL]))
    with caplog.at_level(logging.WARNING):
        (record,) = run_bench([tiny_gguf()], SETTINGS, target=device)
    assert record.ok
    assert device.order[1:] == ["look", "look", "look", "run", "look", "run"]
    assert caplog.messages == ["local: waiting until it is nominal: clocks are capped at 50%"]


def test_a_row_whose_machine_never_is_nominal_fails(tiny_gguf: Callable[..., Path]) -> None:
    hot = replace(COOL, caps=(0.5,))
    device = Device(iter([hot] * 100))
    (record,) = run_bench([tiny_gguf()], replace(SETTINGS, wait_nominal_s=0.05), target=device)
    assert (record.status, record.failure) == (
        "failed",
        "not nominal after 0.05 s: clocks are capped at 50%",
    )
    assert "run" not in device.order
