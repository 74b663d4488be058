"""Tasks: lm-evaluation-harness's own by name, task files of its format, and chats whose last answer is known.

A task file is read without a network. Relative `data_files` and `data_dir` in it start at the folder given for data, or
at the file's own folder. Chats need no lm_eval.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cfsp.devices import gpu_count
from cfsp.errors import InputError, MissingExtraError, PhonereadyError
from cfsp.evaluation.language_model import Branches, LanguageModel, check_length
from cfsp.evaluation.task_results import TaskMetric, TaskResult, TaskSettings
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from cfsp.reading import read_bytes
from cfsp.settings import check_settings
from cfsp.text.tokens import encode, load_documents, render_chat
from cfsp.validation import check_kinds, kinds

MAX_CONTEXT = 2048  # tokens of a request, in every runtime; longer ones lose their beginning
_MAX_NEW_TOKENS = 256
_AT_ONCE = 64
_SEED = 1234
_BOOTSTRAP = 1000
_SUFFIXES = (".yaml", ".yml")
_MOST_BYTES = 2**20  # of a task file
_TASK = kinds(task=str, dataset_kwargs=dict[str, Any] | None)
_CHAT_SUFFIXES = (".jsonl", ".parquet")
_MARGIN = 16  # tokens that an answer may have beyond the longest known one that is written with it


def import_harness() -> Any:
    """The lm_eval package; raises MissingExtraError if it is not installed."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise MissingExtraError("lm_eval", "eval") from error
    return lm_eval


def harness_model(model: LanguageModel, *, progress: Progress = no_progress) -> Any:
    """An lm_eval.api.model.TemplateLM around a model."""
    # Made here, as its base class is of an optional package.
    adapter: Any = type("Adapter", (_Requests, import_harness().api.model.TemplateLM), {})
    return adapter(model, progress)


class _Requests:
    """What lm_eval asks of a model; its TemplateLM comes after this class and does the rest."""

    def __init__(self, model: LanguageModel, progress: Progress) -> None:
        super().__init__()
        self.model, self.progress, self.tokenizer = model, progress, model.tokenizer
        self.max_length = min(model.context_length, MAX_CONTEXT)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return int(next((number for number in ids if number is not None), 0))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return encode(self.tokenizer, string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Requests with one context (the choices of a question) are scored together, so it is run once."""
        indices: dict[tuple[int, ...], list[int]] = {}
        continuations: list[tuple[int, ...]] = []
        for index, (_, context, continuation) in enumerate(requests):
            ids = [*context, *continuation][-(self.max_length + 1) :]
            start = max(1, len(ids) - len(continuation))
            indices.setdefault(tuple(ids[:start]), []).append(index)
            continuations.append(tuple(ids[start:]))
        items = [Branches(one, tuple(continuations[i] for i in same)) for one, same in indices.items()]
        items.sort(key=lambda item: len(item.context), reverse=True)
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(continuations)
        done = 0
        for start in range(0, len(items), _AT_ONCE):
            part = items[start : start + _AT_ONCE]
            for item, found in zip(part, self.model.score(part), strict=True):
                for index, score in zip(indices[item.context], found, strict=True):
                    scores[index] = (score.log_likelihood, score.is_greedy)
                done += len(found)
            self.progress("scoring choices", done, len(scores))
        return scores

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        raise InputError(
            "tasks that measure the likelihood of whole texts are not supported", allowed="--text"
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Requests that end alike are written together."""
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            settings: Mapping[str, Any] = request.args[1]
            if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
                why = "tasks that sample are not supported"
                raise InputError(why, field="do_sample", value=True, allowed="false")
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or _MAX_NEW_TOKENS)
            ending = min(limit, self.max_length - 1), tuple(stop for stop in until if stop)
            alike.setdefault(ending, []).append(index)
        texts, done = [""] * len(requests), 0
        for (limit, stops), indices in alike.items():
            for start in range(0, len(indices), _AT_ONCE):
                part = indices[start : start + _AT_ONCE]
                contexts = [self.tok_encode(requests[index].args[0]) for index in part]
                prompts = [ids[-(self.max_length - limit) :] or [self.prefix_token_id] for ids in contexts]
                answers = self.model.generate(prompts, limit, stop_strings=stops)
                for index, answer in zip(part, answers, strict=True):
                    text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
                    for stop in stops:
                        text = text.partition(stop)[0]
                    texts[index] = text
                done += len(part)
                self.progress("answering tasks", done, len(requests))
        return texts


