"""Rows that another distribution brings to a table of ours by entry point: an engine, a target, a metric, a family.

    [project.entry-points."phoneready.engines"]
    toy = "phoneready_toy:ENGINE"

The entry point's name is the row's, and it points to the row. A plugin's code runs only when its row is used.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple, TypeVar

from cfsp.errors import InputError

ENGINES = "phoneready.engines"
TARGETS = "phoneready.targets"
METRICS = "phoneready.metrics"
FAMILIES = "phoneready.families"

Row = TypeVar("Row")


class Plugin(NamedTuple):
    """One entry point."""

    entry: EntryPoint
    problem: str | None  # why its name cannot be used

    @property
    def origin(self) -> str:
        """The distribution that brings it, with its version."""
        return _origin(self.entry)

    def load(self, kind: type[Row]) -> Row:
        """The row; imports the plugin. Raises InputError if it cannot be imported, or is no row of this table."""
        if self.problem:
            raise InputError(self.problem)
        name = f"plugin {self.entry.name} of {self.origin}"
        try:
            row = self.entry.load()
        except Exception as error:  # whatever a stranger's module does when it is imported
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{name} cannot be imported: {reason}") from error
        if not isinstance(row, kind):
            raise InputError(f"{name} is of type {type(row).__name__}", allowed=kind.__name__)
        return row


def find_plugins(group: str, built_in: Collection[str] = ()) -> list[Plugin]:
    """Every plugin of a group that is installed, unusable names included."""
    entries = sorted(entry_points(group=group), key=lambda entry: (entry.name, _origin(entry)))
    found = []
    for entry in entries:
        owners, problem = [_origin(other) for other in entries if other.name == entry.name], None
        if len(owners) > 1:
            problem = f"several plugins are called {entry.name}: {', '.join(owners)}; uninstall all but one"
        elif entry.name in built_in:
            named = f"plugin {entry.name} of {owners[0]} is called like a built-in one"
            problem = f"{named}; uninstall it or rename it"
        found.append(Plugin(entry, problem))
    return found


def load_plugins(group: str, built_in: Collection[str] = ()) -> dict[str, Plugin]:
    """The plugins of a group by name, none imported yet; raises InputError for a name that is not unique."""
    plugins = find_plugins(group, built_in)
    for plugin in plugins:
        if plugin.problem:
            raise InputError(plugin.problem)
    return {plugin.entry.name: plugin for plugin in plugins}


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
