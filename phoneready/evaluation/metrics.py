"""Users' own metrics: `module:function` or a plugin's, called with a model and the windows it is judged on."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfsp import plugins
from cfsp.errors import InputError, PhonereadyError
from cfsp.evaluation import LanguageModel
from cfsp.files import sha256_file
from cfsp.text.tokens import TokenWindows
from phoneready.evaluation.record import MetricResult
from phoneready.figures.budgets import BudgetConfig
from phoneready.figures.metrics import METRICS, OWN, metric_of, own_reference

Metric = Callable[[LanguageModel, Any, Sequence[TokenWindows]], Any]


def find_metric(reference: str) -> Metric:
    """The function behind `module:function`, or that of a plugin; modules in the working directory are found too.

    Raises:
        InputError: No such reference, module, function or plugin, or the module fails when it is imported.
    """
    module, colon, name = reference.partition(":")
    if not colon and (plugin := plugins.load_plugins(plugins.METRICS, METRICS).get(reference)):
        found = plugin.load(object)
    elif module and name.isidentifier():
        found = _imported(module, name)
    else:
        raise InputError(
            "not a metric", field="metric", value=reference, allowed="module:function, or a plugin's name"
        )
    if not callable(found):
        raise InputError("not a function", field="metric", value=reference)
    metric: Metric = found
    return metric


def _imported(module: str, name: str) -> object:
    with _working_directory():
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:  # a user's module raises whatever it likes
            raise InputError(
                f"metric {module}:{name} cannot be imported: {type(error).__name__}: {error}"
            ) from error


def metric_sha256(reference: str) -> str:
    """Hash of the file of the module; of a plugin's metric, of the module that it is defined in; empty without one.

    Raises:
        InputError: As `find_metric`.
    """
    metric, (module, colon, _) = find_metric(reference), reference.partition(":")
    home = module if colon else getattr(metric, "__module__", "")
    file = getattr(sys.modules.get(home), "__file__", None)
    return sha256_file(Path(file)) if file else ""


def check_directions(budgets: Sequence[BudgetConfig]) -> None:
    """Hold budgets on own metrics against the directions that those state, before anything is measured.

    Raises:
        InputError: A limit to the good side, or a metric as in `find_metric`.
    """
    for position, budget in enumerate(budgets):
        if metric_of(budget.metric).source != OWN:
            continue
        reference = own_reference(budget.metric)
        _, direction = _declared(
            find_metric(reference), budget.metric.removeprefix(reference).removeprefix(".")
        )
        if direction is not None:
            try:
                budget.check_direction(direction)
            except ValueError as error:
                raise InputError(str(error), field=f"budgets[{position}]") from error


def measure(
    reference: str, metric: Metric, model: LanguageModel, windows: Sequence[TokenWindows]
) -> tuple[MetricResult, ...]:
    """Call a metric as `function(model, tokenizer, windows)`.

    Its attributes `higher_is_better` and `unit` say which way is better and what is counted, one value for all figures
    or a mapping by their names; without a direction a figure is reported but not held against a baseline.

    Raises:
        InputError: It fails, or returns anything but a finite number or a mapping of names to such.
    """
    try:
        result = metric(model, model.tokenizer, tuple(windows))
    except PhonereadyError:
        raise
    except Exception as error:  # a user's function raises whatever it likes
        raise InputError(f"metric {reference} failed: {type(error).__name__}: {error}") from error
    figures = result if isinstance(result, Mapping) else {"": result}
    if not figures:
        raise InputError(f"metric {reference} returned no figures")
    found = []
    for key, value in figures.items():
        name, (unit, direction) = f"{reference}.{key}" if key else reference, _declared(metric, str(key))
        found.append(MetricResult(name, _number(name, value), direction, unit))
    return tuple(found)


def _declared(metric: Metric, key: str) -> tuple[str, bool | None]:
    """Unit and direction of a figure."""
    stated = (getattr(metric, name, None) for name in ("unit", "higher_is_better"))
    unit, direction = (one.get(key) if isinstance(one, Mapping) else one for one in stated)
    return str(unit or ""), None if direction is None else bool(direction)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, str | bytes | bool) else math.nan
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError("not a finite number", field=f"metric {name}", value=value)
    return number


@contextmanager
def _working_directory() -> Iterator[None]:
    """Let imports find the working directory, as `python -m` does; a console script does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
