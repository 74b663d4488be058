"""Graphs whose keys and values are kept in 8 bits: made of an export's own graph, and held against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer

from cfsp.errors import InputError
from exporters.onnx import export_onnx, ready
from exporters.onnx.folder import find_graph, folder_of
from exporters.onnx.int8_cache import make_ready
from exporters.onnx.ready import INT8_CACHE, ready_graph
from exporters.onnx.runtime import open_model
from exporters.options import ExportOptions

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def graph(
    request: pytest.FixtureRequest,
    tiny_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(tiny_folder(), output, [request.param], ExportOptions(n_threads=1))
    return find_graph(str(output / request.param))


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path))
    return tmp_path


def logits(graph: Path, cache_type: str | None) -> np.ndarray:
    tokenizer = Tokenizer.from_file(str(folder_of(graph) / "tokenizer.json"))
    ids = np.array(tokenizer.encode(topics["assert"]).ids[:96])  # what was not read for the scales
    model = open_model(graph, n_ctx=128, n_threads=1, n_batch=20, cache_type=cache_type)
    try:
        return np.concatenate(list(model.iter_logits(ids)))
    finally:
        model.close()


def test_it_computes_nearly_what_the_graph_with_floats_computes(graph: Path, cache_folder: Path) -> None:
    make_ready(graph)
    floats, few = logits(graph, None), logits(graph, INT8_CACHE)
    error = float(np.abs(few - floats).mean())
    assert 1e-5 < error < 0.05 * np.abs(floats).mean()
    assert (few.argmax(-1) == floats.argmax(-1)).mean() > 0.9


def test_its_buffers_take_a_byte_a_number_and_it_has_no_weights_of_its_own(
    graph: Path, cache_folder: Path
) -> None:
    make_ready(graph)
    model = open_model(graph, n_ctx=64, n_threads=1, cache_type=INT8_CACHE)
    model.decode([3, 4, 5])
    held = model.fixed_caches()
    assert {values.dtype for values in held.values()} == {np.dtype(np.int8)}
    assert max(int(np.abs(values.astype(int)).max()) for values in held.values()) > 30
    model.close()
    assert ready_graph(graph).stat().st_size < 2 * graph.stat().st_size


def test_what_an_earlier_version_made_is_not_found(
    graph: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ready(graph)
    monkeypatch.setattr(ready, "MAKING", ready.MAKING + 1)
    with pytest.raises(InputError, match="no graph with an 8-bit cache was made"):
        ready_graph(graph)


def test_it_is_made_once_and_anew_for_another_file(graph: Path, cache_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no graph with an 8-bit cache was made"):
        ready_graph(graph)
    make_ready(graph)
    first = ready_graph(graph)
    before = first.stat().st_mtime_ns
    make_ready(graph)
    assert first.stat().st_mtime_ns == before
    graph.touch()
    with pytest.raises(InputError, match="no graph with an 8-bit cache was made"):
        ready_graph(graph)
