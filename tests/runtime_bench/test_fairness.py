"""The verdict on a row's conditions, and that rows which were not fair are shown and ranked nowhere."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime_bench import worker
from runtime_bench.engines import SessionSettings
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.record_table import format_table
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import compare_records
from runtime_bench.records.fairness import (
    DISTURBED,
    FAIR,
    NOT_KNOWN,
    THROTTLED,
    fairness,
    has_speed,
    noise,
    note_of,
)
from runtime_bench.records.jsonl import record_from_json, record_to_json
from runtime_bench.records.reported import Conditions, Contention, unknown_conditions
from runtime_bench.worker import WorkerRequest
from runtime_bench.workload import BenchSettings, Workload

AT = (0.0, 0.5, 1.0, 1.5, 2.0)
SPANS = ((0.6, 1.6),)
QUIET = Conditions(AT, SPANS, caps=(1.0,) * 5, charging=(False,) * 5, screen_on=(False,) * 5)


@pytest.fixture
def row(make_record: Any) -> Callable[..., BenchRecord]:
    """Factory of a row of five processes with a sample of a second each; `third` changes the third's conditions."""

    def make(third: dict[str, Any] | None = None, base: Conditions = QUIET, **fields: Any) -> BenchRecord:
        conditions = [base] * 5
        conditions[2] = replace(base, **(third or {}))
        record: BenchRecord = make_record(
            **({"samples_ns": (10**9,) * 5, "conditions": tuple(conditions)} | fields)
        )
        return record

    return make


def test_what_was_quiet_is_fair(row: Callable[..., BenchRecord]) -> None:
    assert fairness(row()).text == FAIR
    assert noise(row()) is None


@pytest.mark.parametrize(
    ("third", "verdict", "from_s", "reason"),
    [
        ({"caps": (1.0, 1.0, 0.9, 0.6, 0.5)}, THROTTLED, 1.5, "clocks were capped at 50% of the highest"),
        ({"thermal_status": (0, None, 0, 2, None)}, THROTTLED, 1.5, "the system's thermal status was 2"),
        ({"held_share": (None, 0.0, 0.3, 0.4, 0.0)}, THROTTLED, 1.0, "held it for up to 40% of the time"),
        ({"charging": (False, False, False, True, True)}, DISTURBED, 1.5, "power from outside came or went"),
        ({"screen_on": (False, False, True, True, True)}, DISTURBED, 1.0, "the screen went on or off"),
        ({"low_power": (None, None, True, None, None)}, DISTURBED, 1.0, "the system saved power"),
        ({"samples_s": ((0.6, 2.6),)}, DISTURBED, 0.6, "a clock went wrong"),
    ],
)
def test_what_happens_while_samples_are_timed(
    row: Callable[..., BenchRecord], third: dict[str, Any], verdict: str, from_s: float, reason: str
) -> None:
    found = fairness(row(third))
    assert (found.verdict, found.process, found.from_s) == (verdict, 3, from_s)
    assert reason in str(found.reason)
    assert not has_speed(row(third))


def test_what_happens_before_and_after_samples_does_not_count(row: Callable[..., BenchRecord]) -> None:
    late = {"at_s": (*AT, 2.5, 3.0), "caps": (*(1.0,) * 5, 0.5, 0.5), "charging": (), "screen_on": ()}
    assert fairness(row(late)).verdict == FAIR


def test_a_state_that_stays_disturbs_nothing(row: Callable[..., BenchRecord]) -> None:
    plugged = replace(QUIET, charging=(True,) * 5, screen_on=(True,) * 5)
    assert fairness(row(base=plugged)).verdict == FAIR


def test_a_state_that_changes_between_processes_disturbs(row: Callable[..., BenchRecord]) -> None:
    found = fairness(row({"charging": (True,) * 5}))
    assert (found.verdict, found.process) == (DISTURBED, 3)


PINNED = replace(QUIET, caps=(0.6,) * 5)
SHORT = replace(PINNED, samples_s=())


def test_pinned_clocks_favour_nobody(row: Callable[..., BenchRecord]) -> None:
    pinned = [row(base=PINNED), row(base=SHORT, samples_ns=(8 * 10**8,) * 5)]
    for record in pinned:
        assert fairness(record).verdict == FAIR
        assert has_speed(record)
        assert note_of(record) == "clocks were capped at 60% of the highest all the time"
    found = compare_records(*pinned)
    assert (found.verdict, found.ratio) == ("faster", 1.25)
    assert note_of(row()) is None


