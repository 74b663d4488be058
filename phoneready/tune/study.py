"""The trials of a search, kept in an Optuna study: a killed search goes on, and Optuna's own tools can look at it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from cfsp.errors import InputError
from phoneready.tune.space import Point
from phoneready.tune.trial import Measured

_ATTRIBUTE = "trial"


@dataclass(frozen=True)
class Done:
    """A finished trial.

    Attributes:
        number: In the order made.
        point: What was made.
        measured: What was found.
        expected: What was predicted of its divergence before: middle, low, high; None of the first.
    """

    number: int
    point: Point
    measured: Measured
    expected: tuple[float, float, float] | None


class Study:
    """Trials in a journal file; the objectives that Optuna knows are divergence and size.

    Args:
        path: The journal.
        key: Says what the trials depend on: others in the same file are left alone.
        seed: Of the sampler.

    Raises:
        InputError: The journal is damaged.
    """

    def __init__(self, path: Path, key: str, seed: int) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._seed, self._states, self._path = seed, optuna.trial.TrialState, path
        _drop_torn_line(path)
        try:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
            self._study = optuna.create_study(
                storage=storage, study_name=key, directions=["minimize", "minimize"], load_if_exists=True
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read as an Optuna journal: {error}") from error
        for trial in self._study.get_trials(states=(self._states.RUNNING,)):  # of a run that was killed
            self._study.tell(trial.number, state=self._states.FAIL)

    def done(self) -> list[Done]:
        """Finished trials in the order made.

        Raises:
            InputError: One of them is not what a search wrote.
        """
        trials = self._study.get_trials(states=(self._states.COMPLETE,))
        return [_read(number, trial.user_attrs, self._path) for number, trial in enumerate(trials)]

    @contextmanager
    def trial(
        self, point: Point, expected: tuple[float, float, float] | None
    ) -> Iterator[Callable[[Measured, float], None]]:
        """Yield what records a point's figures and its divergence; the trial has failed unless that is called."""
        import optuna

        self._study.enqueue_trial({"prune_ratio": point.prune_ratio})
        trial = self._study.ask({"prune_ratio": optuna.distributions.FloatDistribution(0.0, 1.0)})
        finished = False

        def record(measured: Measured, divergence: float) -> None:
            nonlocal finished
            trial.set_user_attr(_ATTRIBUTE, _written(point, measured, expected))
            self._study.tell(trial, [divergence, float(measured.file_bytes)])
            finished = True

        try:
            yield record
        finally:
            if not finished:
                self._study.tell(trial, state=self._states.FAIL)

    def suggest_ratio(self, low: float, high: float) -> float:
        """A ratio of Optuna's sampler.

        It is seeded anew by the number of trials: a search that was killed proposes what it would have proposed.
        """
        import optuna

        seed = self._seed + len(self._study.get_trials(deepcopy=False))
        self._study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = self._study.ask({"prune_ratio": optuna.distributions.FloatDistribution(low, high)})
        # Only a proposal: the point that is tried is the nearest one within budget, and a trial of its own.
        self._study.tell(trial, state=self._states.FAIL)
        return float(trial.params["prune_ratio"])


def _drop_torn_line(path: Path) -> None:
    """Cut away what a kill left of the journal's last line; Optuna refuses a journal that has one in its middle."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


@dataclass(frozen=True)
class _Kept:
    """What a trial's attribute holds."""

    point: Point
    measured: Measured
    expected: tuple[float, float, float] | None


_ADAPTER = pydantic.TypeAdapter(_Kept)


def _written(point: Point, measured: Measured, expected: tuple[float, float, float] | None) -> Any:
    return _ADAPTER.dump_python(_Kept(point, measured, expected), mode="json")


def _read(number: int, attributes: dict[str, Any], path: Path) -> Done:
    try:
        kept = _ADAPTER.validate_python(json.loads(json.dumps(attributes[_ATTRIBUTE])))
    except (KeyError, pydantic.ValidationError) as error:
        raise InputError(
            f"{path} holds a trial that no search of this version wrote; choose another -o"
        ) from error
    return Done(number, kept.point, kept.measured, kept.expected)
