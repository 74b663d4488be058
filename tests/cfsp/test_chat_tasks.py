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


def written(path: Path, chats: Sequence[Sequence[str]]) -> Path:
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(chat)]}
        for chat in chats
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def figures(result: TaskResult) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


def test_answers_that_are_the_known_ones_are_counted(
    language_model: TorchLanguageModel, tmp_path: Path
) -> None:
    tokenizer = language_model.tokenizer
    (first,) = language_model.generate([asked_ids(language_model, item("What is this?", "-"))], 12)
    # Where the model says this token, its answer ends.
    end = next(n for n in range(3, 12) if first[n] not in first[:n])
    language_model.loaded.model.generation_config.eos_token_id = first[end]
    known = str(tokenizer.decode(first[:end])).strip()
    for answer, share in ((known, 0.5), (known + "?", 0.0)):
        path = written(
            tmp_path / "mine.jsonl", [("What is this?", answer), ("And this?", "no model says this")]
        )
        (result,) = run(language_model, path)
        assert (result.task, result.source, result.n_items, result.limit) == ("mine", "mine.jsonl", 2, None)
        assert figures(result) == {"exact_match": share}
        assert result.metrics[0].stderr == pytest.approx(share)
        assert result.metrics[0].right == ("10" if share else "00")


def asked_ids(model: TorchLanguageModel, asked: ChatItem) -> list[int]:
    ((ids, _),) = chat_requests(model, ChatTask("t", "t.jsonl", "", (asked,)))
    return ids


def item(asked: str, answer: str) -> ChatItem:
    return ChatItem(({"role": "user", "content": asked},), answer)


@pytest.mark.parametrize(
    ("known", "answer", "right"),
    [
        ('{"a": 1, "b": [true]}', '{"b":[true],"a":1.0}', True),
        ('{"a": 1}', ' {"a": 1}\n', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": 1}', '{"a": 1} and so on', False),
        ('{"a": 1}', '{"a": NaN}', False),
        ('{"a": 1}', "[" * 100_000, False),
        ("[1, 2]", "[2, 1]", False),
    ],
)
def test_json_is_compared_by_its_value(known: str, answer: str, right: bool) -> None:
    assert (json_value(answer) == json_value(known)) == right


def test_values_count_where_all_known_answers_are_json(language_model: TorchLanguageModel) -> None:
    answers = ("[1]", '{"a": 2}')
    task = ChatTask("t", "t.jsonl", "", tuple(item("Which?", answer) for answer in answers))
    assert list(figures(run_chat_task(language_model, task))) == ["json_match", "exact_match"]
    mixed = ChatTask("t", "t.jsonl", "", (*task.items, item("Who?", "you")))
    assert list(figures(run_chat_task(language_model, mixed))) == ["exact_match"]


def test_all_turns_before_the_answer_are_asked(language_model: TorchLanguageModel, tmp_path: Path) -> None:
    path = written(tmp_path / "turns.jsonl", [("one", "two", "three", "four")])
    (turns,) = load_chat_task(str(path)).items
    text = language_model.tokenizer.decode(asked_ids(language_model, turns))
    assert text == "<s>user\none</s><s>assistant\ntwo</s><s>user\nthree</s><s>assistant\n"
    assert turns.answer == "four"


def run(model: Any, *tasks: Path, **settings: Any) -> tuple[TaskResult, ...]:
    with load_tasks(TaskSettings(tuple(map(str, tasks)), **settings)) as loaded:
        return run_tasks(model, loaded)


def test_a_limit_takes_the_first_and_the_hash_is_the_files(
    language_model: TorchLanguageModel, tmp_path: Path
) -> None:
    path = written(tmp_path / "calls.jsonl", [("a", "b"), ("c", "d"), ("e", "f")])
    with load_tasks(TaskSettings((str(path),), limit=2)) as tasks:
        done = run_tasks(language_model, tasks)
        assert [(one.n_items, one.limit, one.sha256) for one in done] == [
            (2, 2, tasks_sha256(str(path), None))
        ]


def test_chats_need_no_harness(tmp_path: Path) -> None:
    assert [needs_harness(name) for name in ("calls.jsonl", "calls.parquet", "piqa", "piqa.yaml")] == [
        False,
        False,
        True,
        True,
    ]


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
    with pytest.raises(InputError, match=reason), load_tasks(TaskSettings((str(path),))):
        pass


def test_what_chats_cannot_be_asked_is_refused(language_model: TorchLanguageModel, tmp_path: Path) -> None:
    path = written(tmp_path / "calls.jsonl", [("a", "b")])
    (tmp_path / "more").mkdir()
    twin = written(tmp_path / "more" / "calls.jsonl", [("a", "b")])
    for tasks, settings, reason in (
        ((path,), {"num_fewshot": 2}, "num_fewshot"),
        ((path, twin), {}, "given twice"),
        ((tmp_path / "none.jsonl",), {}, "does not exist"),
    ):
        with pytest.raises(InputError, match=reason):
            run(language_model, *tasks, **settings)
    with pytest.raises(InputError, match="no such file of chats"):
        tasks_sha256(str(tmp_path / "none.jsonl"), None)
    long = written(tmp_path / "long.jsonl", [("word " * 600, "b")])
    with pytest.raises(InputError, match=r"a chat of long\.jsonl has \d+ tokens"):
        run(language_model, long)
    language_model.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        run(language_model, path)


def test_the_loaded_task_is_what_the_file_says(tmp_path: Path) -> None:
    path = written(tmp_path / "calls.jsonl", [("a", ' {"b": 2} ')])
    task = load_chat_task(str(path))
    assert task.items == (item("a", '{"b": 2}'),)
