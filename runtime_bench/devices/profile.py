"""Device profiles: what is known of a phone or board, each figure with its source. One TOML file a device;
`docs/devices.md` describes every key. Whatever is computed from an unknown figure is unknown, too."""

from __future__ import annotations

import datetime
import importlib.resources
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, Self, TypeVar

import pydantic

from cfsp.errors import InputError
from cfsp.reading import parse_toml, read_text
from cfsp.validation import Section, describe_problems

T = TypeVar("T")


class Figure(Section, Generic[T]):
    """A value and where it comes from."""

    value: T | None = None
    basis: Literal["vendor", "derived", "third_party", "estimate", "measured", "unknown"]
    # Who says so: an address, or a document's name
    source: str | None = pydantic.Field(default=None, min_length=1)
    date: datetime.date | None = None  # When it was looked up or measured

    @pydantic.model_validator(mode="after")
    def _value_and_origin_stand_together(self) -> Self:
        known = self.basis != "unknown"
        if known and None in (self.value, self.source, self.date):
            raise ValueError(f"basis {self.basis!r} wants value, source and date")
        if not known and self.value is not None:
            raise ValueError("basis 'unknown' wants no value")
        return self


class Cluster(Section):
    """Cores of one kind."""

    core: str = pydantic.Field(min_length=1)  # Microarchitecture, such as Cortex-A76
    count: int = pydantic.Field(ge=1, le=64)  # How many
    max_mhz: int | None = pydantic.Field(default=None, ge=100, le=6000)  # Highest clock


Feature = Literal["asimd", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"]
_Memory = Annotated[int, pydantic.Field(ge=64, le=262144)]
_Score = Annotated[float, pydantic.Field(ge=1, le=1e6)]
_Bandwidth = Annotated[float, pydantic.Field(ge=0.5, le=1000)]


class DeviceProfile(Section):
    """A device."""

    schema_version: Literal[1]
    id: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")  # The file's name without its suffix
    name: str = pydantic.Field(min_length=1)  # As people call it
    form: Literal["phone", "tablet", "board"]
    tier: Literal["budget", "mid", "flagship", "board"]
    os: Literal["android", "ios", "linux"]
    soc: Figure[str]
    cores: Figure[Annotated[tuple[Cluster, ...], pydantic.Field(min_length=1)]]  # Clusters, fastest first
    isa: Figure[tuple[Feature, ...]]  # What the fast cores offer to applications
    ram_mib: Figure[_Memory]  # RAM, MiB
    dram_gb_s: Figure[_Bandwidth]  # Theoretical bandwidth of the RAM, 10^9 bytes a second
    dram_sustained_gb_s: Figure[_Bandwidth]  # Measured bandwidth
    app_memory_mib: Figure[_Memory]  # What one application may use, MiB
    # Its browser's score (`runtime_bench/browser/page/score.html`); a file may leave it out
    browser_score: Figure[_Score] = Figure(basis="unknown")


FIGURES = tuple(
    name
    for name, field in DeviceProfile.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Figure)
)
"""Names of the figures of a profile."""


@dataclass(frozen=True)
class KnownProfile:
    """A profile and the file that it is from."""

    profile: DeviceProfile
    file: Path
    built_in: bool


def read_profile(file: Path) -> DeviceProfile:
    """One file. Raises InputError: unreadable, no TOML, or no profile: every problem is named."""
    try:
        profile = DeviceProfile.model_validate(parse_toml(read_text(file), str(file)))
    except pydantic.ValidationError as error:
        raise InputError(f"{file}: {describe_problems(error)}") from error
    if profile.id != file.stem:
        raise InputError(f"{file}: id: not the file's name (got {profile.id!r}); allowed: {file.stem}")
    return profile


def load_profiles(own: Path | None = None) -> dict[str, KnownProfile]:
    """All profiles by id, sorted; a user's own replaces the built-in one of its id.

    Args:
        own: The user's folder; PHONEREADY_DEVICES, or phoneready/devices in the configuration folder, unless given.

    Raises:
        InputError: The problems of all files that cannot be used.
    """
    # Inside an installed package, or at the top of a checkout.
    coming = Path(str(importlib.resources.files("runtime_bench"))) / "devices"
    coming = coming if any(coming.glob("*.toml")) else coming.parents[1] / "devices"
    # Not Path.home(): a user without a home has the built-in profiles all the same.
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111
    own = own or Path(os.environ.get("PHONEREADY_DEVICES") or Path(home) / "phoneready" / "devices")
    folders = ((coming, True), (own, False))
    profiles: dict[str, KnownProfile] = {}
    problems = []
    for folder, built_in in folders:
        for file in sorted(folder.glob("*.toml")):
            try:
                profile = read_profile(file)
            except InputError as error:
                problems.append(str(error))
                continue
            profiles[profile.id] = KnownProfile(profile, file, built_in)
    if problems:
        raise InputError("; ".join(problems))
    return dict(sorted(profiles.items()))


def find_profile(name: str, profiles: Mapping[str, KnownProfile]) -> KnownProfile:
    """The profile of an id, from what `load_profiles` gave. Raises InputError: there is none; the message has
    the ids that there are."""
    if name in profiles:
        return profiles[name]
    raise InputError("no profile of this name", field="device", value=name, allowed=", ".join(profiles))