class ChatItem(NamedTuple):
    """The messages of a chat before its last answer, and that answer without white space around it."""

    messages: tuple[Mapping[str, str], ...]
    answer: str


class ChatTask(NamedTuple):
    """Chats of one file: its name without suffix, its name, its hash, the chats, and how many were asked for."""

    name: str
    source: str
    sha256: str
    items: tuple[ChatItem, ...]
    limit: int | None = None


def needs_harness(name: str) -> bool:
    """Whether a task is one of lm-evaluation-harness, and no file of chats."""
    return Path(name).suffix not in _CHAT_SUFFIXES


def load_chat_task(name: str, limit: int | None = None) -> ChatTask:
    """A file's chats as a task; raises InputError for a row that is no chat which ends with an answer."""
    path, items = Path(name), []
    for number, document in enumerate(load_documents(name)[:limit], 1):
        messages = document.messages or ()
        answer = messages[-1]["content"].strip() if messages and messages[-1]["role"] == "assistant" else ""
        if len(messages) < 2 or not answer:
            raise InputError(
                f"chat {number} of {path} has no known answer",
                field="tasks",
                allowed="`messages` whose last is the assistant's, with something before it",
            )
        items.append(ChatItem(messages[:-1], answer))
    return ChatTask(path.stem, path.name, sha256_file(path), tuple(items), limit)


def load_chat_tasks(settings: TaskSettings) -> tuple[ChatTask, ...]:
    """Those of the tasks that are files of chats; raises as `load_chat_task`."""
    return tuple(load_chat_task(name, settings.limit) for name in settings.tasks if not needs_harness(name))


def chat_requests(model: LanguageModel, task: ChatTask) -> list[tuple[list[int], int]]:
    """Each chat in the model's template, up to where it has to answer, and most tokens of the answer.

    Raises InputError as `render_chat`, and for a chat that is longer with its answer than every runtime reads.
    """
    tokenizer, asked = model.tokenizer, []
    for item in task.items:
        ids = encode(tokenizer, render_chat(tokenizer, item.messages, add_generation_prompt=True))
        asked.append((ids, len(encode(tokenizer, item.answer)) + _MARGIN))
    needed = max(len(ids) + most for ids, most in asked)
    check_length(model, needed, f"a chat of {task.source}")
    if needed > MAX_CONTEXT:
        why = f"a chat of {task.source} has {needed} tokens"
        raise InputError(why, field="tasks", allowed=f"up to {MAX_CONTEXT}, its answer included")
    return asked


def run_chat_task(model: LanguageModel, task: ChatTask, *, progress: Progress = no_progress) -> TaskResult:
    """Let a model answer greedily and count the answers that are the known ones; raises as `chat_requests`.

    `exact_match` compares texts but for white space around them; `json_match`, if every known answer is an object or
    array in JSON, their values.
    """
    asked = chat_requests(model, task)
    order = sorted(range(len(asked)), key=lambda index: asked[index][1], reverse=True)
    answers = [""] * len(asked)
    for start in range(0, len(order), _AT_ONCE):  # those of about the same length are written together
        part = order[start : start + _AT_ONCE]
        written = model.generate([asked[index][0] for index in part], asked[part[0]][1])
        for index, tokens in zip(part, written, strict=True):
            text = model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            answers[index] = str(text).strip()
        progress(f"answering {task.source}", start + len(part), len(order))
    known, metrics = [item.answer for item in task.items], []
    values: dict[str, Callable[[str], Any]] = {"exact_match": str}
    if all(isinstance(json_value(answer), dict | list) for answer in known):
        values = {"json_match": json_value, **values}
    for name, value in values.items():
        right = [value(a) == value(b) for a, b in zip(answers, known, strict=True)]
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else None
        marks = "".join("01"[one] for one in right)
        metrics.append(TaskMetric(name, share, error, higher_is_better=True, right=marks))
    return TaskResult(task.name, "1", task.source, task.sha256, len(known), task.limit, 0, tuple(metrics))


