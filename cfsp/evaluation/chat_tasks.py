"""Tasks that are chats whose last answer is known: what a model answers is held against it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.evaluation.language_model import LanguageModel, check_length
from cfsp.evaluation.task_results import TaskMetric, TaskResult
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from cfsp.text.encoding import encode
from cfsp.text.templates import render_chat
from cfsp.text.tokens import Document, load_documents

CHAT_SUFFIXES = (".jsonl", ".parquet")
"""Of files that hold chats."""
EXACT, JSON = "exact_match", "json_match"
"""Whether an answer is the known one: its text but for white space around it; the value that it is in JSON."""
_VERSION = "1"
_MARGIN = 16
"""Tokens that an answer may have beyond the longest known one that is written with it."""
_AT_ONCE = 64


@dataclass(frozen=True)
class ChatItem:
    """A chat up to an answer.

    Attributes:
        messages: All before it.
        answer: The known one, without white space around it.
    """

    messages: tuple[Mapping[str, str], ...]
    answer: str


@dataclass(frozen=True)
class ChatTask:
    """Chats of one file.

    Attributes:
        name: The file's, without its suffix.
        source: The file's name.
        sha256: Hash of the file.
        items: Its chats, in order.
        limit: How many of them were asked for, where not all.
    """

    name: str
    source: str
    sha256: str
    items: tuple[ChatItem, ...]
    limit: int | None = None

    @property
    def is_json(self) -> bool:
        """Whether every known answer is an object or an array in JSON."""
        return all(isinstance(json_value(item.answer), dict | list) for item in self.items)


def is_chat_file(name: str) -> bool:
    """Whether a name of a task is that of a file of chats."""
    return Path(name).suffix in CHAT_SUFFIXES


def load_chat_task(name: str, limit: int | None = None) -> ChatTask:
    """A file's chats as a task.

    Raises:
        InputError: No such file, or a row of it that is no chat which ends with an answer.
    """
    path = Path(name)
    documents = load_documents(name)[:limit]
    items = tuple(_item(document, number, path) for number, document in enumerate(documents, 1))
    return ChatTask(path.stem, path.name, sha256_file(path), items, limit)


def _item(document: Document, number: int, path: Path) -> ChatItem:
    messages = document.messages or ()
    answer = messages[-1]["content"].strip() if messages and messages[-1]["role"] == "assistant" else ""
    if len(messages) < 2 or not answer:
        raise InputError(
            f"chat {number} of {path} has no known answer",
            field="tasks",
            allowed="`messages` whose last is the assistant's, with something before it",
        )
    return ChatItem(messages[:-1], answer)


def asked_ids(tokenizer: Any, item: ChatItem) -> list[int]:
    """Token ids of a chat in the model's template, up to where the model has to answer; raises as `render_chat`."""
    return encode(tokenizer, render_chat(tokenizer, item.messages, add_generation_prompt=True))


def run_chat_task(model: LanguageModel, task: ChatTask, *, progress: Progress = no_progress) -> TaskResult:
    """Let a model answer greedily, in its own chat template, and count the answers that are the known ones.

    Raises:
        InputError: The model has no chat template, or one that refuses a chat; a chat that is longer than its context.
    """
    answers = _answers(model, task, progress)
    known = [item.answer for item in task.items]
    metrics = [_share(EXACT, [a == b for a, b in zip(answers, known, strict=True)])]
    if task.is_json:
        same = [json_value(a) == json_value(b) for a, b in zip(answers, known, strict=True)]
        metrics.insert(0, _share(JSON, same))
    n_items = len(task.items)
    return TaskResult(task.name, _VERSION, task.source, task.sha256, n_items, task.limit, 0, tuple(metrics))


def _answers(model: LanguageModel, task: ChatTask, progress: Progress) -> list[str]:
    """What the model answers, in the chats' order; those of about the same length are written together."""
    tokenizer = model.tokenizer
    prompts = [asked_ids(tokenizer, item) for item in task.items]
    lengths = [len(encode(tokenizer, item.answer)) for item in task.items]
    order = sorted(range(len(prompts)), key=lambda index: lengths[index], reverse=True)
    answers = [""] * len(prompts)
    for start in range(0, len(order), _AT_ONCE):
        part = order[start : start + _AT_ONCE]
        longest = lengths[part[0]] + _MARGIN
        check_length(model, max(len(prompts[i]) for i in part) + longest, f"a chat of {task.source}")
        written = model.generate([prompts[index] for index in part], longest)
        for index, tokens in zip(part, written, strict=True):
            answers[index] = str(tokenizer.decode(tokens)).strip()
        progress(f"answering {task.source}", start + len(part), len(order))
    return answers


def _share(name: str, right: list[bool]) -> TaskMetric:
    """A share with its standard error, sqrt(p (1 - p) / (n - 1))."""
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else None
    return TaskMetric(name, share, error, higher_is_better=True)


def _number(text: str) -> tuple[str, Decimal]:
    """A number of JSON, which is no truth value: 1 is 1.0 and not true."""
    return "number", Decimal(text)


def _not_json(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def json_value(text: str) -> Any:
    """The value of a text in JSON, to be compared; the text where it is none."""
    try:
        return json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_not_json)
    except (ValueError, ArithmeticError, RecursionError):
        return text
