"""What a model is judged on."""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.evaluation.task_results import TaskSettings
from cfsp.settings import SEED, Settings, setting
from cfsp.text.settings import TEXT_FORMS


@dataclass(frozen=True)
class WindowSettings(Settings):
    """Texts to measure on; of the references, text of one name must not come twice."""

    text: tuple[str, ...] = setting(
        (), f"Text to measure on: {TEXT_FORMS}.", metavar="REF", shown="builtin:python-docs"
    )
    chats: tuple[str, ...] = setting(
        (),
        "Chats to measure on, as `text`, or `self`: sampled from the reference model.",
        metavar="REF",
    )
    seqlen: int = setting(1024, "Tokens in a window.", ge=2, le=2**20, rare=True)
    max_windows: int = setting(16, "Most windows of each text.", ge=1, le=2**20, rare=True)

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """(`text` or `chats`, reference) of all of them."""
        return (*(("text", one) for one in self.text), *(("chats", one) for one in self.chats))


@dataclass(frozen=True)
class JudgementSettings(TaskSettings, WindowSettings):
    """What to judge on, as a release and the command line ask for it; without prompts a built-in set is asked."""

    prompts: tuple[str, ...] = setting(
        (),
        "A question whose answer is shown and checked for degeneration.",
        metavar="TEXT",
        shown="a built-in set",
    )
    max_new_tokens: int = setting(64, "Longest answer.", ge=1, le=2**20, rare=True)
    metrics: tuple[str, ...] = setting(
        (), "Own metrics, FILE.py:FUNCTION or MODULE:FUNCTION.", metavar="MODULE:FUNCTION,...", rare=True
    )


@dataclass(frozen=True)
class EvaluationSettings(JudgementSettings):
    """What to judge on. Only `prompts` are asked; the seed, of `self`, should be another than the calibration's."""

    text: tuple[str, ...] = setting(
        (), f"Text to measure on: {TEXT_FORMS}; or none.", metavar="REF", shown="builtin:python-docs"
    )
    prompts: tuple[str, ...] = setting(
        (),
        "A question whose answer is shown and checked for degeneration; FILE.txt or FILE.jsonl of them; or none.",
        metavar="TEXT|FILE",
        shown="a built-in set",
    )
    seed: int = setting(1, "Seed of `--chats self`.", ge=SEED.ge, le=2**32 - 2, rare=True)
