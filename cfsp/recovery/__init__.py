"""Recovery: training back what pruning has cost, by adapters that are merged or on all weights."""

from __future__ import annotations

from cfsp.recovery.data import load_recovery_data
from cfsp.recovery.ranks import importance_ranks
from cfsp.recovery.record import RECOVERY_FILE, RecoveryRecord
from cfsp.recovery.recover import Recovered, check_outcome, recover
from cfsp.recovery.settings import LOSSES, METHODS, RecoverySettings, check_settings

__all__ = [
    "LOSSES",
    "METHODS",
    "RECOVERY_FILE",
    "Recovered",
    "RecoveryRecord",
    "RecoverySettings",
    "check_outcome",
    "check_settings",
    "importance_ranks",
    "load_recovery_data",
    "recover",
]
