"""Real Chromium, real onnxruntime-web and wllama, on files small enough to be quick."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from cfsp.errors import InputError, PhonereadyError, require_extra
from exporters.family import ExportOptions
from exporters.gguf.runtime import Context
from exporters.gguf.runtime import open_model as open_gguf
from exporters.onnx.export import export_onnx
from exporters.onnx.folder import find_graph
from exporters.onnx.runtime import open_model as open_onnx
from runtime_bench.browser import chromium
from runtime_bench.browser.chromium import (
    BrowserError,
    calibrate,
    fetch_packages,
    find_chromium,
    open_page,
)
from runtime_bench.browser.worker import OpenModel, served_files
from runtime_bench.engines import SessionSettings
from runtime_bench.measuring.measure import run_bench
from runtime_bench.records.fairness import note_of
from runtime_bench.records.jsonl import record_from_json, record_to_json
from runtime_bench.records.reported import Throttling
from runtime_bench.targets.local import Browser
from runtime_bench.targets.table import open_target
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings, Workload

ROOT = Path(__file__).resolve().parents[2]
QUICK = BenchSettings(
    n_prompt=(24,),
    n_gen=(8,),
    ttft=(16,),
    check_text=False,
    repetitions=2,
    n_threads=(1,),
    spread_limit=1e9,
    samples_per_process=2,
)
PROMPT = [5, 17, 300, 42, 9]


@pytest.fixture(scope="module")
def packages() -> Path:
    """The npm packages, where there is a browser, too."""
    try:
        require_extra("playwright", "browser")
        find_chromium()
        return fetch_packages()
    except PhonereadyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def gguf_file(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


@pytest.fixture(scope="module")
def graph(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output = tmp_path_factory.mktemp("onnx") / "a model's # %20 folder"
    export_onnx(tiny_folder(), output, ["fp32"], ExportOptions(n_threads=1))
    return find_graph(str(output / "fp32"), last_logits=True)


@pytest.fixture(params=["onnxruntime-web", "wllama"])
def file(request: pytest.FixtureRequest) -> Path:
    name = {"onnxruntime-web": "graph", "wllama": "gguf_file"}[request.param]
    found: Path = request.getfixturevalue(name)
    return found


def request_for(path: Path, threads: int = 1, **changes: Any) -> WorkerRequest:
    engine = Browser().default_engine(path)
    made = WorkerRequest(str(path), engine, Workload("load"), SessionSettings(64, threads, 32, 32))
    return replace(made, **changes)


def native_tokens(path: Path, count: int) -> list[int]:
    """The likeliest continuation of PROMPT in the runtime that parity is proven with."""
    if path.suffix == ".gguf":
        llama = open_gguf(path, Context(n_ctx=64), n_threads=1)
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


def browsers() -> set[int]:
    """Processes of our workers, told by their folder for temporary files, and all below them."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "phoneready-browser-" in process.environ().get("TMPDIR", ""):
                found |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = browsers()
    yield
    deadline = time.monotonic() + 30
    while browsers() - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert browsers() - before == set()


@pytest.mark.usefixtures("packages", "nothing_left")
def test_every_workload_gives_samples(file: Path) -> None:
    records = run_bench([file], QUICK, target=Browser())
    assert [r.failure for r in records] == [None] * 4
    assert [r.test for r in records] == ["load", "pp24", "tg8", "ttft16"]
    for record in records:
        assert (record.kind, record.target) == ("constrained-host", "browser(not throttled)")
        assert record.engine == {".onnx": "onnxruntime-web", ".gguf": "wllama"}[file.suffix]
        assert len(record.samples_ns) == 2
        assert {"chromium", "playwright"} <= set(record.environment.versions)
        assert 0 < (record.baseline_rss_bytes or 0) <= (record.peak_rss_bytes or 0)
        assert record.throttling is None


@pytest.mark.everything
@pytest.mark.parametrize(("threads", "count"), [(1, 16), (2, 3)])
def test_greedy_tokens_are_those_of_the_native_runtime(
    file: Path, packages: Path, threads: int, count: int
) -> None:
    request = request_for(file, threads)
    with open_page(find_chromium(), packages, served_files(request)) as page:
        model = OpenModel(page, request, packages)
        found = page.call("bench.greedy", PROMPT, count)
        again = page.call("bench.greedy", PROMPT, count)
        text = model.tokenize("The quick brown fox")
    assert found == again == native_tokens(file, count)
    assert (model.n_vocab, model.bos) == (384, None)
    assert len(text) > 3
    assert f"{threads} threads" in (model.facts.system_info or "")


