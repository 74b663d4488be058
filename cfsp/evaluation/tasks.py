"""Tasks: lm-evaluation-harness's own by name, task files of its format, and chats whose last answer is known.

A task file is lm-eval's YAML, read without a network. Relative `data_files` and `data_dir` in it start at the folder
given for data, or at the file's own folder. Chats need nothing of lm-eval. Requests with the same context (the choices
of one question) are scored together, so the context is computed once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import isclose
from pathlib import Path
from typing import Any

import torch

from cfsp.devices import gpu_count
from cfsp.errors import InputError, MissingExtraError, PhonereadyError
from cfsp.evaluation.language_model import Branches, LanguageModel, Score, check_length
from cfsp.evaluation.task_results import TaskMetric, TaskResult, TaskSettings
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from cfsp.reading import read_bytes
from cfsp.settings import check_settings
from cfsp.text.tokens import encode, load_documents, render_chat
from cfsp.validation import check_kinds, kinds

MAX_CONTEXT = 2048
"""Most tokens of a request, in every runtime; what is longer loses its beginning."""
_MAX_NEW_TOKENS = 256
_ITEMS_AT_ONCE = 64


def import_harness() -> Any:
    """The lm_eval package.

    Raises:
        MissingExtraError: It is not installed.
    """
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
        self.model, self.progress = model, progress
        self.tokenizer = model.tokenizer
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

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        likelihoods: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return likelihoods

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        pairs = [_cut(context, continuation, self.max_length) for _, context, continuation in requests]
        scores = _score_pairs(self.model, pairs, self.progress)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            disjoint = [make_disjoint_window(window) for window in windows]
            pairs += [(tuple(context), tuple(targets)) for context, targets in disjoint]
            counts.append(len(disjoint))
        scores = iter(_score_pairs(self.model, pairs, self.progress))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Requests that end alike are written together."""
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(_ending(request.args[1], self.max_length), []).append(index)
        texts, done = [""] * len(requests), 0
        for (limit, until), indices in alike.items():
            for start in range(0, len(indices), _ITEMS_AT_ONCE):
                part = indices[start : start + _ITEMS_AT_ONCE]
                written = self._write([requests[index].args[0] for index in part], limit, until)
                for index, text in zip(part, written, strict=True):
                    texts[index] = text
                done += len(part)
                self.progress("answering tasks", done, len(requests))
        return texts

    def _write(self, contexts: Sequence[str], limit: int, until: tuple[str, ...]) -> list[str]:
        prompts = [self.tok_encode(context)[-(self.max_length - limit) :] for context in contexts]
        prompts = [ids or [self.prefix_token_id] for ids in prompts]
        answers = self.model.generate(prompts, limit, stop_strings=until)
        texts = [str(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        for stop in until:
            texts = [text.partition(stop)[0] for text in texts]
        return texts

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.name).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return render_chat(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)


def _ending(settings: Mapping[str, Any], max_length: int) -> tuple[int, tuple[str, ...]]:
    """Most tokens of an answer, and the strings that end it.

    Raises:
        InputError: The task samples.
    """
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise InputError(
            "tasks that sample are not supported", field="do_sample", value=True, allowed="false"
        )
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or _MAX_NEW_TOKENS)
    return min(limit, max_length - 1), tuple(stop for stop in until if stop)


