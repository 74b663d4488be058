"""How an engine computed stands in every row: backend, cores, kernels, copies of the weights, providers of nodes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporters.family import ExportOptions
from exporters.gguf.runtime import LlamaModel, open_model
from exporters.onnx.export import export_onnx
from exporters.onnx.folder import find_graph
from runtime_bench.engines import SessionSettings, llama_cpp, onnxruntime
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.record_table import format_table, record_table
from runtime_bench.records.compare import Incomparable, compare_records
from runtime_bench.records.fairness import note_of
from runtime_bench.records.reported import EngineSettings
from runtime_bench.targets.local import Constrained
from runtime_bench.workload import BenchSettings

pytest.importorskip("llama_cpp")

QUICK = BenchSettings(
    check_text=False,
    n_prompt=(24,),
    n_gen=(),
    ttft=(),
    load=False,
    repetitions=1,
    n_threads=(1,),
    timeout_s=120,
)


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


@pytest.fixture(scope="module")
def graph(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(tiny_folder(), output, ["fp32"], ExportOptions(n_threads=1))
    return find_graph(str(output / "fp32"), last_logits=True)


def test_a_row_of_llama_cpp_says_how_it_was_computed(model: Path) -> None:
    (record,) = run_bench([model], QUICK)
    settings = record.engine_settings
    assert record.backends == "CPU"
    assert settings.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert settings.flash_attention is True
    assert sum(settings.weight_buffers.values()) >= 0.95 * (record.model_size or 0)
    assert settings.rearranged_bytes == 0  # float32 is read as it is
    assert "LLAMAFILE" in str(record.environment.system_info)
    text = format_table([record])
    assert f"tiny-model.gguf: llama.cpp on CPU; cores {', '.join(map(str, settings.cores))}; flash" in text


def test_the_cores_are_those_that_the_process_was_given(model: Path) -> None:
    core = min(os.sched_getaffinity(0))
    (record,) = run_bench([model], QUICK, target=Constrained(cores=(core,)))
    assert record.engine_settings.cores == (core,)


def test_weights_that_were_rearranged_are_told_from_the_files_pages(make_record: Any) -> None:
    buffers = {"CPU_Mapped": 92 * 2**20, "CPU_REPACK": 63 * 2**20, "AMX": 2**20}
    record = make_record(engine_settings=EngineSettings("f16", flash_attention=True, weight_buffers=buffers))
    assert "64.00 MiB of the weights rearranged" in format_table([record])


def test_a_row_of_onnx_runtime_names_the_providers_that_run_its_nodes(graph: Path) -> None:
    (record,) = run_bench([graph], QUICK)
    ((name, count),) = record.engine_settings.providers.items()
    assert (record.backends, name) == ("CPU", "CPU")
    assert count > 20
    assert f"{count} nodes on CPU" in format_table([record])
    assert record.fallback is None


@pytest.mark.parametrize(("file", "backend"), [("graph", "cuda"), ("graph", "azure"), ("model", "gpu")])
def test_a_backend_that_fell_back_to_the_processor_says_so(
    request: pytest.FixtureRequest, file: str, backend: str
) -> None:
    (record,) = run_bench([request.getfixturevalue(file)], replace(QUICK, backend=backend))
    if record.backends != "CPU":
        pytest.skip(f"{backend} computes on this machine")
    assert record.ok
    assert record.fallback == backend
    assert record_table([record]).objects()[0]["backend"] == f"CPU (not {backend})"
    assert f"{backend} was asked for, and the CPU computed" in str(note_of(record))


@pytest.mark.parametrize(
    ("file", "reason", "allowed"),
    [("graph", "knows no such provider", "coreml, cpu, cuda"), ("model", "no such backend", "cpu, gpu")],
)
def test_a_backend_that_nobody_knows_is_a_failed_row(
    request: pytest.FixtureRequest, file: str, reason: str, allowed: str
) -> None:
    (record,) = run_bench([request.getfixturevalue(file)], replace(QUICK, backend="abacus"))
    assert not record.ok
    assert reason in str(record.failure)
    assert allowed in str(record.failure)


def test_who_asks_for_the_processor_gets_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def watched(*arguments: Any, on_gpu: bool, **settings: Any) -> LlamaModel:
        asked.append(on_gpu)
        return open_model(*arguments, **settings)

    monkeypatch.setattr(llama_cpp, "open_model", watched)
    for backend in ("cpu", None, "gpu"):
        llama_cpp.open_session(model, SessionSettings(64, 1, 64, 64, backend=backend)).close()
    assert asked == [False, False, True]


def test_nodes_that_are_left_to_the_processor_are_told_of(make_record: Any) -> None:
    settings = EngineSettings(providers={"CUDA": 310, "CPU": 32}, asked_backend="cuda")
    record = make_record(engine="onnxruntime", backends="CUDA, CPU", engine_settings=settings)
    assert record.fallback is None
    assert "32 of 342 nodes of the graph run on the CPU" in str(note_of(record))


def test_the_order_of_providers_makes_no_other_backend(graph: Path) -> None:
    session = onnxruntime.open_session(graph, SessionSettings(64, 1, 64, 64))
    named = []
    for providers in ({"CUDA": 3, "CPU": 2}, {"CPU": 2, "CUDA": 3}):
        session._model.providers = providers
        named.append(session.facts.backends)
    session.close()
    assert named == ["CPU, CUDA"] * 2


def test_backends_are_held_apart(make_record: Any) -> None:
    found = compare_records(make_record(), make_record(backends="CUDA0"))
    assert isinstance(found, Incomparable)
    assert found.reason == "they measure different things: backends 'CPU' and 'CUDA0'"
    failed = make_record(backends=None, status="failed", failure="timeout", samples_ns=())
    assert compare_records(make_record(), failed).verdict == "inconclusive"
