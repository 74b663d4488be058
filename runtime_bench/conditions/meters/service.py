"""Android's battery service, where no file of the battery may be read: its charge counter, at its voltage.

`dumpsys battery` is asked seldom, and the service itself hears of a new figure seldom: it tells of minutes. Consumption
that `dumpsys batterystats` gives by parts is an estimate from a table of the maker's, and is not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from runtime_bench.conditions.meters.meter import Facts, Meter, Source, Track
from runtime_bench.conditions.meters.supply import LEAST_W, charge_meter

CHARGE, VOLTAGE = "dumpsys battery: charge counter", "dumpsys battery: voltage"
"""What its figures are called among the readings: microampere hours and millivolts."""


def _meters(facts: Facts, tracks: Mapping[str, Track]) -> Sequence[Meter]:
    if not (tracks.get(CHARGE) and tracks.get(VOLTAGE)):
        return ()
    domain = "whole device, at the battery"
    made = charge_meter(
        "battery service's charge counter x voltage", domain, tracks[CHARGE], tracks[VOLTAGE], 1e-3
    )
    return (replace(made, on_battery=True, least_w=LEAST_W),)


SERVICE = Source("battery service", "", _meters)
