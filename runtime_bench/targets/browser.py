"""A mobile browser, here: headless Chromium with the model in a page as WebAssembly.

Its numbers are of kind `constrained-host`: this machine's processor at its own instructions, under what a browser
leaves of it. They say nothing of a phone unless the page is slowed down to a phone's score.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from cfsp.child_process import python_module
from cfsp.errors import InputError, PhonereadyError, require_extra
from runtime_bench.browser.chromium import fetch_packages, find_chromium
from runtime_bench.environment import describe_environment
from runtime_bench.process import measure_in
from runtime_bench.records.bench_record import Environment
from runtime_bench.records.reported import Throttling
from runtime_bench.targets import ThisMachine
from runtime_bench.worker import WorkerRequest, WorkerResult

BROWSER_ENGINES = MappingProxyType({".onnx": "onnxruntime-web", ".gguf": "wllama"})
"""Suffix of a file -> what runs it in a page."""


@dataclass
class Browser(ThisMachine):
    """Headless Chromium on this machine."""

    device: str | None = None  # Id of the device that it stands for
    target_score: float | None = None  # The page is slowed down to this score; None leaves it as it is
    # What that came to in the first run that got so far; the runs after it use it again, so that files which
    # take turns have the same processor
    throttling: Throttling | None = field(default=None, init=False, compare=False)

    kind = "constrained-host"
    lasts = False

    def __post_init__(self) -> None:
        if self.target_score is not None and not 0 < self.target_score < math.inf:
            raise InputError("no score", field="score", value=self.target_score, allowed="more than 0")

    @property
    def name(self) -> str:
        """Such as `browser(pixel-8a, score=1500)`."""
        score = "not throttled" if self.target_score is None else f"score={self.target_score:g}"
        return f"browser({', '.join(filter(None, (self.device, score)))})"

    def default_engine(self, path: Path) -> str:
        engine = BROWSER_ENGINES.get(path.suffix.lower())
        if engine is None:
            allowed = ", ".join(BROWSER_ENGINES)
            raise InputError("no page runs such a file", field="file", value=str(path), allowed=allowed)
        return engine

    def require(self, engine: str) -> None:
        """See `Target`; whether the browser can be had shows in each run's result."""
        known = sorted(BROWSER_ENGINES.values())
        if engine not in known:
            raise InputError("runs in no browser", field="engine", value=engine, allowed=", ".join(known))

    def environment(self) -> Environment:
        """See `Target`; a page that is slowed down has one thread."""
        environment = describe_environment()
        return environment if self.target_score is None else replace(environment, cpus_usable=1)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`: a browser of its own for every measurement."""
        path = Path(request.path)
        if self.default_engine(path) != request.engine:
            return WorkerResult(error=f"{request.engine} runs no {path.suffix} file in a browser")
        try:
            require_extra("playwright", "browser")
            payload = {
                "request": asdict(request),
                "executable": find_chromium(),
                "packages": str(fetch_packages()),
                "target_score": self.target_score,
                "throttling": asdict(self.throttling) if self.throttling else None,
            }
        except (PhonereadyError, OSError) as error:
            return WorkerResult(error=str(error))
        # Chromium's profile goes with the folder, however the browser ends.
        with tempfile.TemporaryDirectory(prefix="phoneready-browser-", ignore_cleanup_errors=True) as scratch:
            command = python_module("runtime_bench.browser.worker")
            result = measure_in(
                command, payload, timeout_s, environment={"TMPDIR": scratch}, metered=request.energy
            )
        self.throttling = self.throttling or result.throttling
        seen, why = result.conditions, "a browser's processes are not told from others"
        conditions = seen.hiding("others_cores", why) if seen else None
        return replace(result, contention=None, conditions=conditions)
