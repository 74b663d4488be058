"""What ONNX Runtime GenAI makes of chats with a folder's tokenizer, template and stop tokens; no weights are read.

GenAI's own Jinja knows less than transformers'. Where white space is the difference, the folder gets a template that
writes it out.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from cfsp.child_process import child_environment, python_module
from cfsp.errors import InputError
from cfsp.files import write_json, write_text
from cfsp.reading import one_line, read_json
from cfsp.text.conversations import CONVERSATIONS, Conversation, rendered
from exporters.chats import ReadChats, read_chats
from exporters.job import Job
from exporters.onnx.chat_whitespace import explicit_whitespace
from exporters.onnx.folder import GENAI_CONFIG

_SECONDS = 300.0


def write_template(folder: Path, template: str) -> None:
    """Make a text the chat template of a variant's folder, for all of its readers."""
    # transformers.js knows it from here alone.
    file = folder / "tokenizer_config.json"
    write_json(file, read_json(file) | {"chat_template": template})
    write_text(folder / "chat_template.jinja", template)


def settled_chats(job: Job, folder: Path) -> ReadChats:
    """What GenAI makes of chats with a variant's folder, with its template's white space written out where that helps.

    What transformers makes of the template stays the same.
    """
    template, tokenizer, before = job.tokenizer.chat_template, job.tokenizer, _genai_chats(job, folder)
    if not isinstance(template, str):
        return before
    texts, explicit = rendered(tokenizer), explicit_whitespace(template)
    if explicit is None or len(before.equal) == len(texts) or rendered(tokenizer, template=explicit) != texts:
        return before
    write_template(folder, explicit)
    after = _genai_chats(job, folder)
    if len(after.equal) > len(before.equal):
        return after
    write_template(folder, template)
    return before


def _genai_chats(job: Job, folder: Path) -> ReadChats:
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
