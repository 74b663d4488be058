"""Tasks: lm-evaluation-harness's own by name, task files of its format, and chats whose last answer is known.

A task file is lm-eval's YAML, read without a network. Relative `data_files` and `data_dir` in it start at the folder
given for data, or at the file's own folder. Chats need nothing of lm-eval.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any

import torch

from cfsp.devices import gpu_count
from cfsp.errors import InputError, PhonereadyError
from cfsp.evaluation.chat_tasks import (
    ChatTask,
    check_chat_task,
    is_chat_file,
    load_chat_task,
    run_chat_task,
)
from cfsp.evaluation.harness import harness_model, import_harness
from cfsp.evaluation.language_model import LanguageModel
from cfsp.evaluation.settings import TaskSettings
from cfsp.evaluation.task_results import TaskMetric, TaskResult
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from cfsp.reading import read_bytes
from cfsp.settings import check_settings
from cfsp.validation import check_kinds, kinds

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

    def is_what(self, done: Sequence[TaskResult]) -> bool:
        """Whether these results are of these tasks, as they are asked here."""
        few, limit = self.settings.num_fewshot, self.settings.limit
        wanted = {(name, self.origins.get(name, ("", None))[1], limit) for name in self.loaded["tasks"]}
        wanted |= {(task.name, task.sha256, limit) for task in self.chats}
        same = {(one.task, one.sha256, one.limit) for one in done} == wanted
        return same and all(few in (None, one.num_fewshot) for one in done)


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
        check_chat_task(model, task)


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
        loaded = _all_in_one(manager, tasks)
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
        return _chat_file_sha256(Path(name))
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


def _chat_file_sha256(path: Path) -> str:
    if not path.is_file():
        raise InputError("no such file of chats", field="tasks", value=str(path))
    return sha256_file(path)


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


def _all_in_one(manager: Any, tasks: Sequence[Any]) -> Any:
    _check_names([task.config.task for task in tasks])
    return manager.load(list(tasks))


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
