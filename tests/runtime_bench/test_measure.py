"""Rounds of fresh processes: with the real engine where it counts, else with one that answers at once."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fake_target import FakeTarget

from cfsp.errors import InputError
from exporters.family import ExportOptions
from exporters.onnx.export import export_onnx
from exporters.onnx.folder import find_graph
from runtime_bench import worker
from runtime_bench.engines import ENGINES, EngineFacts, SessionSettings
from runtime_bench.measuring import measure
from runtime_bench.measuring.measure import not_nominal, run_bench, run_matrix, shares
from runtime_bench.presentation.record_table import format_table, record_table
from runtime_bench.process import run_worker
from runtime_bench.records.fairness import note_of
from runtime_bench.records.jsonl import BOUNDS, record_from_json, record_to_json
from runtime_bench.records.reported import Conditions, unknown_conditions
from runtime_bench.targets import LOCAL
from runtime_bench.targets.local import Browser
from runtime_bench.targets.table import Unreachable
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings, Workload, workloads_of

pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[2]
QUICK = BenchSettings(
    check_text=False, n_prompt=(24,), n_gen=(8,), ttft=(16,), start=(16,), n_depth=(0, 16), repetitions=1,
    n_threads=(1,), spread_limit=1e9, timeout_s=120,
)  # fmt: skip
ONE = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(8,), ttft=(), load=False, repetitions=2, n_threads=(1,),
    spread_limit=1e9, timeout_s=120,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files that no engine opens."""
    found = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for file in found:
        file.write_text(file.name)
    return found


def request(path: Path, workload: Workload, **changes: Any) -> WorkerRequest:
    return WorkerRequest(
        str(path), changes.pop("engine", "llama.cpp"), workload, SessionSettings(64, 1, 64, 64), **changes
    )


# ---- The real engine ------------------------------------------------------------------------------------------------


def test_every_workload_is_a_record_with_every_sample(model: Path) -> None:
    records = run_bench([model], replace(QUICK, regimes=("fresh", "cold", "warm")))
    tests = ["load", "pp24", "tg8", "pp24 @ d16", "tg8 @ d16", "ttft16"]
    # A process opens its file but once, and is warm afterwards.
    cold, warm = (f"{name} @ cold" for name in (*tests, "start16")), (f"{name} @ warm" for name in tests[1:])
    assert [r.test for r in records] == [*tests, "start16", *cold, *warm]
    assert [r.failure for r in records] == [None] * len(records)
    by_test = {record.test: record for record in records}
    load, start, decode = by_test["load"], by_test["start16"], by_test["tg8"]
    assert load.samples_ns == load.load_samples_ns
    assert all(len(set(r.rounds)) == len(r.load_samples_ns) == 1 for r in records if r.regime != "warm")
    assert by_test["tg8 @ warm"].rounds == (0, 0, 0)
    assert [r.page_cache for r in (decode, start, by_test["ttft16 @ cold"])] == ["as_found", "warm", "cold"]
    assert [r.warmup for r in (decode, start, by_test["tg8 @ cold"])] == [True, False, False]
    # With the opening, and the processor's clocks of none of it.
    assert all(s > opening for s, opening in zip(start.samples_ns, start.load_samples_ns, strict=True))
    assert (start.cpu_samples_ns, start.held_samples_ns) == ((), ())
    table = format_table(records)
    assert "start16 (warm)" in table
    assert "ttft16 @ cold (" in table

    assert (decode.kind, decode.target, decode.engine) == ("measured", "local", "llama.cpp")
    assert decode.file_size_bytes == model.stat().st_size
    assert decode.model_n_params is not None
    assert decode.model_size == pytest.approx(4 * decode.model_n_params, rel=0.01)
    assert (decode.model_type[:5], decode.backends) == ("llama", "CPU")
    assert {"llama-cpp-python", "llama.cpp", "python", "phoneready"} <= set(decode.environment.versions)
    assert 0 < decode.baseline_rss_bytes <= decode.peak_rss_bytes
    assert record_from_json(record_to_json(decode), where="here") == decode


