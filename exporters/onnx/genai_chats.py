"""What ONNX Runtime GenAI makes of chats with a folder's tokenizer, template and stop tokens; no weights are read.

GenAI's own Jinja knows less than transformers'. Where white space is the difference, the folder gets a template that
writes it out.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from cfsp.files import write_json, write_text
from cfsp.reading import read_json
from cfsp.text.conversations import Conversation, rendered
from exporters.chats import ReadChats, read_chats
from exporters.job import Job
from exporters.onnx.chat_whitespace import explicit_whitespace
from exporters.onnx.folder import GENAI_CONFIG


def write_template(folder: Path, template: str) -> None:
    """Make a text the chat template of a variant's folder, for all of its readers."""
    # transformers.js knows it from here alone.
    file = folder / "tokenizer_config.json"
    write_json(file, read_json(file) | {"chat_template": template})
    write_text(folder / "chat_template.jinja", template)


def settle_template(job: Job, folder: Path) -> None:
    """Write a template's white space out, in a variant's folder, where GenAI then reads more chats as they should be.

    What transformers makes of it stays the same.
    """
    template, tokenizer = job.tokenizer.chat_template, job.tokenizer
    if not isinstance(template, str):
        return
    before = genai_chats(job, folder)
    explicit = explicit_whitespace(template)
    if len(before.equal) == len(rendered(tokenizer)) or rendered(tokenizer, template=explicit) != rendered(
        tokenizer
    ):
        return
    write_template(folder, explicit)
    if len(genai_chats(job, folder).equal) <= len(before.equal):
        write_template(folder, template)


def genai_chats(job: Job, folder: Path) -> ReadChats:
    """Of a variant's folder; nothing of one that is not for GenAI, and where GenAI is not installed."""
    if not (folder / GENAI_CONFIG).is_file() or importlib.util.find_spec("onnxruntime_genai") is None:
        return ReadChats()
    import onnxruntime_genai

    tokenizer = onnxruntime_genai.Tokenizer(str(folder))

    def read(conversation: Conversation, _: str) -> list[int]:
        tools = json.dumps(list(conversation.tools)) if conversation.tools else None
        text = tokenizer.apply_chat_template(
            json.dumps(list(conversation.messages)),
            tools=tools,
            add_generation_prompt=conversation.to_be_answered,
        )
        ids: list[int] = tokenizer.encode(text).tolist()
        return ids

    stops = set(tokenizer.eos_token_ids)
    return read_chats("GenAI", job.tokenizer, job.stops, read, stops.__contains__)
