"""Where calibration text comes from, and how much of it there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cfsp.settings import Settings, setting

TEXT_FORMS = "FILE.txt, FILE.jsonl, FILE.parquet, hub:NAME[@CONFIG][:SPLIT] or builtin:python-docs"
BUILTIN_TEXT = "builtin:python-docs"
SELF = "self"
"""The reference that means: text sampled from the dense model itself."""


def reference_name(reference: str) -> str:
    """What a text is called: a file without its folders, as it may lie elsewhere."""
    return reference if ":" in reference else Path(reference).name


@dataclass(frozen=True)
class CalibrationSettings(Settings):
    """The windows that pruning statistics are taken from."""

    calibration: tuple[str, ...] = setting(
        (SELF,),
        f"Calibration text: `self` (sampled from the model), {TEXT_FORMS}.",
        least=1,
        metavar="REF",
    )
    nsamples: int = setting(32, "Calibration windows.", ge=1, le=2**20, rare=True)
    seqlen: int = setting(512, "Tokens in a calibration window.", ge=2, le=2**20, rare=True)
