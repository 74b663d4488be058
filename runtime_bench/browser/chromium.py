"""Headless Chromium with the benchmark's page in it, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.errors import InputError, PhonereadyError, require_extra
from runtime_bench.browser.server import PAGE, serve
from runtime_bench.counters import peak_rss_bytes

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
MOBILE: Mapping[str, Any] = {
    "viewport": {"width": 412, "height": 915},
    "device_scale_factor": 2.625,
    "is_mobile": True,
    "has_touch": True,
}
"""A common Android phone's screen in CSS pixels."""
MOBILE_AGENT = (
    "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/{major}.0.0.0 Mobile Safari/537.36"
)
"""What Chrome says of itself on every Android device: https://www.chromium.org/updates/ua-reduction/."""
_MEMORY_MARKS = (
    "out of memory",
    "(oom)",
    "bad_alloc",
    "cannot enlarge memory",
    "could not allocate memory",
    "array buffer allocation failed",
)
# Going to a page of our own server is aborted by one thing alone: its renderer is gone.
_CRASH_MARKS = ("crash", "has been closed", "net::err_aborted")


class BrowserError(PhonereadyError):
    """The browser or its page failed."""


@dataclass(frozen=True)
class PageSettings:
    """How the page is opened."""

    executable: str  # Chromium
    packages: str  # Folder of the npm packages
    mobile: bool = True  # Whether the browser passes for a phone's: screen, touch, user agent


def find_chromium() -> str:
    """Path of Chromium: PHONEREADY_CHROMIUM, or the first of the usual names in PATH.

    Raises:
        InputError: There is none.
    """
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


class Page:
    """The open tab. Every call waits for its end.

    Attributes:
        version: Of Chromium.
    """

    def __init__(self, page: Any, devtools: Any, address: str, version: str) -> None:
        self._page, self._devtools, self._address, self.version = page, devtools, address, version

    def visit(self, file: str) -> None:
        """Open one of the files under `page/`.

        Raises:
            BrowserError: It does not load.
        """
        with translated_errors():
            self._page.goto(f"{self._address}/page/{file}")
            if not self._page.evaluate("() => crossOriginIsolated"):
                raise BrowserError("the page is not isolated from other origins, so it may have no threads")

    def call(self, function: str, *arguments: Any) -> Any:
        """Call one of the functions that the page has put into its window.

        Raises:
            BrowserError: It failed, memory ran out, or the page is gone.
        """
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
        raise BrowserError(_reason(str(error.message))) from error


@contextmanager
def open_page(settings: PageSettings, files: Mapping[str, Path]) -> Iterator[Page]:
    """Start a server and Chromium with an empty tab; all are gone afterwards.

    Raises:
        BrowserError: Chromium does not start.
        MissingExtraError: Playwright is not installed.
    """
    require_extra("playwright", "browser")
    from playwright.sync_api import sync_playwright

    roots = {"page": PAGE, "packages": Path(settings.packages), **files}
    with serve(roots) as address, sync_playwright() as playwright, translated_errors():
        browser = playwright.chromium.launch(executable_path=settings.executable, args=list(_ARGUMENTS))
        try:
            major = browser.version.partition(".")[0]
            options = dict(MOBILE, user_agent=MOBILE_AGENT.format(major=major)) if settings.mobile else {}
            context = browser.new_context(**options)
            page = context.new_page()
            yield Page(page, context.new_cdp_session(page), address, browser.version)
        finally:
            browser.close()


def renderer_rss_bytes() -> int | None:
    """Resident memory of the largest renderer now; None where there is none."""
    return max((int(process.memory_info().rss) for process in _renderers()), default=None)


def renderer_peak_bytes() -> int | None:
    """The most resident memory that a living renderer has had; None where the system does not say (only Linux does)."""
    return max(filter(None, (peak_rss_bytes(process.pid) for process in _renderers())), default=None)


def _renderers() -> Iterator[Any]:
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("--type=renderer" in part for part in process.cmdline()):
                yield process


def _reason(message: str) -> str:
    """The line of a message that says why."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    first = lines[0] if lines else "no reason given"
    first = first.removeprefix("Page.evaluate: ")[:300]
    if any(mark in first.lower() for mark in _MEMORY_MARKS):
        return f"out of memory in the page: {first}"
    if any(mark in first.lower() for mark in _CRASH_MARKS):
        return f"the page crashed: {first}"
    return f"the page failed: {first}"
