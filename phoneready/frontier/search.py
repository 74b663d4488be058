"""Points that Optuna's sampler proposes, of ratio, structures and quantization, in one study for all runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phoneready.frontier.folder import STUDY_FILE, claim, is_alive
from phoneready.frontier.points import make_point
from phoneready.frontier.record import FrontierPoint
from phoneready.frontier.settings import FrontierSettings
from phoneready.settings.structures import STRUCTURES, Structures
from phoneready.tune.space import Point
from phoneready.tune.study import open_study

_STEP = 0.01
_ASKS = 20
"""Proposals for each file that is measured, before a search gives up: many may be too large, or known."""


class Search:
    """One study in the folder, that several runs ask and tell.

    Args:
        folder: Of the frontier.
        state: What is kept of these settings.
        worker: This run's name.
        settings: Ends of the ratios, the structures and quantizations to choose from, and how many files to measure.
        allocation: As prune.allocation.
        seed: Of the sampler.

    Raises:
        InputError: The journal is damaged.
    """

    def __init__(
        self, folder: Path, state: Path, worker: str, settings: FrontierSettings, allocation: str, seed: int
    ) -> None:
        self._state, self._worker, self._settings = state, worker, settings
        self._allocation, self._seed = allocation, seed
        # Optuna lets no other lists into a study.
        lists = json.dumps([settings.choices(Structures()), settings.chosen_quants])
        name = f"{state.name}-{hashlib.sha256(lists.encode()).hexdigest()[:12]}"
        self._study = open_study(folder / STUDY_FILE, name)

    def run(self, measure: Callable[[Point], FrontierPoint | None], is_enough: Callable[[int], bool]) -> None:
        """Ask and measure until there are as many files as were asked for.

        Args:
            measure: Gives None of what cannot be made.
            is_enough: Whether there are as many as there may be, with so many more that are under way.
        """
        while (trial := self._ask(is_enough)) is not None:
            file = measure(self._point(trial.params))
            if file is None:
                self._study.tell(trial, state=_states().FAIL)
            else:
                self._study.tell(trial, [float(file.file_bytes), file.bits_per_byte])

    def points(self) -> list[Point]:
        """What was proposed and measured, each once."""
        done = self._study.get_trials(states=(_states().COMPLETE,))
        return list(dict.fromkeys(self._point(trial.params) for trial in done))

    def _ask(self, is_enough: Callable[[int], bool]) -> Any | None:
        """A trial; None where enough are done or under way."""
        import optuna

        with claim(self._state, "ask", timeout=-1):
            trials = self._study.get_trials(deepcopy=False)
            running = [trial for trial in trials if trial.state == _states().RUNNING]
            alive = sum(is_alive(self._state, trial.user_attrs.get("worker", "")) for trial in running)
            wanted = self._settings.trials or 0
            if len(self.points()) + alive >= wanted or len(trials) >= _ASKS * wanted or is_enough(alive):
                return None
            # A sampler for each proposal: runs that share a study must not propose the same.
            self._study.sampler = optuna.samplers.TPESampler(
                seed=self._seed + len(trials), n_startup_trials=max(4, wanted // 3), constant_liar=True
            )
            trial = self._study.ask()
            trial.set_user_attr("worker", self._worker)
            ratios, settings = self._settings.prune_ratios, self._settings
            trial.suggest_float(
                "prune_ratio", min(ratios), max(ratios), step=_STEP if len(set(ratios)) > 1 else None
            )
            for name, amounts in settings.choices(Structures()).items():
                trial.suggest_categorical(name, amounts)
            trial.suggest_categorical("quant", list(settings.chosen_quants))
            if settings.recover:
                trial.suggest_categorical("recover", [False, True])
            return trial

    def _point(self, params: dict[str, Any]) -> Point:
        ratio, item = round(float(params["prune_ratio"]), 6), str(params["quant"])
        gone = Structures(**{name: params[name] for name in STRUCTURES})
        return make_point(self._settings, self._allocation, item, ratio, gone, bool(params.get("recover")))


def _states() -> Any:
    import optuna

    return optuna.trial.TrialState