@pytest.mark.everything
@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5_text"])
def test_caches_of_convolutions_and_states_are_handed_on(
    model_type: str, tiny_folder: Callable[..., Path], tmp_path: Path, packages: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    export_onnx(tiny_folder(model_type), tmp_path / "out", ["fp32"], ExportOptions(n_threads=1))
    path = find_graph(str(tmp_path / "out" / "fp32"), last_logits=True)
    request = request_for(path)
    with open_page(find_chromium(), packages, served_files(request)) as page:
        OpenModel(page, request, packages)
        assert page.call("bench.greedy", PROMPT, 16) == native_tokens(path, 16)


@pytest.mark.everything
def test_throttling_holds_for_the_thread_that_the_model_runs_on(file: Path, packages: Path) -> None:
    """The page's main thread is slowed down by using the processor up, so its CPU time shows the work."""
    request = request_for(file)
    throttled = Throttling(1.0, 1.0, 8.0, 1.0)
    used = []
    for throttling in (None, throttled):
        with open_page(find_chromium(), packages, served_files(request)) as page:
            OpenModel(page, request, packages, throttling)
            # A first go compiles.
            page.call("bench.greedy", PROMPT, 48)
            before = main_thread_seconds()
            for _ in range(6):
                tokens = page.call("bench.greedy", PROMPT, 48)
            used.append(main_thread_seconds() - before)
    assert tokens[:16] == native_tokens(file, 16)
    # Eight times is what it is told; a model in a thread of its own would leave the main thread as idle as before.
    assert used[1] > 2 * used[0]


def main_thread_seconds() -> float:
    """CPU time of the main threads of the renderers below this process."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        # Chromium starts short-lived helpers that may end while they are asked.
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("--type=renderer" in part for part in process.cmdline()):
                total += next(t.user_time + t.system_time for t in process.threads() if t.id == process.pid)
    return total


@pytest.mark.everything
def test_a_page_is_held_to_a_score(graph: Path, packages: Path) -> None:
    with open_page(find_chromium(), packages, {}) as page:
        page.visit("score.html?quiet")
        host = float(page.call("score"))
        with pytest.raises(InputError, match="too weak to stand for the device"):
            calibrate(page, 1e6)
        with pytest.raises(InputError, match="main thread only"):
            OpenModel(page, request_for(graph, threads=2), packages, Throttling(1, 1, 2, 1))
    assert host > 1
    target = Browser(target_score=host / 20)
    assert target.environment().cpus_usable == 1
    row = replace(QUICK, n_prompt=(), ttft=(), load=False, samples_per_process=1, n_threads=())
    (record,) = run_bench([graph], row, target=target)
    assert record.n_threads == 1
    if record.failure:
        # On a machine whose load changes from second to second.
        assert "could not be held to the score" in record.failure
        return
    held = record.throttling
    assert held is not None
    assert held == target.throttling
    assert abs(held.reached_score / held.target_score - 1) <= 0.1
    assert held.rate > 1
    assert "slowed down" in (note_of(record) or "")
    assert record_from_json(record_to_json(record), where="here") == record


class Host:
    """A page that keeps to every rate."""

    def __init__(self, score: float) -> None:
        self.score, self.rate = score, 1.0

    def visit(self, file: str) -> None:
        pass

    def call(self, function: str) -> float:
        return self.score / self.rate

    def throttle(self, rate: float) -> None:
        self.rate = rate


def test_a_host_that_is_a_little_too_slow_will_do_and_a_weak_one_will_not() -> None:
    assert calibrate(Host(95), 100) == Throttling(100, 95, 1.0, 95)  # type: ignore[arg-type]
    assert calibrate(Host(400), 100) == Throttling(100, 400, 4.0, 100)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="allowed: up to 80"):
        calibrate(Host(80), 100)  # type: ignore[arg-type]


def test_a_profile_says_whose_browser_it_stands_for() -> None:
    assert open_target("browser:pixel-8a").name == "browser(pixel-8a, not throttled)"
    assert open_target("browser:pixel-8a,score=1500").name == "browser(pixel-8a, score=1500)"
    for name, why in (("browser:iphone-15-pro", "WebKit"), ("browser:score=-1", "no score")):
        with pytest.raises(InputError, match=why):
            open_target(name)


@pytest.mark.usefixtures("packages", "nothing_left")
def test_a_file_that_does_not_open_is_a_result_with_a_reason(gguf_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:5000])
    result = Browser().run(request_for(broken), 120)
    assert result.samples_ns == []
    assert "the page failed" in (result.error or "")


@pytest.mark.everything
def test_memory_that_runs_out_is_named(packages: Path) -> None:
    with open_page(find_chromium(), packages, {}) as page:
        page.visit("score.html?quiet")
        page._page.evaluate(WASTE)
        with pytest.raises(BrowserError, match="out of memory in the page"):
            page.call("waste")


WASTE = """() => {
  const wasted = [];
  window.waste = () => { for (;;) wasted.push(new WebAssembly.Memory({ initial: 65536 })); };
}"""


def renderers(known: set[int]) -> list[psutil.Process]:
    found = []
    for pid in browsers() - known:
        with contextlib.suppress(psutil.Error):
            if any("--type=renderer" in part for part in psutil.Process(pid).cmdline()):
                found.append(psutil.Process(pid))
    return found


def wait_for_renderer(known: set[int]) -> None:
    deadline = time.monotonic() + 120
    while not renderers(known):
        assert time.monotonic() < deadline, "no renderer appeared"
        time.sleep(0.1)


@pytest.mark.usefixtures("packages", "nothing_left")
def test_a_page_that_crashes_or_takes_too_long_is_a_result_with_a_reason(graph: Path) -> None:
    known = browsers()
    results: list[WorkerResult] = []
    long = request_for(graph, workload=Workload("tg", n_gen=60), samples=10**6)
    thread = threading.Thread(target=lambda: results.append(Browser().run(long, 120)))
    thread.start()
    wait_for_renderer(known)
    while thread.is_alive():  # also the renderers that appear later
        for process in renderers(known):
            process.kill()
        time.sleep(0.2)
    assert "crash" in (results[0].error or "")
    assert Browser().run(long, 5).error == "timeout: no result after 5 s"


@pytest.mark.usefixtures("packages", "nothing_left")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_leaves_nothing_running(graph: Path, how: signal.Signals) -> None:
    known = browsers()
    options = ["--on", "browser", "--set", "check_text=false", "-t", "1", "-p", "8", "-n", "8", "-r", "1000"]
    command = [sys.executable, "-m", "phoneready", "bench", str(graph), *options]
    # A shell without job control starts its background jobs with SIGINT ignored, which would be inherited.
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=restore
    ) as process:
        try:
            wait_for_renderer(known)
            os.kill(process.pid, how)
            assert process.wait(120) == (130 if how is signal.SIGINT else -signal.SIGKILL)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PHONEREADY_CHROMIUM": "/no/such/file"}, "PHONEREADY_CHROMIUM"),
        ({"PATH": ""}, "Chromium is not installed"),
    ],
)
def test_a_browser_that_is_missing_is_a_result_with_a_reason(
    gguf_file: Path, variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("playwright", reason="Playwright is not installed")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in (Browser().run(request_for(gguf_file), 10).error or "")


def test_packages_are_pinned_by_version_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, lock = (json.loads(file.read_text(encoding="utf-8")) for file in chromium._PACKAGE_FILES)
    assert lock["packages"][""]["dependencies"] == manifest["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in manifest["dependencies"].values())
    entries = [entry for name, entry in lock["packages"].items() if name]
    assert all(entry["integrity"].startswith("sha512-") for entry in entries)
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as lacking:
        lacking.setenv("PATH", "")
        with pytest.raises(InputError, match="npm is not installed"):
            fetch_packages()
    assert [file.suffix for file in (tmp_path / "cache" / "browser").iterdir()] == [".lock"]
    fake = tmp_path / "npm"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nls > {tmp_path}/had\nmkdir node_modules\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fetch_packages()
    assert (tmp_path / "said").read_text().startswith("ci --ignore-scripts ")
    assert (tmp_path / "had").read_text().split() == ["package-lock.json", "package.json"]
