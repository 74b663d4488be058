"""Headless Chromium with the benchmark's page in it, driven by Playwright.

The page, the npm packages that it loads and one model's files come from a server on this machine's loopback.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cfsp.errors import InputError, PhonereadyError, require_extra
from cfsp.files import made_once
from cfsp.models.builtin import cache_directory
from runtime_bench.counters import peak_rss_bytes
from runtime_bench.records.reported import Throttling

EXECUTABLE_VARIABLE = "PHONEREADY_CHROMIUM"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    # No renderer is kept ready for a second page: its memory would be in the figures.
    "--disable-features=SpareRendererForSitePerProcess",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-sync",
)
_MEMORY_MARKS = (
    "out of memory",
    "(oom)",
    "bad_alloc",
    "cannot enlarge memory",
    "could not allocate memory",
    "array buffer allocation failed",
)
# Going to a page of our own server is aborted by one thing only: its renderer is gone.
_CRASH_MARKS = ("crash", "has been closed", "net::err_aborted")
_PAGE = Path(__file__).with_name("page")
_PACKAGE_FILES = tuple(Path(__file__).with_name(name) for name in ("package.json", "package-lock.json"))
_NPM_S = 600
TOLERANCE = 0.1
"""Relative distance from a score that is near enough."""
_ATTEMPTS = 6


class BrowserError(PhonereadyError):
    """The browser or its page failed."""


def find_chromium() -> str:
    """Path of Chromium: PHONEREADY_CHROMIUM, or the first of the usual names in PATH. Raises InputError:
    there is none."""
    named = os.environ.get(EXECUTABLE_VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            raise InputError("cannot be run", field=EXECUTABLE_VARIABLE, value=named)
        return named
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        raise InputError(
            "Chromium is not installed", allowed=f"{', '.join(_NAMES)} in PATH, or {EXECUTABLE_VARIABLE}=FILE"
        )
    return executable


def fetch_packages() -> Path:
    """The folder `node_modules`, from the cache or from npm, in the versions and with the hashes of the lock
    file. Raises InputError: npm is not installed, cannot fetch them, or fetched something else than the lock
    has."""

    def install(folder: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise InputError(
                "npm is not installed; it fetches onnxruntime-web and wllama once, for the browser",
                allowed="Node.js with npm in PATH",
            )
        for file in _PACKAGE_FILES:
            shutil.copy(file, folder)
        # No package of these has to run anything to be installed.
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=_NPM_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(f"npm did not fetch the browser's packages within {_NPM_S} s") from error
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise InputError(f"npm cannot fetch the browser's packages: {lines[-1][:200]}")

    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in _PACKAGE_FILES)).hexdigest()[:12]
    return made_once(cache_directory() / "browser" / wanted, Path.is_dir, install) / "node_modules"


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files below the roots, isolated from other origins: only such a page may have threads."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: Any, roots: Mapping[str, Path], **options: Any) -> None:
        self._roots = roots
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        """The file of an address; one that is not there for all others."""
        root, _, rest = path.partition("?")[0].lstrip("/").partition("/")
        base = self._roots.get(root)
        if base is None:
            return ""
        if not rest:
            return str(base) if base.is_file() else ""
        file = (base / rest).resolve()
        return str(file) if file.is_relative_to(base.resolve()) else ""

    def list_directory(self, path: Any) -> None:
        self.send_error(http.HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        """Isolate the page, and keep nothing in the browser's cache."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that is ended in the middle of a file is no error."""