def json_value(text: str) -> Any:
    """The value of a text in JSON, to be compared (1 is 1.0 and not true); the text itself if it is none."""

    def number(digits: str) -> tuple[str, Decimal]:
        return "number", Decimal(digits)

    def no_json(word: str) -> Any:
        raise ValueError(word)

    try:
        return json.loads(text, parse_int=number, parse_float=number, parse_constant=no_json)
    except (ValueError, ArithmeticError, RecursionError):
        return text


class TaskSet(NamedTuple):
    """Loaded tasks, which any number of models may do: files of chats, what lm_eval's TaskManager gave of all others,
    and of these the name -> (source, sha256)."""

    settings: TaskSettings
    chats: tuple[ChatTask, ...]
    loaded: Any
    origins: dict[str, tuple[str, str | None]]


@contextlib.contextmanager
def load_tasks(settings: TaskSettings) -> Iterator[TaskSet]:
    """Find and load tasks with their data.

    Raises InputError: an unknown name, a file that is no task, missing data, data without the fields the task names;
    MissingExtraError: lm_eval is not installed.
    """
    check_settings(settings)
    chats = load_chat_tasks(settings)
    if chats and (shots := settings.num_fewshot) is not None:
        why = "a chat has its examples in itself"
        raise InputError(why, field="num_fewshot", value=shots, allowed="none")
    loaded: Any = {"tasks": {}}
    origins: dict[str, tuple[str, str | None]] = {}
    given = [(name, _task_files(name)) for name in settings.tasks if needs_harness(name)]
    names = [name for name, files in given if not files]
    harness = import_harness() if given else None
    with tempfile.TemporaryDirectory(prefix="phoneready-tasks-") as cache:
        if harness is not None:
            with _quiet():
                manager = harness.tasks.TaskManager(include_defaults=bool(names))
                tasks: list[Any] = []
                for file in (file for _, files in given for file in files):
                    config, digest = _read_task_file(file, settings.task_data, Path(cache))
                    origins[config["task"]] = (file.name, digest)
                    tasks += _load(manager, config, str(file))["tasks"].values()
                for name in names:
                    tasks += _load(manager, name, name)["tasks"].values()
                _check_names([task.config.task for task in tasks])
                loaded = manager.load(tasks)
                for name, task in loaded["tasks"].items():
                    _prepare(name, task, settings)
        _check_names([*loaded["tasks"], *(task.name for task in chats)])
        yield TaskSet(settings, chats, loaded, origins)


def run_tasks(
    model: LanguageModel, tasks: TaskSet, *, progress: Progress = no_progress
) -> tuple[TaskResult, ...]:
    """Let a model do the tasks; raises InputError if the harness cannot, and as `run_chat_task`."""
    chats = tuple(run_chat_task(model, task, progress=progress) for task in tasks.chats)
    names = tasks.loaded["tasks"]
    if not names:
        return chats
    state = random.getstate()
    # All generators are seeded and set back afterwards.
    with _quiet(), torch.random.fork_rng(devices=range(gpu_count())):
        random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            found = import_harness().evaluator.evaluate(
                harness_model(model, progress=progress),
                tasks.loaded,
                limit=tasks.settings.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
            )
        except (PhonereadyError, MemoryError):
            raise
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise InputError(f"lm_eval cannot evaluate {', '.join(names)}: {error}") from error
        finally:
            random.setstate(state)
    return chats + tuple(_result(name, found, tasks) for name in names)


def _task_files(name: str) -> list[Path]:
    """The task files that a name means; none if it is one of lm_eval's own."""
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and not p.name.startswith("_"))
        if not files:
            raise InputError("the folder has no task files", field="tasks", value=name, allowed="*.yaml")
        return files
    if path.suffix not in _SUFFIXES:
        return []
    if not path.is_file():
        raise InputError("no such task file", field="tasks", value=name)
    return [path]


