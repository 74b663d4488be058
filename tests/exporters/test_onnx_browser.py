"""onnxruntime-web, in headless Chromium, loads exported graphs from a local server and generates with them."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.onnx import VARIANTS
from exporters.onnx.folder import find_graph
from exporters.onnx.language_model import OnnxLanguageModel
from exporters.onnx.runtime import open_model

JAVASCRIPT = Path(__file__).resolve().parents[1] / "javascript"
LIMITS = {"fp32": 1e-3, "int8-dynamic": 1e-3, "int8": 0.25, "int4": 0.25}
"""Most that a logit may differ, in standard deviations of a row: MatMulNBits rounds activations in its own way."""
PROMPT = [5, 17, 300, 42, 9]
COUNT = 16


class Handler(http.server.SimpleHTTPRequestHandler):
    """The page and its packages, and under /model/ a variant; isolated, as threads in a page ask for."""

    model: Path

    def translate_path(self, path: str) -> str:
        if path.startswith("/model/"):
            return str(self.model / path.removeprefix("/model/"))
        return super().translate_path(path)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("Chromium is not installed")
    if not (JAVASCRIPT / "node_modules" / ".installed").is_file():
        pytest.skip("onnxruntime-web is not installed; `make javascript` installs it")
    with playwright.sync_playwright() as session:
        chromium = session.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("variant", LIMITS)
def test_a_page_generates_the_same_tokens(browser: Any, browser_export: Path, variant: str) -> None:
    handler = type("VariantHandler", (Handler,), {"model": browser_export / variant})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(JAVASCRIPT)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page, problems = browser.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    try:
        page.goto(f"http://127.0.0.1:{server.server_port}/browser.html")
        page.wait_for_function("() => Boolean(window.generate)")
        arguments = [VARIANTS[variant].stem, PROMPT, COUNT]
        found = page.evaluate("([stem, prompt, count]) => generate(stem, prompt, count)", arguments)
    finally:
        page.close()
        server.shutdown()
        server.server_close()
    assert problems == []
    assert found["isolated"]
    model = OnnxLanguageModel(str(browser_export / variant), n_threads=1)
    (expected,) = model.generate([PROMPT], COUNT)
    model.close()
    with_cache = open_model(find_graph(str(browser_export / variant)), n_ctx=64, n_threads=1)
    logits = with_cache.decode(PROMPT)[-1]
    with_cache.close()
    difference = np.abs(np.array(found["logits"]) - logits).max() / logits.std()
    assert difference < LIMITS[variant]
    # The page does not stop where an answer ends.
    assert expected
    if LIMITS[variant] < 0.01:
        assert found["tokens"][: len(expected)] == expected
