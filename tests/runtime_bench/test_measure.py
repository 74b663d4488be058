"""Measurements with the real engine, each in its real process, of files small enough to be quick."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cfsp.errors import InputError
from exporters.family import ExportOptions
from exporters.onnx import export_onnx
from exporters.onnx.folder import find_graph
from runtime_bench.engines import ENGINES, SessionSettings
from runtime_bench.measuring.measure import run_bench
from runtime_bench.process import run_worker
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.notes import note_of
from runtime_bench.targets import Local
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings, Workload

pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[2]
QUICK = BenchSettings(
    check_text=False,
    n_prompt=(24,),
    n_gen=(8,),
    ttft=(16,),
    repetitions=2,
    n_threads=(1,),
    spread_limit=1e9,
    timeout_s=120,
)
ONE = replace(QUICK, n_prompt=(), ttft=(), load=False)


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


@pytest.fixture(scope="module")
def onnx_graph(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(tiny_folder(), output, ["fp32"], ExportOptions(n_threads=1))
    return find_graph(str(output / "fp32"), last_logits=True)


def request(path: Path, workload: Workload, **changes: object) -> WorkerRequest:
    made = WorkerRequest(str(path), "llama.cpp", workload, SessionSettings(workload.n_ctx, 1, 2048, 512))
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def records(model: Path) -> list[BenchRecord]:
    return run_bench([model], QUICK)


def test_every_workload_has_a_record_with_every_sample(records: list[BenchRecord]) -> None:
    assert [r.test for r in records] == ["load", "pp24", "tg8", "ttft16"]
    assert all(r.ok and r.failure is None for r in records)
    assert all(len(r.samples_ns) == len(r.load_samples_ns) == 2 for r in records)
    assert records[0].samples_ns == records[0].load_samples_ns


def test_records_say_what_and_where(records: list[BenchRecord], model: Path) -> None:
    record = records[1]
    assert (record.kind, record.target, record.engine) == ("measured", "local", "llama.cpp")
    assert record.file_size_bytes == model.stat().st_size
    assert record.model_n_params is not None
    assert record.model_size == pytest.approx(4 * record.model_n_params, rel=0.01)
    assert record.model_type.startswith("llama")
    assert record.backends == "CPU"
    assert {"llama-cpp-python", "llama.cpp", "python", "phoneready"} <= set(record.environment.versions)
    assert 0 < record.baseline_rss_bytes <= record.peak_rss_bytes


@pytest.mark.parametrize("engine", ENGINES)
def test_the_measuring_process_holds_no_torch(model: Path, onnx_graph: Path, engine: str) -> None:
    code = (
        "import sys, json; from runtime_bench.worker import measure, request_from_json;"
        "measure(request_from_json(json.loads(sys.argv[1])));"
        "print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    path = {".gguf": model, ".onnx": onnx_graph}[ENGINES[engine].suffix]
    payload = json.dumps(asdict(request(path, Workload("pp", n_prompt=4), engine=engine)))
    command = [sys.executable, "-c", code, payload]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_take_turns(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    seen: list[tuple[int, int]] = []
    left, right = run_bench([model, other], replace(ONE, repetitions=3), lambda _, a, b: seen.append((a, b)))
    assert left.sequence == (0, 2, 4)
    assert right.sequence == (1, 3, 5)
    assert left.session == right.session
    assert seen == [(n, 6) for n in range(1, 7)]


def test_samples_of_one_process_share_its_number(model: Path) -> None:
    settings = replace(QUICK, n_prompt=(), ttft=(), repetitions=5, samples_per_process=2)
    load, generation = run_bench([model], settings)
    assert len(set(load.sequence)) == len(load.samples_ns) == 5
    assert [generation.sequence.count(n) for n in sorted(set(generation.sequence))] == [2, 2, 1]
    assert len(generation.load_samples_ns) == 3


def test_a_larger_context_takes_more_memory(model: Path) -> None:
    small = run_worker(request(model, Workload("load")), 120)
    session = SessionSettings(2**18, 1, 2048, 512)
    large = run_worker(request(model, Workload("load"), session=session), 120)
    grown = large.peak_rss_bytes - small.peak_rss_bytes
    # 4 blocks of keys and values, 2 heads of 16, 2 bytes each: the least that many positions need.
    assert grown > 0.5 * 2**18 * 4 * 2 * 2 * 16 * 2


def test_depth_is_filled_before_the_clock(model: Path) -> None:
    result = run_worker(request(model, Workload("tg", n_gen=4, n_depth=32)), 120)
    assert result.error is None
    assert len(result.samples_ns) == 1


def test_a_file_that_does_not_open_is_a_row_with_a_reason(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    seen: list[str] = []
    good, bad = run_bench([model, broken], ONE, on_record=lambda r: seen.append(r.status))
    assert (good.status, bad.status) == ("ok", "failed")
    assert "cannot load" in bad.failure
    assert bad.samples_ns == ()
    assert bad.median_ts is None
    assert bad.file_sha256 is not None
    assert seen == ["ok", "failed"]


def test_a_timeout_is_a_reason(model: Path) -> None:
    (record,) = run_bench([model], replace(ONE, timeout_s=0.01))
    assert record.status == "failed"
    assert "timeout" in record.failure


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


def test_what_was_measured_before_a_failure_is_kept(model: Path) -> None:
    class Flaky(Local):
        def run(self, asked: WorkerRequest, timeout_s: float) -> WorkerResult:
            calls.append(asked)
            return WorkerResult(error="killed") if len(calls) == 2 else super().run(asked, timeout_s)

    calls: list[WorkerRequest] = []
    (record,) = run_bench([model], replace(ONE, repetitions=4), target=Flaky())
    assert (record.status, record.failure, len(record.samples_ns), len(calls)) == ("failed", "killed", 1, 2)


def test_a_wide_row_is_measured_once_more_with_its_partners(model: Path) -> None:
    times = iter([100, 100, 900, 100, 100, 100, 70, 80, 70, 80, 70, 80])

    class Scripted(Local):
        def run(self, asked: WorkerRequest, timeout_s: float) -> WorkerResult:
            return WorkerResult(samples_ns=[next(times)])

    settings = replace(ONE, repetitions=3, spread_limit=1.25)
    seen: list[tuple[int, int]] = []
    progress = lambda _, done, total: seen.append((done, total))  # noqa: E731
    left, right = run_bench([model, model], settings, progress, target=Scripted())
    assert left.samples_ns == (70, 70, 70)
    assert left.quarantined_ns == (100, 900, 100)
    assert "measured once more, then within it" in note_of(left)
    assert (right.samples_ns, right.quarantined_ns) == ((80, 80, 80), (100, 100, 100))
    assert right.sequence == (7, 9, 11)
    assert seen[-1] == (12, 12)


def test_input_that_cannot_be_measured(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        run_bench([], QUICK)
    with pytest.raises(InputError, match=r"absent\.gguf"):
        run_bench([tmp_path / "absent.gguf"], QUICK)
    with pytest.raises(InputError, match=r"llama\.cpp"):
        run_bench([model], QUICK, engine="magic")
