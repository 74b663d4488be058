"""Own metrics, called with a model and the windows it is judged on: FILE.py:function, module:function, a plugin."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfsp import plugins
from cfsp.errors import InputError, PhonereadyError
from cfsp.evaluation.language_model import LanguageModel
from cfsp.files import sha256_file
from cfsp.text.tokens import TokenWindows
from phoneready.evaluation.evaluation_record import MetricResult
from phoneready.figures.figures import METRICS, OWN, BudgetConfig, metric_of, own_reference

Metric = Callable[[LanguageModel, Any, Sequence[TokenWindows]], Any]


def find_metric(reference: str) -> Metric:
    """The function in a file, in an installed module, or of a plugin; raises InputError if it cannot be imported."""
    module, colon, name = reference.rpartition(":")
    if not colon and (plugin := plugins.load_plugins(plugins.METRICS, METRICS).get(reference)):
        function = plugin.load(object)
    elif module and name.isidentifier():
        try:
            if module.endswith(".py"):  # its folder is not searched for other modules
                spec = importlib.util.spec_from_file_location(f"own_metrics_{Path(module).stem}", module)
                assert spec is not None  # for a name that ends in .py there is a loader
                assert spec.loader is not None
                imported = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(imported)
            else:
                imported = importlib.import_module(module)
            function = getattr(imported, name)
        except Exception as error:  # a user's module raises whatever it likes
            hint = f"; a file is named as {module}.py:{name}" if Path(f"{module}.py").is_file() else ""
            reason = f"{type(error).__name__}: {error}{hint}"
            raise InputError(f"metric {reference} cannot be imported: {reason}") from error
    else:
        raise InputError(
            "not a metric",
            field="metric",
            value=reference,
            allowed="FILE.py:function, module:function, or a plugin's name",
        )
    if not callable(function):
        raise InputError("not a function", field="metric", value=reference)
    metric: Metric = function
    return metric


def metric_sha256(reference: str) -> str:
    """Hash of the file that a metric is in, which is not imported; empty if there is none."""
    module, colon, _ = reference.rpartition(":")
    if not colon:
        known = plugins.load_plugins(plugins.METRICS, METRICS)
        module = known[reference].entry.module if reference in known else ""
    file, place = module if module.endswith(".py") else None, None
    parts = [] if file else module.split(".")
    for depth in range(1, len(parts) + 1):
        # `find_spec` of importlib.util would import the packages that it is in.
        name = ".".join(parts[:depth])
        spec = next(filter(None, (finder.find_spec(name, place) for finder in sys.meta_path)), None)
        if spec is None:
            break
        place = spec.submodule_search_locations
        file = spec.origin if spec.has_location and depth == len(parts) else None
    try:
        return sha256_file(Path(file)) if file else ""
    except OSError as error:
        raise InputError(f"metric {reference}: {error.strerror}", field="metric", value=file) from error


def check_directions(budgets: Sequence[BudgetConfig]) -> None:
    """Raise InputError for a budget on an own metric that limits its good side, before anything is measured."""
    for position, budget in enumerate(budgets):
        if metric_of(budget.metric).source != OWN:
            continue
        reference = own_reference(budget.metric)
        key = budget.metric.removeprefix(reference).removeprefix(".")
        _, direction = _declared(find_metric(reference), key)
        if direction is not None:
            try:
                budget.check_direction(direction)
            except ValueError as error:
                raise InputError(str(error), field=f"budgets[{position}]") from error


def measure(
    reference: str, metric: Metric, model: LanguageModel, windows: Sequence[TokenWindows]
) -> tuple[MetricResult, ...]:
    """Call a metric as `function(model, tokenizer, windows)`.

    Its attributes `higher_is_better` and `unit` are one value for all figures or a mapping by their names; a figure
    without a direction is reported but not held against a baseline. Raises InputError if it fails, or returns anything
    but a finite number or a mapping of names to such.
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
    measured = []
    for key, value in figures.items():
        name, (unit, direction) = f"{reference}.{key}" if key else reference, _declared(metric, str(key))
        try:
            number = float(value) if not isinstance(value, str | bytes | bool) else math.nan
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError("not a finite number", field=f"metric {name}", value=value)
        measured.append(MetricResult(name, number, direction, unit))
    return tuple(measured)


def _declared(metric: Metric, key: str) -> tuple[str, bool | None]:
    """Unit and direction of a figure."""
    stated = (getattr(metric, name, None) for name in ("unit", "higher_is_better"))
    unit, direction = (one.get(key) if isinstance(one, Mapping) else one for one in stated)
    return str(unit or ""), None if direction is None else bool(direction)