@pytest.mark.parametrize("caps", [(1.0,) * 5, (0.8,) * 5, (0.45,) * 5])
def test_a_cap_that_changes_does(row: Callable[..., BenchRecord], caps: tuple[float, ...]) -> None:
    assert fairness(row({"caps": caps}, base=PINNED)).verdict == THROTTLED


def test_rows_of_different_caps_are_not_compared(row: Callable[..., BenchRecord]) -> None:
    free, pinned = row(n_threads=2), row(base=SHORT, n_threads=2, samples_ns=(5 * 10**8,) * 5)
    for pair in ((free, pinned), (pinned, free)):
        found = compare_records(*pair)
        assert (found.verdict, found.ratio) == ("too noisy to tell", None)
        assert found.reason == "one ran with clocks capped at 60% of the highest, another at 100%"
    of_two = [replace(free, session="a", anchor_sha256="0"), replace(pinned, session="b", anchor_sha256="0")]
    beside = [replace(record, model_filename="anchor.gguf", is_anchor=True) for record in of_two]
    assert compare_records(*of_two, anchors=beside).verdict == "no difference"
    fast = replace(beside[0], session="b")
    assert compare_records(*of_two, anchors=[beside[0], fast]).ratio is None


HIDDEN = replace(unknown_conditions("no file shows it"), at_s=AT, samples_s=SPANS)


def test_a_thread_that_something_stopped(row: Callable[..., BenchRecord]) -> None:
    held = (0, 0, 0, 300_000_000, 0)
    found = fairness(row(base=HIDDEN, held_samples_ns=held))
    assert (found.verdict, found.process, found.from_s) == (THROTTLED, 4, 0.6)
    assert "30% of a sample" in str(found.reason)
    stolen = (Contention(0.0, 0.25),) * 5
    assert fairness(row(base=HIDDEN, held_samples_ns=held, contention=stolen)).verdict != THROTTLED
    disk = (0, 0, 0, None, 0)
    assert fairness(row(base=HIDDEN, held_samples_ns=disk)).verdict == FAIR
    hiccup = (0, 0, 0, 4_000_000, 0)
    assert fairness(row(base=HIDDEN, held_samples_ns=hiccup, samples_ns=(10**7,) * 5)).verdict != THROTTLED


def test_a_thread_that_waits_for_another_chip_is_not_stopped(row: Callable[..., BenchRecord]) -> None:
    waits = {
        "base": replace(QUIET, samples_s=()),
        "n_threads": 1,
        "samples_ns": (10**8,) * 5,
        "cpu_samples_ns": (10**7,) * 5,
        "held_samples_ns": (9 * 10**7,) * 5,
    }
    elsewhere = row(backends="Vulkan0", **waits)
    assert fairness(elsewhere).verdict == FAIR
    assert compare_records(elsewhere, elsewhere).basis == "wall"
    for processor in ("CPU", None):
        assert fairness(row(backends=processor, **waits)).verdict == THROTTLED


