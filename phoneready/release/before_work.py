"""What would end a run after hours, found before anything is done."""

from __future__ import annotations

from cfsp.recovery.data import check_readable
from cfsp.recovery.settings import usable
from exporters.families import ROUNDING
from phoneready.settings.schema import RecoverConfig, ReleaseConfig


def check_inputs(config: ReleaseConfig) -> None:
    """Refuse training that cannot be done, and text that cannot be read.

    Raises:
        InputError: One of them.
        MissingExtraError: An extra that they need.
    """
    prune, training, evaluate = config.prune, config.recover, config.evaluate
    if training is not None:
        check_training(training)
    learnt = () if training is None else training.texts
    check_readable((*learnt, *prune.calibration, *prune.vocabulary_text, *evaluate.text, *evaluate.chats))


def check_training(training: RecoverConfig) -> None:
    """As `check_inputs`, of training alone, and not of its text."""
    usable(training.settings(0), training.texts, ROUNDING)
