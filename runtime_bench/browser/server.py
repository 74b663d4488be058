"""A server on this machine's loopback for one page: its scripts, the packages, and the files of one model."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("page")


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
        """No listings."""
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
