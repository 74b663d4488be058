"""The fresh process in which one measurement in a page is taken: `python -m runtime_bench.browser.worker`.

As `runtime_bench.worker`: one request as JSON on stdin, one result as JSON on stdout. Chromium is below this process,
and goes with it. The clock is the page's: what passes between this process and the page is in no sample.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.errors import InputError
from cfsp.reading import read_json_object
from exporters.onnx.folder import folder_of
from exporters.onnx.runtime import PREFILL_TOKENS
from runtime_bench.browser.chromium import Page, calibrate, open_page, renderer_bytes
from runtime_bench.engines import EngineFacts, file_facts, files_of
from runtime_bench.records.reported import Throttling
from runtime_bench.worker import (
    Work,
    WorkerRequest,
    WorkerResult,
    prepare_page_cache,
    random_tokens,
    request_from_json,
    serve,
    warmup_of,
    with_opening,
    work_of,
)

_PACKAGES = MappingProxyType({"onnxruntime-web": "onnxruntime-web", "wllama": "@wllama/wllama"})
"""Engine -> the npm package that it comes in."""
_PR_SET_PDEATHSIG = 1


class OpenModel:
    """A request's model in its engine in a page.

    Attributes:
        n_vocab: Size of the vocabulary.
        bos: The token a sequence must begin with; None if the model adds none.
        load_ns: Time from the request of its files to readiness.
        baseline_rss_bytes: Memory of the page with the engine's code loaded and nothing opened.
        facts: The engine's facts.

    Raises:
        BrowserError: The page cannot load it.
        InputError: More than one thread in a page that is throttled.
    """

    def __init__(
        self, page: Page, request: WorkerRequest, packages: Path, throttling: Throttling | None = None
    ) -> None:
        session, path = request.session, Path(request.path)
        if throttling is not None and session.n_threads != 1:
            raise InputError(
                "a page is slowed down on its main thread only",
                field="threads",
                value=session.n_threads,
                allowed="1",
            )
        self.page = page
        page.visit("index.html")
        preparation = {"threads": session.n_threads, "mainThread": throttling is not None}
        page.call("bench.prepare", request.engine, preparation)
        page.throttle(1 if throttling is None else throttling.rate)
        self.baseline_rss_bytes, _ = renderer_bytes()
        batch = min(session.n_batch, session.n_ubatch)
        options = {
            "context": session.n_ctx,
            "threads": session.n_threads,
            "batchTokens": batch,
            "pieceTokens": min(batch, PREFILL_TOKENS),
        }
        addresses: dict[str, Any] = {"file": "/model-0"}
        if request.engine != "wllama":
            addresses = {
                "graph": "/model-0",
                "data": [
                    {"name": file.name, "address": f"/model-{n}"}
                    for n, file in enumerate(files_of(path))
                    if n
                ],
                "tokenizer": "/tokenizer.json",
                "tokenizerConfig": "/tokenizer_config.json",
            }
        opened = page.call("bench.open", addresses, options)
        self.n_vocab: int = opened["vocabulary"]
        self.bos: int | None = opened["bos"]
        self.load_ns = _ns(opened["loaded"])
        package = _PACKAGES[request.engine]
        versions = {
            package: str(read_json_object(packages / package / "package.json").get("version")),
            "chromium": page.version,
            "playwright": importlib.metadata.version("playwright"),
        }
        system_info = f"{opened['runtime']}, {opened['threads']} threads"
        self.facts: EngineFacts = replace(file_facts(path, "wasm", versions), system_info=system_info)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, begun as the model wants a sequence begun."""
        return [int(token) for token in self.page.call("bench.tokenize", text)]


def served_files(request: WorkerRequest) -> dict[str, Path]:
    """Addresses below the server's root -> files of the model; no file's own name is part of an address."""
    path = Path(request.path)
    files = {f"model-{index}": file for index, file in enumerate(files_of(path))}
    if path.suffix == ".onnx":
        names = ("tokenizer.json", "tokenizer_config.json")
        files |= {name: folder_of(path) / name for name in names}
    return files


def _answer(payload: dict[str, Any]) -> WorkerResult:
    """Take the samples of a request in a page."""
    request, target_score = request_from_json(payload["request"]), payload["target_score"]
    throttling = Throttling(**payload["throttling"]) if payload["throttling"] else None
    packages, workload = Path(payload["packages"]), request.workload
    share = prepare_page_cache(request)

    def in_page(work: Work) -> dict[str, Any]:
        return {"text": work, "count": workload.n_prompt} if isinstance(work, str) else {"pieces": work}

    with open_page(payload["executable"], packages, served_files(request)) as page:
        if target_score is not None and throttling is None:
            throttling = calibrate(page, target_score)
        model = OpenModel(page, request, packages, throttling)
        work, samples = work_of(model, request), list[int]()
        if work is not None:
            before = random_tokens(model, request, workload.n_depth) if workload.n_depth else []
            warmup = in_page(warmup_of(work)) if request.warmup else None
            times = page.call("bench.time", in_page(work), warmup, before, request.samples)
            samples = list(map(_ns, times))
        _, peak = renderer_bytes()
    return WorkerResult(
        samples_ns=with_opening(request, model.load_ns, samples),
        load_ns=model.load_ns,
        page_cache_share=share,
        baseline_rss_bytes=model.baseline_rss_bytes,
        peak_rss_bytes=peak,
        facts=model.facts,
        throttling=throttling,
    )


def _ns(milliseconds: float) -> int:
    return max(1, round(milliseconds * 1e6))


if __name__ == "__main__":
    if sys.platform.startswith("linux"):  # be told to end when the process that waits for the result is gone
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    serve(_answer, lambda reason: WorkerResult(error=reason))
