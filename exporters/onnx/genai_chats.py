"""What ONNX Runtime GenAI makes of chats with a folder's tokenizer, template and stop tokens; no weights are read."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from cfsp.child_process import child_environment, python_module
from cfsp.errors import InputError
from cfsp.reading import one_line
from cfsp.text.conversations import CONVERSATIONS, Conversation
from exporters.chats import ReadChats, read_chats
from exporters.job import Job
from exporters.onnx.folder import GENAI_CONFIG

_SECONDS = 300.0


def genai_chats(job: Job, folder: Path) -> ReadChats:
    """Of a folder as it is; nothing of one that is not for GenAI, and where GenAI is not installed."""
    if not (folder / GENAI_CONFIG).is_file() or importlib.util.find_spec("onnxruntime_genai") is None:
        return ReadChats()
    found = _ask(folder)
    if "error" in found:
        return ReadChats(
            warnings=(f"GenAI cannot read the folder's tokenizer: {one_line(found['error'], 160)}",)
        )
    answers = dict(zip((one.name for one in CONVERSATIONS), found["read"], strict=True))

    def read(conversation: Conversation, _: str) -> list[int]:
        answer = answers[conversation.name]
        if "error" in answer:
            raise InputError(answer["error"])
        ids: list[int] = answer["ids"]
        return ids

    return read_chats("GenAI", job.tokenizer, job.stops, read, set(found["stops"]).__contains__)


def _ask(folder: Path) -> dict[str, Any]:
    """What `genai_worker` says."""
    request = json.dumps([[list(c.messages), list(c.tools) or None, c.to_be_answered] for c in CONVERSATIONS])
    try:
        result = subprocess.run(
            [*python_module("exporters.onnx.genai_worker"), str(folder)],
            input=request,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=child_environment(),
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it has not answered within {_SECONDS:g} s"}
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        return {"error": f"it ended with status {result.returncode}"}
    with suppress(ValueError):
        answer = json.loads(lines[-1])
        if isinstance(answer, dict):
            return answer
    return {"error": f"its answer cannot be read: {lines[-1]}"}
