"""The fresh process in which one measurement in a page is taken: `python -m runtime_bench.browser.worker`.

As `runtime_bench.worker`: one request as JSON on stdin, one result as JSON on stdout. Chromium is below this process,
and goes with it. The clock is the page's: what passes between this process and the page is in no sample.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.errors import InputError
from cfsp.reading import read_json_object
from exporters.onnx.folder import folder_of
from exporters.onnx.runtime import PREFILL_TOKENS
from runtime_bench.browser.calibration import calibrate
from runtime_bench.browser.chromium import (
    Page,
    PageSettings,
    open_page,
    renderer_peak_bytes,
    renderer_rss_bytes,
)
from runtime_bench.engines import EngineFacts, file_facts
from runtime_bench.files import files_of
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


@dataclass(frozen=True)
class OpenModel:
    """A model in the page."""

    page: Page
    n_vocab: int  # Size of the vocabulary
    bos: int | None  # The token a sequence must begin with; None where the model adds none
    load_ns: int  # Time from the request of its files to readiness
    facts: EngineFacts  # The engine's facts
    baseline_rss_bytes: int | None  # Memory of the page with the engine's code loaded and nothing opened

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, begun as the model wants a sequence begun."""
        return [int(token) for token in self.page.call("bench.tokenize", text)]


def measure(
    request: WorkerRequest,
    settings: PageSettings,
    target_score: float | None = None,
    throttling: Throttling | None = None,
) -> WorkerResult:
    """Take the samples of a request in a page.

    Raises:
        PhonereadyError: The browser or the page failed, or this machine is too weak for the score.
    """
    share = prepare_page_cache(request)
    with open_page(settings, served_files(request)) as page:
        if target_score is not None and throttling is None:
            throttling = calibrate(page, target_score)
        model = open_model(page, request, settings, throttling)
        work = work_of(model, request)
        samples = [] if work is None else _timed(model, request, work)
        peak = renderer_peak_bytes()
    return WorkerResult(
        samples_ns=with_opening(request, model.load_ns, samples),
        load_ns=model.load_ns,
        page_cache_share=share,
        baseline_rss_bytes=model.baseline_rss_bytes,
        peak_rss_bytes=peak,
        facts=model.facts,
        throttling=throttling,
    )


def served_files(request: WorkerRequest) -> dict[str, Path]:
    """Addresses below the server's root -> files of the model; no file's own name is part of an address."""
    path = Path(request.path)
    files = {f"model-{index}": file for index, file in enumerate(files_of(path))}
    if path.suffix == ".onnx":
        names = ("tokenizer.json", "tokenizer_config.json")
        files |= {name: folder_of(path) / name for name in names}
    return files


def open_model(
    page: Page, request: WorkerRequest, settings: PageSettings, throttling: Throttling | None = None
) -> OpenModel:
    """Open a request's file in its engine.

    Raises:
        BrowserError: The page cannot load it.
        InputError: More than one thread where the page is throttled.
    """
    session = request.session
    if throttling is not None and session.n_threads != 1:
        raise InputError(
            "a page is slowed down on its main thread alone",
            field="threads",
            value=session.n_threads,
            allowed="1",
        )
    page.visit("index.html")
    preparation = {"threads": session.n_threads, "mainThread": throttling is not None}
    page.call("bench.prepare", request.engine, preparation)
    page.throttle(1 if throttling is None else throttling.rate)
    baseline = renderer_rss_bytes()
    batch = min(session.n_batch, session.n_ubatch)
    options = {
        "context": session.n_ctx,
        "threads": session.n_threads,
        "batchTokens": batch,
        "pieceTokens": min(batch, PREFILL_TOKENS),
    }
    opened = page.call("bench.open", _addresses(request), options)
    package = _PACKAGES[request.engine]
    versions = {
        package: str(read_json_object(Path(settings.packages, package, "package.json")).get("version")),
        "chromium": page.version,
        "playwright": importlib.metadata.version("playwright"),
    }
    system_info = f"{opened['runtime']}, {opened['threads']} threads"
    facts = replace(file_facts(Path(request.path), "wasm", versions), system_info=system_info)
    return OpenModel(page, opened["vocabulary"], opened["bos"], _ns(opened["loaded"]), facts, baseline)


def main() -> None:
    """Serve one request."""
    if sys.platform.startswith("linux"):  # be told to end when the process that waits for the result is gone
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    serve(_answer, lambda reason: WorkerResult(error=reason))


def _answer(payload: dict[str, Any]) -> WorkerResult:
    return measure(
        request_from_json(payload["request"]),
        PageSettings(**payload["settings"]),
        payload["target_score"],
        Throttling(**payload["throttling"]) if payload["throttling"] else None,
    )


def _addresses(request: WorkerRequest) -> dict[str, Any]:
    files = files_of(Path(request.path))
    if request.engine == "wllama":
        return {"file": "/model-0"}
    data = [{"name": file.name, "address": f"/model-{n}"} for n, file in enumerate(files) if n]
    return {
        "graph": "/model-0",
        "data": data,
        "tokenizer": "/tokenizer.json",
        "tokenizerConfig": "/tokenizer_config.json",
    }


def _timed(model: OpenModel, request: WorkerRequest, work: Work) -> list[int]:
    depth = request.workload.n_depth
    before = random_tokens(model, request, depth) if depth else []
    warmup = _in_page(warmup_of(work), request) if request.warmup else None
    times = model.page.call("bench.time", _in_page(work, request), warmup, before, request.samples)
    return [_ns(time) for time in times]


def _in_page(work: Work, request: WorkerRequest) -> dict[str, Any]:
    if isinstance(work, str):
        return {"text": work, "count": request.workload.n_prompt}
    return {"pieces": work}


def _ns(milliseconds: float) -> int:
    return max(1, round(milliseconds * 1e6))


if __name__ == "__main__":
    main()
