"""Where a release measures, by name: what `bench --on` takes, and this machine under limits.

local                            this machine as it is
constrained:400M                 with that much memory
constrained:pixel-8a             with what one application may use on that device
constrained:400M,cores=0+1       on those cores only
browser, and the others          as in `phoneready bench --on`
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from cfsp.errors import InputError
from cfsp.progress import no_progress
from cfsp.units import parse_bytes
from runtime_bench.devices.profile import find_profile, load_profiles
from runtime_bench.environment import environment_of
from runtime_bench.records.bench_record import Environment
from runtime_bench.records.reported import Conditions, unknown_conditions
from runtime_bench.targets import Target, ThisMachine
from runtime_bench.targets.constrained import check_memory
from runtime_bench.targets.table import TargetOptions, TargetRow, find_row
from runtime_bench.worker import WorkerRequest, WorkerResult

CONSTRAINED = "constrained"


def check_place(name: str) -> str:
    """The name, if there can be such a place; nothing is opened.

    Raises:
        InputError: There cannot.
    """
    row, address, options = _parse(name)
    if address:
        row.open(address, options, no_progress)  # which says whether it is one, and connects to nothing
    return name


def open_place(name: str) -> Target:
    """The target of a name.

    Raises:
        InputError: There is none, or it cannot be reached now.
    """
    row, address, options = _parse(name)
    return row.open(address, options, no_progress)


def row_of_place(name: str) -> TargetRow:
    """What is known of places of its kind before one is opened."""
    return _parse(name)[0]


def place_details(name: str) -> dict[str, Any]:
    """What a place's name refers to and that may change while the name stays."""
    device = _parse(name)[2].device
    return find_profile(device, load_profiles()).profile.model_dump(mode="json") if device else {}


@dataclass(frozen=True)
class Unreachable(ThisMachine):
    """A place that could not be opened: every run there fails with the reason."""

    name: str
    reason: str

    pushes = True
    """Whatever is asked of it, its row says why it could not be opened."""

    @property
    def kind(self) -> str:
        """What its numbers would have been."""
        return "constrained-host" if self.name.startswith(CONSTRAINED) else "measured"

    def require(self, engine: str) -> None:
        """See runtime_bench.targets.Target."""

    def environment(self) -> Environment:
        """See runtime_bench.targets.Target."""
        return environment_of({}, cpus_usable=None, platform="unknown", versions={})

    def conditions(self) -> Conditions:
        """See runtime_bench.targets.Target."""
        return unknown_conditions(self.reason)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See runtime_bench.targets.Target."""
        return WorkerResult(error=self.reason)


def place_slug(name: str) -> str:
    """The name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")


def _parse(name: str) -> tuple[TargetRow, str, TargetOptions]:
    """A name's row, address and options; only this machine under limits has options in its name."""
    kind, _, details = name.partition(":")
    if kind == CONSTRAINED:
        return *find_row(kind), _limits(details)
    return *find_row(name), TargetOptions()


def _limits(details: str) -> TargetOptions:
    limits = TargetOptions()
    for part in filter(None, details.split(",")):
        if part.startswith("cores="):
            limits = replace(limits, cores=_cores(part))
        elif part[0].isdecimal():
            check_memory(parse_bytes(part, CONSTRAINED))
            limits = replace(limits, memory=part)
        else:
            limits = replace(limits, device=find_profile(part, load_profiles()).profile.id)
    if limits == TargetOptions():
        forms = "constrained:SIZE, constrained:DEVICE, either or neither with cores=0+1 after a comma"
        raise InputError("no limit", field=CONSTRAINED, allowed=forms)
    return limits


def _cores(part: str) -> tuple[int, ...]:
    names = tuple(part.removeprefix("cores=").split("+"))
    if not all(name.isdecimal() for name in names):
        raise InputError("not core numbers", field=CONSTRAINED, value=part, allowed="such as cores=0+1")
    return tuple(map(int, names))
