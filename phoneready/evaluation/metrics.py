"""Users' own metrics: `module:function`, called with a model and the windows it is judged on."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfsp.errors import InputError, PhonereadyError
from cfsp.evaluation import LanguageModel
from cfsp.files import sha256_file
from cfsp.text.tokens import TokenWindows
from phoneready.evaluation.record import MetricResult

Metric = Callable[[LanguageModel, Any, Sequence[TokenWindows]], Any]


def find_metric(reference: str) -> Metric:
    """The function behind `module:function`; modules in the working directory are found too.

    Raises:
        InputError: No such reference, module or function, or the module fails when it is imported.
    """
    module, _, name = reference.partition(":")
    if not module or not name.isidentifier():
        raise InputError("not a metric", field="metric", value=reference, allowed="module:function")
    with _working_directory():
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as error:  # a user's module raises whatever it likes
            raise InputError(
                f"metric {reference} cannot be imported: {type(error).__name__}: {error}"
            ) from error
    if not callable(found):
        raise InputError("not a function", field="metric", value=reference)
    metric: Metric = found
    return metric


def metric_sha256(reference: str) -> str:
    """Hash of the module's file; empty where there is none.

    Raises:
        InputError: As `find_metric`.
    """
    find_metric(reference)
    file = getattr(sys.modules[reference.partition(":")[0]], "__file__", None)
    return sha256_file(Path(file)) if file else ""


def measure(
    reference: str, metric: Metric, model: LanguageModel, windows: Sequence[TokenWindows]
) -> tuple[MetricResult, ...]:
    """Call a metric as `function(model, tokenizer, windows)`.

    An attribute `higher_is_better` of the function says which way is better; without it a figure is reported but not
    held against a baseline.

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
    direction = getattr(metric, "higher_is_better", None)
    found = []
    for key, value in figures.items():
        name = f"{reference}.{key}" if key else reference
        found.append(MetricResult(name, _number(name, value), None if direction is None else bool(direction)))
    return tuple(found)


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
