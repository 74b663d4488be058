"""The fresh process in which one measurement in a page is taken: `python -m runtime_bench.browser.worker`.

As `runtime_bench.worker`: one request as JSON on stdin, one result as JSON on stdout. Chromium is below this process,
and goes with it. The clock is the page's: what passes between this process and the page is in no sample.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.errors import InputError, PhonereadyError
from exporters.onnx.folder import folder_of
from exporters.onnx.runtime import PREFILL_TOKENS
from runtime_bench.browser.calibration import calibrate
from runtime_bench.browser.chromium import Page, PageSettings, open_page
from runtime_bench.browser.packages import package_version
from runtime_bench.browser.processes import renderer_peak_bytes, renderer_rss_bytes
from runtime_bench.engines import EngineFacts
from runtime_bench.files import files_of
from runtime_bench.memory import page_cache_share
from runtime_bench.records.throttling import Throttling
from runtime_bench.worker import (
    WorkerRequest,
    WorkerResult,
    prepare_page_cache,
    random_tokens,
    request_from_json,
    text_of,
)

_PACKAGES = MappingProxyType({"onnxruntime-web": "onnxruntime-web", "wllama": "@wllama/wllama"})
"""Engine -> the npm package that it comes in."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class OpenModel:
    """A model in the page.

    Attributes:
        page: The page.
        n_vocab: Size of the vocabulary.
        bos: The token a sequence must begin with; None where the model adds none.
        load_ns: Time from the request of its files to readiness.
        facts: The engine's facts.
        baseline_rss_bytes: Memory of the page with the engine's code loaded and nothing opened.
    """

    page: Page
    n_vocab: int
    bos: int | None
    load_ns: int
    facts: EngineFacts
    baseline_rss_bytes: int | None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, begun as the model wants a sequence begun."""
        return [int(token) for token in self.page.call("bench.tokenize", text)]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest continuation of a prompt, `count` tokens."""
        return [int(token) for token in self.page.call("bench.greedy", prompt, count)]


def measure(
    request: WorkerRequest,
    settings: PageSettings,
    target_score: float | None = None,
    throttling: Throttling | None = None,
) -> WorkerResult:
    """Take the samples of a request in a page.

    Args:
        request: What to measure.
        settings: How the page is opened.
        target_score: Slow the page down to this score first.
        throttling: What that came to before, to be used again.

    Raises:
        PhonereadyError: The browser or the page failed, or this machine is too weak for the score.
    """
    files = files_of(Path(request.path))
    prepare_page_cache(request.page_cache, files)
    share = page_cache_share(max(files, key=lambda file: file.stat().st_size))
    with open_page(settings, served_files(request)) as page:
        if target_score is not None and throttling is None:
            throttling = calibrate(page, target_score)
        model = open_model(page, request, settings, throttling)
        samples = _RUNNERS[request.workload.kind](model, request)
        peak = renderer_peak_bytes()
    return WorkerResult(
        samples_ns=samples or [model.load_ns],
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
        package: package_version(Path(settings.packages), package),
        "chromium": page.version,
        "playwright": _playwright_version(),
    }
    path = Path(request.path)
    facts = EngineFacts(
        model_type=path.stem,
        model_size=sum(file.stat().st_size for file in files_of(path)),
        model_n_params=None,
        backends="wasm",
        build_commit=None,
        versions=versions,
        system_info=f"{opened['runtime']}, {opened['threads']} threads",
    )
    return OpenModel(page, opened["vocabulary"], opened["bos"], _ns(opened["loaded"]), facts, baseline)


def main() -> None:
    """Serve one request."""
    _end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as results:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        payload = json.load(sys.stdin)
        try:
            result = measure(
                request_from_json(payload["request"]),
                PageSettings(**payload["settings"]),
                payload["target_score"],
                Throttling(**payload["throttling"]) if payload["throttling"] else None,
            )
        except (PhonereadyError, OSError, MemoryError) as error:
            result = WorkerResult(error=" ".join(str(error).split()) or type(error).__name__)
        json.dump(asdict(result), results, allow_nan=False)


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


def _run_load(model: OpenModel, request: WorkerRequest) -> list[int]:
    """Nothing more to time: the opening was the sample."""
    return []


def _run_prompt(model: OpenModel, request: WorkerRequest) -> list[int]:
    work = {"pieces": [random_tokens(model, request, request.workload.n_prompt)]}
    return _timed(model, request, work, work)


def _run_generation(model: OpenModel, request: WorkerRequest) -> list[int]:
    pieces = [[token] for token in random_tokens(model, request, request.workload.n_gen)]
    return _timed(model, request, {"pieces": pieces}, {"pieces": pieces[:1]})


def _run_first_token(model: OpenModel, request: WorkerRequest) -> list[int]:
    count = request.workload.n_prompt
    work = {"text": text_of(model, count), "count": count}
    return _timed(model, request, work, work)


_RUNNERS: MappingProxyType[str, Callable[[OpenModel, WorkerRequest], list[int]]] = MappingProxyType(
    {"load": _run_load, "pp": _run_prompt, "tg": _run_generation, "ttft": _run_first_token}
)


def _timed(model: OpenModel, request: WorkerRequest, work: Any, warmup: Any) -> list[int]:
    depth = request.workload.n_depth
    before = random_tokens(model, request, depth) if depth else []
    times = model.page.call("bench.time", work, warmup if request.warmup else None, before, request.samples)
    return [_ns(time) for time in times]


def _ns(milliseconds: float) -> int:
    return max(1, round(milliseconds * 1e6))


def _playwright_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("playwright")


def _end_with_parent() -> None:
    """Where the system can, be told to end when the process that waits for the result is gone."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
