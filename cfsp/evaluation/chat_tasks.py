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
from cfsp.evaluation.harness import MAX_CONTEXT
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
        InputError: The model has no chat template, or one that refuses a chat; or a chat that is longer with its answer
            than the model's context or MAX_CONTEXT.
    """
    answers = _answers(model, task, progress)
    known = [item.answer for item in task.items]
    metrics = [_share(EXACT, [a == b for a, b in zip(answers, known, strict=True)])]
    if task.is_json:
        same = [json_value(a) == json_value(b) for a, b in zip(answers, known, strict=True)]
        metrics.insert(0, _share(JSON, same))
    n_items = len(task.items)
    return TaskResult(task.name, _VERSION, task.source, task.sha256, n_items, task.limit, 0, tuple(metrics))


@dataclass(frozen=True)
class _Asked:
    """A chat as a model is asked it.

    Attributes:
        ids: Up to where it has to answer.
        n_known: Tokens of the known answer.
    """

    ids: list[int]
    n_known: int

    @property
    def most(self) -> int:
        """Tokens that it may answer with."""
        return self.n_known + _MARGIN


def check_chat_task(model: LanguageModel, task: ChatTask) -> None:
    """Raise InputError where a model cannot be asked: see `run_chat_task`."""
    _asked(model, task)


def _asked(model: LanguageModel, task: ChatTask) -> list[_Asked]:
    """All chats, each short enough for every runtime with its answer."""
    tokenizer = model.tokenizer
    asked = [_Asked(asked_ids(tokenizer, item), len(encode(tokenizer, item.answer))) for item in task.items]
    needed = max(len(one.ids) + one.most for one in asked)
    check_length(model, needed, f"a chat of {task.source}")
    if needed > MAX_CONTEXT:
        why = f"a chat of {task.source} has {needed} tokens"
        raise InputError(why, field="tasks", allowed=f"up to {MAX_CONTEXT}, its answer included")
    return asked


def _answers(model: LanguageModel, task: ChatTask, progress: Progress) -> list[str]:
    """What the model answers, in the chats' order; those of about the same length are written together."""
    asked = _asked(model, task)
    order = sorted(range(len(asked)), key=lambda index: asked[index].n_known, reverse=True)
    answers = [""] * len(asked)
    for start in range(0, len(order), _AT_ONCE):
        part = order[start : start + _AT_ONCE]
        longest = asked[part[0]].most
        written = model.generate([asked[index].ids for index in part], longest)
        for index, tokens in zip(part, written, strict=True):
            text = model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            answers[index] = str(text).strip()
        progress(f"answering {task.source}", start + len(part), len(order))
    return answers


def _share(name: str, right: list[bool]) -> TaskMetric:
    """A share with its standard error, sqrt(p (1 - p) / (n - 1))."""
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else None
    return TaskMetric(name, share, error, higher_is_better=True, right="".join("01"[one] for one in right))


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