@pytest.mark.parametrize("engine", ENGINES)
def test_the_measuring_process_holds_no_torch(
    model: Path, tiny_folder: Callable[..., Path], tmp_path: Path, engine: str
) -> None:
    path = model
    if ENGINES[engine].suffix == ".onnx":
        pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
        export_onnx(tiny_folder(), tmp_path / "out", ["fp32"], ExportOptions(n_threads=1))
        path = find_graph(str(tmp_path / "out" / "fp32"), last_logits=True)
    code = (
        "import sys, json; from runtime_bench.worker import measure, request_from_json;"
        "measure(request_from_json(json.loads(sys.argv[1])));"
        "print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    payload = json.dumps(asdict(request(path, Workload("pp", n_prompt=4), engine=engine)))
    command = [sys.executable, "-c", code, payload]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_process_generates_until_the_time_is_over(model: Path) -> None:
    settings = replace(ONE, n_gen=(1,), repetitions=1, spread_limit=1.001, sustained_s=0.5)
    _, record = run_bench([model], settings)
    assert (record.failure, record.test, set(record.rounds)) == (None, "tg1 @ sustained", {0})
    assert len(record.samples_ns) == record.samples_per_process >= 1
    assert record.quarantined_ns == ()
    assert record_from_json(record_to_json(record), where="here") == record


@pytest.mark.parametrize(("asked", "found"), [(None, "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0")])
def test_a_row_states_the_cache_that_it_was_measured_with(
    tiny_gguf: Callable[..., Path], asked: str | None, found: str
) -> None:
    path = tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    (record,) = run_bench([path], replace(ONE, cache_type=asked))
    assert record.ok, record.failure
    settings = record.engine_settings
    assert (settings.cache_type, settings.flash_attention) == (found, True)
    assert record_table([record]).objects()[0]["cache"] == f"{found}, flash"


def test_what_does_not_open_or_takes_too_long_is_a_row_with_a_reason(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    seen: list[str] = []
    good, bad = run_bench([model, broken], ONE, on_record=lambda r: seen.append(r.status))
    assert seen == [good.status, bad.status] == ["ok", "failed"]
    assert "cannot load" in bad.failure
    assert (bad.samples_ns, bad.median_ts) == ((), None)
    assert bad.file_sha256 is not None
    (late,) = run_bench([model], replace(ONE, timeout_s=0.01))
    assert (late.status, "timeout" in late.failure) == ("failed", True)
    (cache,) = run_bench([model], replace(ONE, cache_type="q8_0"))
    assert "block size 32 does not divide n_embd_head_k=16" in str(cache.failure)


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "SIGKILL.*memory"),
        ("os.abort()", "SIGABRT"),
        ("os._exit(3)", "exit status 3"),
        ("os.close(1); os.open(os.devnull, os.O_WRONLY)", "no readable result"),
    ],
)
def test_a_process_that_dies_is_a_reason(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str, reason: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os\n{fate}\n")
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), known] if known else [str(tmp_path)]))
    result = run_worker(request(model, Workload("load")), 120)
    assert result.samples_ns == []
    assert re.search(reason, result.error)


# ---- Turns ----------------------------------------------------------------------------------------------------------


