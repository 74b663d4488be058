"""CFSP: coarse-to-fine structured pruning of the FFN, and what is needed to do it to a real model.

The names below are loaded on first use, so that importing a small module of this package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfsp.models.checkpoint import load_pruned, save_checkpoint
    from cfsp.models.reference import load_model
    from cfsp.models.source import LoadedModel, ModelSource
    from cfsp.pruning.block_by_block import apply_plan
    from cfsp.pruning.plan import PruningPlan, make_plan
    from cfsp.pruning.prune import PruneResult, prune_model
    from cfsp.pruning.settings import PruneSettings
    from cfsp.pruning.statistics import BlockStatistics, collect_statistics
    from cfsp.text.calibration import Calibration, load_calibration

__all__ = [
    "BlockStatistics",
    "Calibration",
    "LoadedModel",
    "ModelSource",
    "PruneResult",
    "PruneSettings",
    "PruningPlan",
    "apply_plan",
    "collect_statistics",
    "load_calibration",
    "load_model",
    "load_pruned",
    "make_plan",
    "prune_model",
    "save_checkpoint",
]

_MODULES = (
    *("models.checkpoint", "models.reference", "models.source", "text.calibration"),
    *("pruning.block_by_block", "pruning.plan", "pruning.prune", "pruning.settings", "pruning.statistics"),
)


def __getattr__(name: str) -> Any:
    for module in _MODULES if name in __all__ else ():
        if found := getattr(importlib.import_module(f"cfsp.{module}"), name, None):
            return found
    raise AttributeError(f"module 'cfsp' has no attribute {name!r}")
