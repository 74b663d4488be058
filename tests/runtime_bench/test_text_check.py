"""A file that writes nonsense has no speed; one that cannot be run here is not accused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from exporters.family import ExportOptions
from exporters.onnx.export import export_onnx
from exporters.onnx.folder import find_graph
from runtime_bench.measuring.measure import run_bench
from runtime_bench.measuring.text_check import BEGINNINGS, check_text, judge
from runtime_bench.presentation.record_table import format_table
from runtime_bench.workload import BenchSettings

pytest.importorskip("llama_cpp")

SENSE = "went down to the harbour, looked at the boats and thought of his brother in the city."
LOOP = "went down to the harbour and " * 12


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


def test_one_text_that_makes_sense_acquits() -> None:
    assert judge([LOOP, LOOP, SENSE]) is None
    assert judge([LOOP, "", LOOP]) == "loop"
    assert judge(["", LOOP, ""]) == "empty"


def test_a_random_model_is_found_out(model: Path) -> None:
    found = check_text(model, 300)
    assert found.problem is None
    assert len(found.texts) == len(BEGINNINGS)
    assert found.degenerate is not None
    assert check_text(model, 300) == found


def test_both_runtimes_write_the_same(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    from exporters.gguf.export import export_gguf

    folder = tiny_folder()
    export_onnx(folder, tmp_path / "onnx", ["fp32"], ExportOptions(n_threads=1))
    (record,) = export_gguf(folder, tmp_path / "gguf", ["f32"], ExportOptions(n_threads=1))
    graph = check_text(find_graph(str(tmp_path / "onnx" / "fp32"), last_logits=True), 300)
    file = check_text(tmp_path / "gguf" / record.file, 300)
    assert graph.problem is file.problem is None
    # llama.cpp knows more tokens as ends of a text than the checkpoint's config names.
    pairs = [(a.strip(), b.strip()) for a, b in zip(graph.texts, file.texts, strict=True)]
    assert all(a.startswith(b) for a, b in pairs)
    assert any(a == b for a, b in pairs)


def test_what_does_not_run_is_not_judged(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    for path, words in ((broken, "cannot load"), (tmp_path / "model.tflite", ".tflite")):
        found = check_text(path, 300)
        assert (found.texts, found.degenerate) == ((), None)
        assert words in str(found.problem)
    assert "no result after" in str(check_text(model, 0.01).problem)


def test_a_bench_voids_the_speed_of_nonsense(model: Path) -> None:
    asked = BenchSettings(n_prompt=(), n_gen=(4,), ttft=(), load=False, repetitions=1, n_threads=(1,))
    (unasked,) = run_bench([model], replace(asked, check_text=False))
    assert not unasked.void
    assert unasked.text_sample is None
    (record,) = run_bench([model], asked)
    assert record.ok
    assert record.void
    assert record.samples_ns
    assert record.text_sample
    text = format_table([record])
    assert f"void: {record.degenerate}" in text
    assert f"degenerate ({record.degenerate})" in text