def test_files_and_the_anchor_take_turns(files: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    target = FakeTarget()
    file, anchor = run_bench(
        files[:1],
        replace(ONE, repetitions=3),
        lambda _, a, b: seen.append((a, b)),
        target=target,
        anchor=files[1],
    )
    assert (file.sequence, anchor.sequence) == ((0, 2, 4), (1, 3, 5))
    assert seen == [(n, 6) for n in range(1, 7)]
    assert [asked.path for asked in target.asked] == [str(path) for path in files] * 3
    assert file.session == anchor.session
    assert (file.is_anchor, anchor.is_anchor) == (False, True)
    assert file.anchor_sha256 == anchor.anchor_sha256 == anchor.file_sha256


def test_samples_of_one_process_share_its_number(files: list[Path]) -> None:
    settings = replace(ONE, load=True, repetitions=5, samples_per_process=2)
    load, generation = run_bench(files[:1], settings, target=FakeTarget())
    assert len(set(load.sequence)) == len(load.samples_ns) == 5
    assert [generation.sequence.count(n) for n in sorted(set(generation.sequence))] == [2, 2, 1]
    assert len(generation.load_samples_ns) == 3


def test_every_process_of_a_warm_row_takes_three_samples() -> None:
    warm, fresh = Workload("tg", n_gen=4, regime="warm"), Workload("tg", n_gen=4)
    for asked, taken in ((1, [3]), (5, [3, 3]), (6, [3, 3])):
        assert shares(replace(ONE, repetitions=asked), warm) == taken
    assert shares(replace(ONE, repetitions=5, samples_per_process=4), warm) == [4, 4]
    assert shares(replace(ONE, repetitions=5, samples_per_process=4), fresh) == [4, 1]


def test_a_wide_row_is_measured_once_more_with_its_partners(files: list[Path]) -> None:
    target = FakeTarget(iter([100, 100, 900, 100, 100, 100, 70, 80, 70, 80, 70, 80]))
    seen: list[tuple[int, int]] = []
    left, right = run_bench(
        files,
        replace(ONE, repetitions=3, spread_limit=1.25),
        lambda _, a, b: seen.append((a, b)),
        target=target,
    )
    assert (left.samples_ns, left.quarantined_ns) == ((70, 70, 70), (100, 900, 100))
    assert "measured once more, then within it" in note_of(left)
    assert (right.samples_ns, right.quarantined_ns) == ((80, 80, 80), (100, 100, 100))
    assert right.sequence == (7, 9, 11)
    assert seen[-1] == (12, 12)


def test_what_was_measured_before_a_failure_is_kept(files: list[Path]) -> None:
    class Flaky(FakeTarget):
        def run(self, asked: WorkerRequest, timeout_s: float) -> WorkerResult:
            result = super().run(asked, timeout_s)
            return WorkerResult(error="killed") if len(self.asked) == 2 else result

    target = Flaky()
    (record,) = run_bench(files[:1], replace(ONE, repetitions=4), target=target)
    assert (record.status, record.failure) == ("failed", "killed")
    assert (len(record.samples_ns), len(target.asked)) == (1, 2)


def test_rows_that_were_measured_before_are_not_measured_again(files: list[Path]) -> None:
    before = run_bench(files, replace(ONE, load=True), target=FakeTarget())
    again = FakeTarget(error="gone")
    # One of a pair is missing: both are measured, and the one that is there stands if that fails.
    found = run_bench(files, replace(ONE, load=True), target=again, done=before[:3])
    assert found[:3] == before[:3]
    assert (found[3].failure, len(again.asked)) == ("gone", 2)
    files[0].write_text("another file")
    changed = run_bench(files, replace(ONE, load=True), target=again, done=before)
    assert [record.ok for record in changed] == [False, True, False, True]


# ---- What is asked for, and what comes of it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "answer", "failure"),
    [
        ({"cache_type": "q8_0"}, {}, "a cache of q8_0 was asked for, and llama.cpp had one that it does not name"),
        ({"sustained_s": 600.0}, {"lasted_ns": None}, "what measures there takes samples by number"),
        ({"sustained_s": 600.0}, {"lasted_ns": 1}, "2 samples, which are all that a record holds, took 0.0 of"),
    ],
)  # fmt: skip
def test_what_an_engine_did_not_heed_has_no_speed(
    files: list[Path], settings: dict[str, Any], answer: dict[str, Any], failure: str
) -> None:
    target = FakeTarget(**({"samples_ns": [10, 10], "facts": EngineFacts("toy")} | answer))
    record = run_bench(files[:1], replace(ONE, **settings), target=target)[-1]
    assert not record.ok
    assert record.failure.startswith(failure)