@contextmanager
def serve(roots: Mapping[str, Path]) -> Iterator[str]:
    """Serve files and folders under the first part of an address; gives the address of the server."""
    server = _Server(("127.0.0.1", 0), partial(_Handler, roots=roots))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Page:
    """The open tab. Every call waits for its end, and raises BrowserError if it failed or the page is gone.

    Attributes:
        version: Of Chromium.
    """

    def __init__(self, page: Any, devtools: Any, address: str, version: str) -> None:
        self._page, self._devtools, self._address, self.version = page, devtools, address, version

    def visit(self, file: str) -> None:
        """Open one of the files under `page/`."""
        with translated_errors():
            self._page.goto(f"{self._address}/page/{file}")
            if not self._page.evaluate("() => crossOriginIsolated"):
                raise BrowserError("the page is not isolated from other origins, so it may have no threads")

    def call(self, function: str, *arguments: Any) -> Any:
        """Call one of the functions that the page has put into its window."""
        with translated_errors():
            loaded = "window." + function.replace(".", "?.")
            self._page.wait_for_function(f"() => {loaded} !== undefined")
            return self._page.evaluate(f"(values) => window.{function}(...values)", list(arguments))

    def throttle(self, rate: float) -> None:
        """Slow the page's main thread down, roughly by this factor, and it alone; 1 lets it run."""
        with translated_errors():
            self._devtools.send("Emulation.setCPUThrottlingRate", {"rate": rate})


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn Playwright's errors into ours, with one line of reason."""
    from playwright.sync_api import Error

    try:
        yield
    except Error as error:
        lines = [line.strip() for line in str(error.message).splitlines() if line.strip()]
        first = (lines or ["no reason given"])[0].removeprefix("Page.evaluate: ")[:300]
        if any(mark in first.lower() for mark in _MEMORY_MARKS):
            raise BrowserError(f"out of memory in the page: {first}") from error
        if any(mark in first.lower() for mark in _CRASH_MARKS):
            raise BrowserError(f"the page crashed: {first}") from error
        raise BrowserError(f"the page failed: {first}") from error


@contextmanager
def open_page(executable: str, packages: Path, files: Mapping[str, Path]) -> Iterator[Page]:
    """Start a server and Chromium with an empty tab; all are gone afterwards. Raises BrowserError: Chromium
    does not start; MissingExtraError: playwright is not installed."""
    require_extra("playwright", "browser")
    from playwright.sync_api import sync_playwright

    roots = {"page": _PAGE, "packages": packages, **files}
    with serve(roots) as address, sync_playwright() as playwright, translated_errors():
        browser = playwright.chromium.launch(executable_path=executable, args=list(_ARGUMENTS))
        try:
            context = browser.new_context()
            page = context.new_page()
            yield Page(page, context.new_cdp_session(page), address, browser.version)
        finally:
            browser.close()


def renderer_bytes() -> tuple[int | None, int | None]:
    """Of the largest renderer: resident memory now, and the most that a living one has had (only Linux says it)."""
    import psutil

    now, peak = [], []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("--type=renderer" in part for part in process.cmdline()):
                now.append(int(process.memory_info().rss))
                peak.append(peak_rss_bytes(process.pid))
    return max(now, default=None), max(filter(None, peak), default=None)


def calibrate(page: Page, target_score: float) -> Throttling:
    """Throttle the page until it has a device's score.

    The score is a speed of one thread in WebAssembly (`page/score.html`, which any phone can open).
    Chromium's throttling keeps a rate only roughly, so what it reaches is measured, and the rate corrected.
    It stops the page's main thread only, so whatever is throttled has to run there, in one thread. Raises
    InputError: this machine's score is below the device's; BrowserError: its speed changes too much to be
    held to the score.
    """
    page.visit("score.html?quiet")
    page.throttle(1)
    host_score = float(page.call("score"))
    if host_score < target_score * (1 - TOLERANCE):  # nothing is made faster than it is
        raise InputError(
            f"this machine's browser has the score {host_score:.0f}: too weak to stand for the device",
            field="score",
            value=target_score,
            allowed=f"up to {host_score:.0f}",
        )
    rate, reached = max(1.0, host_score / target_score), host_score
    for _ in range(_ATTEMPTS):
        if rate > 1:
            page.throttle(rate)
            reached = float(page.call("score"))
        if abs(reached / target_score - 1) <= TOLERANCE:
            return Throttling(target_score, host_score, rate, reached)
        rate = max(1.0, rate * reached / target_score)  # which would have reached it, were throttling exact
    raise BrowserError(
        f"the page could not be held to the score {target_score:g}: it had {reached:.0f} at the rate {rate:.2f}; "
        "other programs may be using the processor"
    )
