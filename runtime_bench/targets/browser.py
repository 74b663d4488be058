"""A mobile browser, here: headless Chromium that passes for a phone's, with the model in a page as WebAssembly.

Its numbers are of kind `constrained-host`: this machine's processor at its own instructions, under what a browser
leaves of it. They say nothing of a phone unless the page is slowed down to a phone's score.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from cfsp.errors import InputError, PhonereadyError
from runtime_bench.browser.chromium import PageSettings, find_chromium, require_playwright
from runtime_bench.browser.packages import fetch_packages
from runtime_bench.environment import describe_environment
from runtime_bench.process import run_module
from runtime_bench.record import Environment
from runtime_bench.worker import WorkerRequest, WorkerResult

__all__ = ["BROWSER_ENGINES", "Browser"]

BROWSER_ENGINES = MappingProxyType({".onnx": "onnxruntime-web", ".gguf": "wllama"})
"""Suffix of a file -> what runs it in a page."""


@dataclass(frozen=True)
class Browser:
    """Headless Chromium on this machine.

    Attributes:
        mobile: Whether it passes for a phone's: screen, touch, user agent.
    """

    mobile: bool = True

    kind = "constrained-host"
    memory_limit_bytes = None

    @property
    def name(self) -> str:
        """As records have it."""
        return "browser(mobile)" if self.mobile else "browser"

    def default_engine(self, path: Path) -> str:
        """See `Target`."""
        found = BROWSER_ENGINES.get(path.suffix.lower())
        if found is None:
            raise InputError(
                "no page runs such a file", field="file", value=str(path), allowed=", ".join(BROWSER_ENGINES)
            )
        return found

    def require(self, engine: str) -> None:
        """See `Target`; whether the browser can be had shows in each run's result."""
        known = BROWSER_ENGINES.values()
        if engine not in known:
            raise InputError(
                "runs in no browser", field="engine", value=engine, allowed=", ".join(sorted(known))
            )

    def environment(self) -> Environment:
        """See `Target`."""
        return describe_environment()

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`: a browser of its own for every measurement."""
        if self.default_engine(Path(request.path)) != request.engine:
            return WorkerResult(
                error=f"{request.engine} runs no {Path(request.path).suffix} file in a browser"
            )
        try:
            require_playwright()
            settings = PageSettings(find_chromium(), str(fetch_packages()), self.mobile)
        except (PhonereadyError, OSError) as error:
            return WorkerResult(error=str(error))
        payload = {"request": asdict(request), "settings": asdict(settings)}
        # Chromium's profile goes with the folder, however the browser ends.
        with tempfile.TemporaryDirectory(prefix="phoneready-browser-", ignore_cleanup_errors=True) as scratch:
            return run_module(
                "runtime_bench.browser.worker", payload, timeout_s, environment={"TMPDIR": scratch}
            )
