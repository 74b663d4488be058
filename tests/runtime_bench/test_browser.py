"""Real Chromium, real onnxruntime-web and wllama, on files small enough to be quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cfsp.errors import PhonereadyError
from exporters.gguf.runtime import open_model as open_gguf
from exporters.onnx import export_onnx
from exporters.onnx.folder import find_graph
from exporters.onnx.runtime import open_model as open_onnx
from runtime_bench.browser.chromium import PageSettings, find_chromium, open_page, require_playwright
from runtime_bench.browser.packages import fetch_packages
from runtime_bench.browser.worker import open_model, served_files
from runtime_bench.engines import SessionSettings
from runtime_bench.measure import run_bench
from runtime_bench.targets.browser import Browser
from runtime_bench.worker import WorkerRequest
from runtime_bench.workload import BenchSettings, Workload

QUICK = BenchSettings(
    n_prompt=(24,), n_gen=(8,), ttft=(16,), repetitions=2, n_threads=(1,), spread_limit=1e9, timeout_s=120
)
ONE = replace(QUICK, n_prompt=(), ttft=(), load=False, repetitions=1)
PROMPT = [5, 17, 300, 42, 9]


@pytest.fixture(scope="module")
def settings() -> PageSettings:
    try:
        require_playwright()
        return PageSettings(find_chromium(), str(fetch_packages()))
    except PhonereadyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def gguf_file(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


@pytest.fixture(scope="module")
def graph(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output = tmp_path_factory.mktemp("onnx") / "a model's # %20 folder"
    export_onnx(tiny_folder(), output, ["fp32"], n_threads=1)
    return find_graph(str(output / "fp32"), last_logits=True)


@pytest.fixture(params=["onnxruntime-web", "wllama"])
def file(request: pytest.FixtureRequest) -> Path:
    name = {"onnxruntime-web": "graph", "wllama": "gguf_file"}[request.param]
    found: Path = request.getfixturevalue(name)
    return found


def request_for(path: Path, threads: int = 1) -> WorkerRequest:
    engine = Browser().default_engine(path)
    return WorkerRequest(str(path), engine, Workload("load"), SessionSettings(64, threads, 32, 32))


def native_tokens(path: Path, count: int) -> list[int]:
    """The likeliest continuation of PROMPT in the runtime that parity is proven with."""
    if path.suffix == ".gguf":
        llama = open_gguf(path, n_ctx=64, n_threads=1)
        feed = lambda tokens: (llama.decode(tokens), llama.last_logits())[1]  # noqa: E731
        close = llama.close
    else:
        onnx = open_onnx(path, n_ctx=64, n_threads=1)
        feed = lambda tokens: onnx.decode(tokens)[-1]  # noqa: E731
        close = onnx.close
    tokens = [int(feed(PROMPT).argmax())]
    while len(tokens) < count:
        tokens.append(int(feed(tokens[-1:]).argmax()))
    close()
    return tokens


@pytest.mark.parametrize(("threads", "count"), [(1, 16), (2, 3)])
def test_greedy_tokens_are_those_of_the_native_runtime(
    file: Path, settings: PageSettings, threads: int, count: int
) -> None:
    request = request_for(file, threads)
    with open_page(settings, served_files(request)) as page:
        model = open_model(page, request, settings)
        found = model.greedy(PROMPT, count)
        again = model.greedy(PROMPT, count)
        text = model.tokenize("The quick brown fox")
    assert found == again == native_tokens(file, count)
    assert (model.n_vocab, model.bos) == (384, None)
    assert len(text) > 3
    assert f"{threads} threads" in (model.facts.system_info or "")


@pytest.mark.usefixtures("settings")
def test_every_workload_gives_samples(file: Path) -> None:
    records = run_bench([file], QUICK, target=Browser())
    assert [r.failure for r in records] == [None] * 4
    assert [r.test for r in records] == ["load", "pp24", "tg8", "ttft16"]
    for record in records:
        assert (record.kind, record.target) == ("constrained-host", "browser(mobile)")
        assert record.engine == {".onnx": "onnxruntime-web", ".gguf": "wllama"}[file.suffix]
        assert len(record.samples_ns) == len(record.load_samples_ns) == 2
        assert {"chromium", "playwright"} <= set(record.environment.versions)
        assert 0 < (record.baseline_rss_bytes or 0) <= (record.peak_rss_bytes or 0)