def _cut(
    context: Sequence[int], continuation: Sequence[int], max_length: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A pair whose tokens but the last fit `max_length`, its beginning left out where it is longer."""
    ids = [*context, *continuation][-(max_length + 1) :]
    start = max(1, len(ids) - len(continuation))
    return tuple(ids[:start]), tuple(ids[start:])


def _score_pairs(
    model: LanguageModel, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], progress: Progress
) -> list[Score]:
    """Scores of (context, continuation) pairs in their order; each distinct context is run once."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        groups.setdefault(context, []).append(index)
    items = [(Branches(c, tuple(pairs[i][1] for i in indices)), indices) for c, indices in groups.items()]
    items.sort(key=lambda pair: pair[0].n_tokens, reverse=True)
    scores: list[Score] = [Score(0.0, False)] * len(pairs)
    done = 0
    for start in range(0, len(items), _ITEMS_AT_ONCE):
        part = items[start : start + _ITEMS_AT_ONCE]
        for (_, indices), item_scores in zip(part, model.score([item for item, _ in part]), strict=True):
            for index, score in zip(indices, item_scores, strict=True):
                scores[index] = score
            done += len(indices)
        progress("scoring choices", done, len(pairs))
    return scores


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


def asked_ids(tokenizer: Any, item: ChatItem) -> list[int]:
    """Token ids of a chat in the model's template, up to where the model has to answer; raises as `render_chat`."""
    return encode(tokenizer, render_chat(tokenizer, item.messages, add_generation_prompt=True))


def run_chat_task(model: LanguageModel, task: ChatTask, *, progress: Progress = no_progress) -> TaskResult:
    """Let a model answer greedily, in its own chat template, and count the answers that are the known ones.

    Raises:
        InputError: The model has no chat template, or one that refuses a chat; or a chat that is longer with its answer
            than the model's context or MAX_CONTEXT.
    """
    asked = _asked(model, task)
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
    values: dict[str, Callable[[str], Any]] = ({JSON: json_value} if task.is_json else {}) | {EXACT: str}
    for name, value in values.items():
        right = [value(a) == value(b) for a, b in zip(answers, known, strict=True)]
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else None
        marks = "".join("01"[one] for one in right)
        metrics.append(TaskMetric(name, share, error, higher_is_better=True, right=marks))
    n_items = len(task.items)
    return TaskResult(task.name, _VERSION, task.source, task.sha256, n_items, task.limit, 0, tuple(metrics))


def _asked(model: LanguageModel, task: ChatTask) -> list[tuple[list[int], int]]:
    """Each chat up to where the model has to answer, and most tokens of its answer; short enough for every runtime."""
    tokenizer = model.tokenizer
    asked = [
        (asked_ids(tokenizer, item), len(encode(tokenizer, item.answer)) + _MARGIN) for item in task.items
    ]
    needed = max(len(ids) + most for ids, most in asked)
    check_length(model, needed, f"a chat of {task.source}")
    if needed > MAX_CONTEXT:
        why = f"a chat of {task.source} has {needed} tokens"
        raise InputError(why, field="tasks", allowed=f"up to {MAX_CONTEXT}, its answer included")
    return asked


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


_SEED = 1234
_BOOTSTRAP = 1000
_SUFFIXES = (".yaml", ".yml")
_MOST_BYTES = 2**20
"""Of a task file."""
_TASK = kinds(task=str, dataset_kwargs=dict[str, Any] | None)


@dataclass(frozen=True)
class TaskSet:
    """Loaded tasks, which any number of models may do.

    Attributes:
        settings: How they were loaded.
        chats: Those that are files of chats.
        loaded: What lm-eval's TaskManager gave of all others.
        origins: Name of one of these -> (source, sha256).
    """

    settings: TaskSettings
    chats: tuple[ChatTask, ...]
    loaded: Any
    origins: dict[str, tuple[str, str | None]]


@contextlib.contextmanager
def load_tasks(settings: TaskSettings) -> Iterator[TaskSet]:
    """Find and load tasks with their data; task files alone never ask the network.

    Raises:
        InputError: An unknown name, a file that is no task, missing data, data without the fields the task names.
        MissingExtraError: lm_eval is not installed.
    """
    check_settings(settings)
    files = [name for name in settings.tasks if is_chat_file(name)]
    if files and settings.num_fewshot is not None:
        raise InputError(
            "a chat has its examples in itself",
            field="num_fewshot",
            value=settings.num_fewshot,
            allowed="none",
        )
    chats = load_chat_tasks(settings)
    others = replace(settings, tasks=tuple(name for name in settings.tasks if name not in files))
    with tempfile.TemporaryDirectory(prefix="phoneready-tasks-") as cache:
        loaded: Any = {"tasks": {}}
        origins: dict[str, tuple[str, str | None]] = {}
        if others.tasks:
            with _quiet():
                loaded, origins = _load_all(others, Path(cache))
        _check_names([*loaded["tasks"], *(task.name for task in chats)])
        yield TaskSet(settings, chats, loaded, origins)


def load_chat_tasks(settings: TaskSettings) -> tuple[ChatTask, ...]:
    """Those of the tasks that are files of chats; raises as `load_chat_task`."""
    return tuple(load_chat_task(name, settings.limit) for name in settings.tasks if is_chat_file(name))


def check_chat_tasks(model: LanguageModel, chats: Sequence[ChatTask]) -> None:
    """Raise InputError where a model cannot be asked these chats, before anything is measured."""
    for task in chats:
        _asked(model, task)


def needs_harness(name: str) -> bool:
    """Whether a task is one of lm-evaluation-harness."""
    return not is_chat_file(name)


def _load_all(settings: TaskSettings, cache: Path) -> tuple[Any, dict[str, tuple[str, str | None]]]:
    """What lm-eval made of its tasks, and where each comes from."""
    harness = import_harness()
    given = [(name, _task_files(name)) for name in settings.tasks]
    names = [name for name, files in given if not files]
    origins: dict[str, tuple[str, str | None]] = {}
    with contextlib.nullcontext() if names else _offline():
        manager = harness.tasks.TaskManager(include_defaults=bool(names))
        tasks: list[Any] = []
        for file in itertools.chain.from_iterable(files for _, files in given):
            config, digest = _read_task_file(file, settings.task_data, cache)
            origins[config["task"]] = (file.name, digest)
            tasks += _load(manager, config, str(file))["tasks"].values()
        for name in names:
            tasks += _load(manager, name, name)["tasks"].values()
        _check_names([task.config.task for task in tasks])
        loaded = manager.load(tasks)
        for name, task in loaded["tasks"].items():
            _prepare(name, task, settings)
    return loaded, origins


def run_tasks(
    model: LanguageModel, tasks: TaskSet, *, progress: Progress = no_progress
) -> tuple[TaskResult, ...]:
    """Let a model do the tasks.

    Raises:
        InputError: The harness cannot make the requests or read the answers; it says why. Or as `run_chat_task`.
    """
    chats = tuple(run_chat_task(model, task, progress=progress) for task in tasks.chats)
    return chats + (_run_harness(model, tasks, progress) if tasks.loaded["tasks"] else ())


def _run_harness(model: LanguageModel, tasks: TaskSet, progress: Progress) -> tuple[TaskResult, ...]:
    harness = import_harness()
    adapter = harness_model(model, progress=progress)
    state = random.getstate()
    # All generators are seeded, and what they were comes back.
    with _quiet(), torch.random.fork_rng(devices=range(gpu_count())):
        random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            results = harness.evaluator.evaluate(
                adapter,
                tasks.loaded,
                limit=tasks.settings.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
            )
        except (PhonereadyError, MemoryError):
            raise
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise InputError(
                f"lm_eval cannot evaluate {', '.join(tasks.loaded['tasks'])}: {error}"
            ) from error
        finally:
            random.setstate(state)
    return tuple(_result(name, results, tasks) for name in tasks.loaded["tasks"])


def _task_files(name: str) -> list[Path]:
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
    """Hash of a file of chats, of a task file, or a folder of them, with the data they name and what they may include.

    Runs no code. Empty for a name that lm-eval knows.

    Raises:
        InputError: A file that is no task, or whose data is missing.
    """
    if is_chat_file(name):
        if not Path(name).is_file():
            raise InputError("no such file of chats", field="tasks", value=name)
        return sha256_file(Path(name))
    files = _task_files(name)
    if not files:
        return ""
    import_harness()
    # Functions and included files lie beside a task file.
    beside = {path for file in files for path in file.resolve().parent.glob("*.py")}
    beside |= {path for file in files for path in file.resolve().parent.glob("*.y*ml")}
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
    settings = dict(config.get("dataset_kwargs") or {})
    base = data or file.resolve().parent
    for key in ("data_files", "data_dir"):
        if key in settings:
            settings[key] = _absolute(settings[key], base, file, digest)
    config["dataset_kwargs"] = settings | {"cache_dir": str(cache)}
    return config, digest.hexdigest()


def _absolute(value: Any, base: Path, file: Path, digest: Any) -> Any:
    """Data paths as they are nested in a task file, made absolute and hashed; addresses are left alone."""
    if isinstance(value, dict):
        return {key: _absolute(part, base, file, digest) for key, part in value.items()}
    if isinstance(value, list):
        return [_absolute(part, base, file, digest) for part in value]
    if "://" in str(value):
        return value
    path = base / str(value)
    if not path.exists():
        raise InputError(f"{file}: its data {path} does not exist; --task-data names the folder to look in")
    for part in [path] if path.is_file() else sorted(path.rglob("*")):
        if part.is_file():
            digest.update(sha256_file(part).encode())
    return str(path.resolve())


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
        right = _right(found["samples"][name], metric, kind, float(value))
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


def _right(samples: Any, metric: str, kind: str, mean: float) -> str:
    """Which items were answered rightly; empty where the figure is no share of such."""
    scores = [one[metric] for one in samples if one["filter"] == kind and metric in one]
    if not scores or any(score not in (0, 1) for score in scores):
        return ""
    return "".join("01"[int(score)] for score in scores) if isclose(sum(scores) / len(scores), mean) else ""


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


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Tell the data set library that there is no network; task files need none."""
    import datasets.config
    import huggingface_hub.constants

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.callback(setattr, place, "HF_HUB_OFFLINE", place.HF_HUB_OFFLINE)
            place.HF_HUB_OFFLINE = True
        yield
