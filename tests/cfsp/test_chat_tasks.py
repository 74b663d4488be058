"""Chats whose last answer is known, as a task: what counts as that answer, what is asked, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.evaluation.task_results import TaskResult, TaskSettings
from cfsp.evaluation.tasks import (
    ChatItem,
    ChatTask,
    chat_requests,
    json_value,
    load_chat_task,
    load_tasks,
    needs_harness,
    run_chat_task,
    run_tasks,
    tasks_sha256,
)
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.source import LoadedModel

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def language_model(tiny_loaded: Callable[..., LoadedModel]) -> TorchLanguageModel:
    model = TorchLanguageModel(tiny_loaded())
    model.tokenizer.chat_template = CHATML
    return model


def written(path: Path, *chats: Sequence[str]) -> Path:
    roles = ("user", "assistant")
    rows = [[{"role": roles[n % 2], "content": text} for n, text in enumerate(chat)] for chat in chats]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def task(*chats: tuple[str, str]) -> ChatTask:
    items = (ChatItem(({"role": "user", "content": asked},), answer) for asked, answer in chats)
    return ChatTask("t", "t.jsonl", "", tuple(items))


def run(model: Any, *tasks: Path, **settings: Any) -> tuple[TaskResult, ...]:
    with load_tasks(TaskSettings(tuple(map(str, tasks)), **settings)) as loaded:
        return run_tasks(model, loaded)


def test_answers_that_are_the_known_ones_are_counted(
    language_model: TorchLanguageModel, tmp_path: Path
) -> None:
    tokenizer = language_model.tokenizer
    ((asked, _),) = chat_requests(language_model, task(("What is this?", "-")))
    (first,) = language_model.generate([asked], 12)
    # Where the model says this token, its answer ends.
    end = next(n for n in range(3, 12) if first[n] not in first[:n])
    language_model.loaded.model.generation_config.eos_token_id = first[end]
    known = str(tokenizer.decode(first[:end])).strip()
    for answer, share in ((known, 0.5), (known + "?", 0.0)):
        path = written(
            tmp_path / "mine.jsonl", ("What is this?", f" {answer} "), ("And this?", "no model says it")
        )
        (result,) = run(language_model, path)
        assert (result.task, result.source, result.n_items, result.limit) == ("mine", "mine.jsonl", 2, None)
        (metric,) = result.metrics
        assert (metric.name, metric.value, metric.stderr) == ("exact_match", share, pytest.approx(share))
        assert metric.right == ("10" if share else "00")


def test_json_is_compared_by_its_value_if_all_known_answers_are_json(
    language_model: TorchLanguageModel,
) -> None:
    for known, answer, right in (
        ('{"a": 1, "b": [true]}', '{"b":[true],"a":1.0}', True),
        ('{"a": 1}', ' {"a": 1}\n', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": 1}', '{"a": 1} and so on', False),
        ('{"a": 1}', '{"a": NaN}', False),
        ('{"a": 1}', "[" * 100_000, False),
        ("[1, 2]", "[2, 1]", False),
    ):
        assert (json_value(answer) == json_value(known)) == right, answer
    answers = [("Which?", "[1]"), ("Which?", '{"a": 2}')]
    for chats, names in (
        (answers, ["json_match", "exact_match"]),
        ([*answers, ("Who?", "you")], ["exact_match"]),
    ):
        found = run_chat_task(language_model, task(*chats))
        assert [metric.name for metric in found.metrics] == names


def test_all_turns_before_the_answer_are_asked(language_model: TorchLanguageModel, tmp_path: Path) -> None:
    path = written(tmp_path / "turns.jsonl", ("one", "two", "three", "four"), ("a", "b"), ("c", "d"))
    turns = load_chat_task(str(path), 1)
    assert [item.answer for item in turns.items] == ["four"]
    text = language_model.tokenizer.decode(chat_requests(language_model, turns)[0][0])
    assert text == "<s>user\none</s><s>assistant\ntwo</s><s>user\nthree</s><s>assistant\n"
    (done,) = run(language_model, path, limit=2)
    assert (done.n_items, done.limit, done.sha256) == (2, 2, tasks_sha256(str(path), None))
    names = ("calls.jsonl", "calls.parquet", "piqa", "piqa.yaml")
    assert [needs_harness(name) for name in names] == [False, False, True, True]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ('{"text": "no chat"}\n', "chat 1 of .* has no known answer"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "chat 1 of .* has no known answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "chat 1 of .* has no known answer"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}\n',
            "answer",
        ),
        ("", "no usable text"),
        ("{", "bad.jsonl"),
    ],
)
def test_rows_that_are_no_such_chats_are_named(rows: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(rows, encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        load_chat_task(str(path))


def test_what_chats_cannot_be_asked_is_refused(language_model: TorchLanguageModel, tmp_path: Path) -> None:
    path, none = written(tmp_path / "calls.jsonl", ("a", "b")), tmp_path / "none.jsonl"
    (tmp_path / "more").mkdir()
    twin = written(tmp_path / "more" / "calls.jsonl", ("a", "b"))
    long = written(tmp_path / "long.jsonl", ("word " * 600, "b"))
    for tasks, settings, reason in (
        ((path,), {"num_fewshot": 2}, "num_fewshot"),
        ((path, twin), {}, "given twice"),
        ((none,), {}, "does not exist"),
        ((long,), {}, r"a chat of long\.jsonl has \d+ tokens"),
    ):
        with pytest.raises(InputError, match=reason):
            run(language_model, *tasks, **settings)
    with pytest.raises(InputError, match="no such file of chats"):
        tasks_sha256(str(none), None)
    language_model.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        run(language_model, path)
