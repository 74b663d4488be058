"""The trials of a search, kept in an Optuna study: a killed search goes on, and Optuna's own tools can look at it.

Optuna keeps the trials and proposes none: which point is worth a trial says phoneready.tune.search.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from cfsp.errors import InputError
from phoneready.tune.space import Point
from phoneready.tune.trial import Measured

_ATTRIBUTE = "trial"


@dataclass(frozen=True)
class Trial:
    """What the study keeps of a trial.

    Attributes:
        point: What was made.
        measured: What was found.
        expected: What was predicted of its divergence before: middle, low, high; None of the first.
    """

    point: Point
    measured: Measured
    expected: tuple[float, float, float] | None


_ADAPTER = pydantic.TypeAdapter(Trial)


class Study:
    """Trials in a journal file; the objectives that Optuna knows are divergence and size.

    Args:
        path: The journal.
        key: Says what the trials depend on: others in the same file are left alone.

    Raises:
        InputError: The journal is damaged.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        drop_torn_line(path)
        self._study = open_study(path, key)

    def trials(self) -> list[Trial]:
        """Finished trials in the order made.

        Raises:
            InputError: One of them is not what a search wrote.
        """
        finished = [trial for trial in self._study.get_trials() if trial.state.name == "COMPLETE"]
        try:
            return [_ADAPTER.validate_python(trial.user_attrs[_ATTRIBUTE]) for trial in finished]
        except (KeyError, pydantic.ValidationError) as error:
            raise InputError(
                f"{self._path} holds a trial that no search of this version wrote; choose another -o"
            ) from error

    def add(self, trial: Trial, divergence: float) -> None:
        """Keep a trial; its divergence is what Optuna is told beside the size of the file."""
        import optuna

        frozen = optuna.trial.create_trial(
            values=[divergence, float(trial.measured.file_bytes)],
            params={"prune_ratio": trial.point.prune_ratio},
            distributions={"prune_ratio": optuna.distributions.FloatDistribution(0.0, 1.0)},
            user_attrs={_ATTRIBUTE: _ADAPTER.dump_python(trial, mode="json")},
        )
        self._study.add_trial(frozen)


def open_study(path: Path, key: str) -> Any:
    """An Optuna study of two figures to be made small, in a journal that several processes may share.

    Raises:
        InputError: The journal is damaged.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        return optuna.create_study(
            storage=storage, study_name=key, directions=["minimize", "minimize"], load_if_exists=True
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as an Optuna journal: {error}") from error


def drop_torn_line(path: Path) -> None:
    """Cut away what a kill left of the journal's last line; Optuna refuses a journal that has one in its middle.

    Nobody else may be writing it.
    """
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
