"""A small chat service on a released GGUF file: checks it against the release's manifest, then serves it.

    pip install llama-cpp-python
    python serve.py release --quant Q4_0 --port 8080
    curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 32}'

It needs the release folder alone, not phoneready. It answers one request at a time and is for the local machine: put a
real server before it where others can reach it.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import sys
from pathlib import Path
from typing import Any

MOST_BYTES = 1_000_000
"""Longest request."""


def find_model(release: Path, quant: str) -> Path:
    """The GGUF file that ships of a quantization, if it is what the manifest says."""
    manifest = json.loads((release / "manifest.json").read_text(encoding="utf-8"))
    if manifest["kind"] != "release-manifest" or manifest["schema_version"] != 5:
        sys.exit(f"{release}/manifest.json is not one that this service knows")
    files = [f for f in manifest["files"] if f["role"] == "shipped" and f["format"] == "gguf"]
    chosen = next((f for f in files if f["quant"] == quant), None)
    if chosen is None:
        sys.exit(f"no {quant} in the release; there are {', '.join(f['quant'] for f in files)}")
    path = release / chosen["file"]
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != chosen["sha256"]:
        sys.exit(f"{path} is not the released file: its SHA-256 is {found}")
    return path


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /health and POST /v1/chat/completions, in OpenAI's form."""

    model: Any
    name: str

    def do_GET(self) -> None:
        """Say which model is served."""
        self.reply(200, {"status": "ok", "model": self.name}) if self.path == "/health" else self.reply(
            404, {}
        )

    def do_POST(self) -> None:
        """Answer a chat."""
        stated = self.headers.get("Content-Length") or ""
        length = int(stated) if stated.isdecimal() else 0
        if self.path != "/v1/chat/completions" or not 0 < length <= MOST_BYTES:
            self.reply(404 if length <= MOST_BYTES else 413, {})
            return
        try:
            asked = json.loads(self.rfile.read(length))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in asked["messages"]]
            count = max(1, min(int(asked.get("max_tokens", 128)), 1024))
            answer = self.model.create_chat_completion(messages, max_tokens=count, temperature=0.0)
        except (ValueError, KeyError, TypeError) as error:  # not a chat, or longer than the context
            self.reply(400, {"error": f"cannot be answered: {error}"})
            return
        self.reply(200, answer)

    def reply(self, status: int, payload: dict[str, Any]) -> None:
        """Send JSON."""
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Check, load, serve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("release", type=Path)
    parser.add_argument("--quant", default="Q4_0")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    path = find_model(options.release, options.quant)
    from llama_cpp import Llama

    Handler.model, Handler.name = Llama(str(path), n_ctx=options.context, verbose=False), path.name
    server = http.server.HTTPServer(("127.0.0.1", options.port), Handler)
    print(f"{path.name} on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