def test_where_nothing_tells_what_threads_waited_nothing_tells_what_stopped_them(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(worker, "waited_ns", lambda: None)
    workload = Workload("tg", n_gen=4)
    request = WorkerRequest(
        str(tiny_gguf()), "llama.cpp", workload, SessionSettings(16, 1, 16, 16), samples=2
    )
    result = worker.measure(request)
    assert len(result.samples_ns) == 2
    assert (result.waited_ns, result.held_ns) == ([], [])


def test_samples_that_fall_behind_where_nothing_shows_the_clocks(row: Callable[..., BenchRecord]) -> None:
    slower = {"samples_ns": (10**9, 10**9, 14 * 10**8, 15 * 10**8, 14 * 10**8), "held_samples_ns": (0,) * 5}
    spans = {"base": replace(HIDDEN, samples_s=())}
    found = fairness(row(**spans, **slower))
    assert (found.verdict, found.process) == (THROTTLED, 3)
    assert "1.40 times as long" in str(found.reason)
    shown = replace(QUIET, samples_s=())
    assert fairness(row(base=shown, **slower)).verdict == FAIR
    waited = (0, 0, 8 * 10**8, 10**9, 8 * 10**8)
    assert fairness(row(**spans, **slower, waited_samples_ns=waited)).verdict != THROTTLED


def test_records_that_contradict_themselves_are_read_all_the_same(row: Callable[..., BenchRecord]) -> None:
    strange = Conditions((3.0, 1.0), ((9.0, 1.0),), caps=(1.0,), held_share=(0.0,) * 9)
    for samples in ((1, 1, 5, 5, 5), (10**9,) * 5):
        for waited in ((), (10**12,) * 5, (7,)):
            record = row(
                base=strange, samples_ns=samples, waited_samples_ns=waited, held_samples_ns=(10**12,)
            )
            assert record_to_json(record)["fairness"]["verdict"]


def test_other_programs_disturb_and_processor_time_is_the_remedy(row: Callable[..., BenchRecord]) -> None:
    crowded = row(n_threads=1, cpu_samples_ns=(5 * 10**8,) * 5)
    assert fairness(crowded).verdict == DISTURBED
    assert "other programs took 50%" in str(fairness(crowded).reason)
    assert has_speed(crowded)
    assert noise(crowded) is not None
    assert noise(crowded, wall=False) is None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"conditions": ()}, "nobody looked"),
        ({"conditions": (QUIET, None, QUIET, QUIET, QUIET)}, "nobody looked"),
        ({"conditions": (unknown_conditions("no /proc"),) * 5}, "no /proc"),
        ({"conditions": (HIDDEN,) * 5}, "no file shows it, and nothing tells"),
        (
            {
                "conditions": (HIDDEN,) * 3,
                "samples_ns": (10**9,) * 3,
                "sequence": (0, 1, 2),
                "held_samples_ns": (0,) * 3,
            },
            "no file shows it, and 3 samples are too few",
        ),
    ],
)
def test_what_nobody_saw_is_not_known(
    row: Callable[..., BenchRecord], fields: dict[str, Any], why: str
) -> None:
    found = fairness(row(**({"base": replace(QUIET, samples_s=())} | fields)))
    assert found.verdict == NOT_KNOWN
    assert why in str(found.reason)


def test_throttled_rows_are_shown_and_not_ranked(row: Callable[..., BenchRecord]) -> None:
    slow = {"caps": (0.5,) * 5}
    fair, throttled = row(n_threads=2), row(slow, n_threads=4, samples_ns=(5 * 10**8,) * 5)
    table = format_table([fair, throttled])
    assert "256.00" in table
    assert "throttled from second 0.5 of process 3" in table
    assert "clocks were capped at 50% of the highest" in table
    for pair in ((row(), row(slow)), (row(slow), row())):
        found = compare_records(*pair)
        assert (found.verdict, found.ratio, found.low, found.high) == ("too noisy to tell", None, None, None)
        assert "capped at 50%" in str(found.reason)


def test_the_record_keeps_conditions_and_verdict(row: Callable[..., BenchRecord]) -> None:
    record = row({"caps": (None, 0.5, 0.5, 0.5, 0.5)})
    payload = record_to_json(record)
    assert payload["fairness"] == {
        "verdict": "throttled",
        "reason": "clocks were capped at 50% of the highest",
        "process": 3,
        "from_s": 0.5,
    }
    assert record_from_json(payload, where="here") == record
    assert str(note_of(record)).startswith("throttled from second 0.5 of process 3")


SETTINGS = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(400,), ttft=(), load=False, repetitions=1, n_threads=(1,),
    samples_per_process=1, spread_limit=1e9,
)  # fmt: skip


@contextlib.contextmanager
def stopping(share: float) -> Iterator[None]:
    """Stop every process that measures here for a share of the time, as cpulimit does, from its first second on."""
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.02):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error, OSError):
                    if "runtime_bench.worker" in " ".join(child.cmdline()):
                        child.send_signal(signal.SIGSTOP)
                        time.sleep(0.02 * share / (1 - share))
                        child.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="waiting for a core is told by Linux alone")
def test_a_run_that_is_stopped_again_and_again_is_throttled(tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    path = tiny_gguf(hidden_size=256, head_dim=64)
    with stopping(0.8):  # a busy machine stops its process later than it should
        (record,) = run_bench([path], SETTINGS)
    assert record.ok
    found = fairness(record)
    assert found.verdict == THROTTLED
    assert "something stopped it" in str(found.reason)
    assert found.process == 1
    assert len(record.conditions) == len(record.held_samples_ns) == 1