def tasks_sha256(name: str, data: Path | None) -> str:
    """Hash of a file of chats, of a task file or a folder of them, with its data and all that it may include.

    Runs no code. Empty for a name that lm_eval knows. Raises as `load_tasks`.
    """
    if not needs_harness(name):
        if not Path(name).is_file():
            raise InputError("no such file of chats", field="tasks", value=name)
        return sha256_file(Path(name))
    files = _task_files(name)
    if not files:
        return ""
    import_harness()
    # Functions and included files lie beside a task file.
    folders = {file.resolve().parent for file in files}
    beside = {path for folder in folders for glob in ("*.py", "*.y*ml") for path in folder.glob(glob)}
    digests = [_read_task_file(file, data, Path(), functions=False)[1] for file in files]
    digests += map(sha256_file, sorted(beside))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_task_file(
    file: Path, data: Path | None, cache: Path, *, functions: bool = True
) -> tuple[dict[str, Any], str]:
    """The file's configuration with absolute data paths, and the hash of the file and its data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    read_bytes(file, _MOST_BYTES)
    try:
        config = load_yaml(file, resolve_func=functions)
    except Exception as error:  # YAML's errors, and whatever a `!function` module raises when it is imported
        raise InputError(f"{file} cannot be read as a task file: {error}") from error
    if not isinstance(config, dict) or "task" not in config:
        raise InputError(f"{file} is not a task file", field="task", allowed="a name")
    check_kinds(config, _TASK, str(file))
    digest = hashlib.sha256(sha256_file(file).encode())
    base = data or file.resolve().parent

    def absolute(value: Any) -> Any:
        """Paths of data as they are nested there, made absolute and hashed; addresses are left alone."""
        if isinstance(value, dict):
            return {key: absolute(part) for key, part in value.items()}
        if isinstance(value, list):
            return [absolute(part) for part in value]
        if "://" in str(value):
            return value
        path = base / str(value)
        if not path.exists():
            raise InputError(
                f"{file}: its data {path} does not exist; --set task_data names the folder to look in"
            )
        for part in [path] if path.is_file() else sorted(path.rglob("*")):
            if part.is_file():
                digest.update(sha256_file(part).encode())
        return str(path.resolve())

    settings = dict(config.get("dataset_kwargs") or {})
    settings |= {key: absolute(settings[key]) for key in ("data_files", "data_dir") if key in settings}
    config["dataset_kwargs"] = settings | {"cache_dir": str(cache)}
    return config, digest.hexdigest()


def _load(manager: Any, spec: Any, what: str) -> Any:
    try:
        return manager.load([spec])
    except KeyError as error:
        if isinstance(spec, str):
            raise InputError(
                "lm_eval has no such task", field="tasks", value=what, allowed="a name it lists, or FILE.yaml"
            ) from error
        raise InputError(f"task {what} cannot be loaded: missing {error}") from error
    except Exception as error:  # data sets, templates and task code raise whatever they like
        raise InputError(f"task {what} cannot be loaded: {type(error).__name__}: {error}") from error


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError("given twice", field="tasks", value=", ".join(twice), allowed="each task once")


def _prepare(name: str, task: Any, settings: TaskSettings) -> None:
    """Set few-shot examples and make all requests once, so that bad data is found before a model runs."""
    if settings.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    try:
        task.build_all_requests(limit=settings.limit, rank=0, world_size=1)
        empty = not task.instances
    except Exception as error:  # templates and data raise whatever they like
        raise InputError(f"task {name} does not fit its data: {type(error).__name__}: {error}") from error
    if empty:
        raise InputError(f"task {name} has no items")


def _result(name: str, found: Any, tasks: TaskSet) -> TaskResult:
    figures = found["results"][name]
    directions = found["higher_is_better"].get(name, {})
    metrics = []
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{kind}")
        error = float(error) if isinstance(error, int | float) else None
        label = metric if kind == "none" else f"{metric},{kind}"
        samples = [one for one in found["samples"][name] if one["filter"] == kind and metric in one]
        scores = [one[metric] for one in samples]
        # Which items were answered rightly, if the figure is the share of those.
        is_share = bool(scores) and all(score in (0, 1) for score in scores)
        is_share = is_share and math.isclose(sum(scores) / len(scores), float(value))
        right = "".join("01"[int(score)] for score in scores) if is_share else ""
        metrics.append(TaskMetric(label, float(value), error, directions.get(metric) is not False, right))
    source, digest = tasks.origins.get(name, ("lm_eval", None))
    return TaskResult(
        task=name,
        version=str(found["versions"].get(name)),
        source=source,
        sha256=digest,
        n_items=int(found["n-samples"][name]["effective"]),
        limit=tasks.settings.limit,
        num_fewshot=int(found["n-shot"].get(name) or 0),
        metrics=tuple(metrics),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the harness prints and logs from the terminal; its errors come as exceptions."""
    with contextlib.ExitStack() as stack:
        for name in ("lm_eval", "datasets", "huggingface_hub"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