def test_no_more_samples_are_taken_than_a_record_holds(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MOST_SAMPLES", 3)
    assert len(worker.measure(request(model, Workload("tg", n_gen=1), seconds=600.0)).samples_ns) == 3
    for name in ("repetitions", "samples_per_process"):
        BenchSettings(**{name: BOUNDS.items})  # type: ignore[arg-type]
        with pytest.raises(InputError, match=name.replace("_", ".")):
            BenchSettings(**{name: BOUNDS.items + 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({}, {"files": []}, "no file to measure"),
        ({}, {"files": [Path("absent.gguf")]}, r"no such file: absent\.gguf"),
        ({}, {"anchor": "a.gguf"}, "--set anchor: is measured already"),
        ({}, {"anchor": "nowhere.gguf"}, "no such file"),
        ({}, {"engine": "magic", "target": LOCAL}, r"unknown engine .*llama\.cpp"),
        ({"n_gen": ()}, {}, "nothing to measure"),
        ({"sustained_s": 9.0}, {"target": Browser()}, "--sustained: browser.* takes samples by number"),
        ({"regimes": ("sustained",)}, {}, "--sustained TIME"),
        ({"regimes": ("warm",), "warmup": False}, {}, "--set regimes: nothing is warmed up"),
        ({"n_gen": (0,), "sustained_s": 600.0}, {}, "--sustained: nothing is generated"),
        ({"regimes": ("warm",), "start": (8,)}, {}, "--set start: the file is open already"),
        ({"cache_type": "q8_0"}, {"engine": "onnxruntime"}, "onnxruntime cannot be told the type of its cache"),
        ({"cache_type": "q8_0"}, {"engine": "wllama"}, "wllama cannot be told the type of its cache"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    files: list[Path], settings: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    given = {"files": files[:1], "target": FakeTarget()} | changes
    if "anchor" in given:
        given["anchor"] = files[0].with_name(given["anchor"])
    with pytest.raises(InputError, match=reason):
        run_bench(settings=replace(ONE, **settings), **given)


def test_what_one_of_several_targets_cannot_is_refused_before_any_of_them_measures(files: list[Path]) -> None:
    able = FakeTarget()
    with pytest.raises(InputError, match="takes samples by number"):
        run_matrix(files, replace(ONE, sustained_s=9.0), [able, Browser()])
    assert able.asked == []


def test_a_place_that_cannot_be_opened_says_why_in_its_row(files: list[Path]) -> None:
    (record,) = run_bench(files[:1], ONE, target=Unreachable("adb:1", "no such device"))
    assert record.failure == "no such device"


# ---- A fair start ---------------------------------------------------------------------------------------------------

COOL = Conditions((0.0,), caps=(1.0,), hottest_c=(30.0,), thermal_status=(0,))
HOT = replace(COOL, caps=(0.5,))


class Device(FakeTarget):
    """Keeps in which order it was looked at and used."""

    def __init__(self, *looks: Conditions) -> None:
        super().__init__()
        self.looks, self.order = iter(looks), list[str]()

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
    ],
)
def test_what_is_not_nominal(change: dict[str, Any], why: str | None) -> None:
    assert not_nominal(replace(COOL, **change)) == why
    assert not_nominal(unknown_conditions("it hides all")) is None


def test_a_process_begins_when_its_machine_is_nominal(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure, "_POLL_S", 0.01)
    device = Device(HOT, HOT, COOL, COOL)
    with caplog.at_level(logging.WARNING):
        (record,) = run_bench(files[:1], replace(ONE, cooldown_timeout_s=60.0), target=device)
    assert record.ok
    assert device.order == ["look", "look", "look", "run", "look", "run"]
    assert caplog.messages == ["fake: waiting until it is nominal: clocks are capped at 50%"]
    device = Device(*[HOT] * 100)
    (record,) = run_bench(files[:1], replace(ONE, cooldown_timeout_s=0.05), target=device)
    assert record.failure == "not nominal after 0.05 s: clocks are capped at 50%"
    assert "run" not in device.order


# ---- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "test", "n_ctx"),
    [
        (Workload("pp", n_prompt=512), "pp512", 512),
        (Workload("pp", n_prompt=512, n_depth=1024), "pp512 @ d1024", 1536),
        (Workload("ttft", n_prompt=64, n_gen=1), "ttft64", 65),
        (Workload("load"), "load", 1),
        (Workload("tg", n_gen=8, n_depth=64, regime="cold"), "tg8 @ d64 @ cold", 72),
    ],
)
def test_names_are_llama_benchs(workload: Workload, test: str, n_ctx: int) -> None:
    assert (workload.test, workload.n_ctx) == (test, n_ctx)


def test_workloads_come_once_and_zero_leaves_out() -> None:
    settings = BenchSettings(n_prompt=(0, 64, 64), n_gen=(16,), ttft=(0,), load=False, n_depth=(0, 32))
    assert [w.test for w in workloads_of(settings)] == ["pp64", "tg16", "pp64 @ d32", "tg16 @ d32"]
    names = [row.test for row in workloads_of(BenchSettings(sustained_s=600.0, start=(8,)))]
    assert names == ["load", "pp512", "tg128", "ttft128", "start8", "tg128 @ sustained"]


def test_all_wrong_settings_are_reported_together() -> None:
    wrong = {"n_prompt": (-1,), "n_threads": (0,), "n_depth": (), "repetitions": 0, "timeout_s": float("nan")}
    with pytest.raises(InputError) as caught:
        BenchSettings(**wrong)  # type: ignore[arg-type]
    assert all(f"{name}: " in str(caught.value) for name in wrong)
    assert "n_gen: " not in str(caught.value)


def test_threads_default_to_the_usable_cores_and_come_once() -> None:
    assert BenchSettings(n_threads=(4, 1, 4)).threads(cores=8) == (4, 1)
    assert BenchSettings().threads(cores=8) == (8,)
    assert BenchSettings().threads(cores=None) == (1,)
