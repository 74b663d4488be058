"""How much there is at most of the texts that models are measured on."""

from __future__ import annotations

from cfsp.text.tokens import most_tokens
from phoneready.evaluation.settings import WindowSettings
from phoneready.forecasts.stages import Windows


def judged_windows(settings: WindowSettings) -> Windows:
    """The windows of all texts, at most: the limit on each, or what it has where its size tells."""
    count = 0
    for kind, reference in settings.sources:
        tokens = most_tokens(reference) if kind == "text" else None
        there = settings.max_windows if tokens is None else tokens // settings.seqlen
        count += min(settings.max_windows, there)
    return Windows(count, settings.seqlen)
