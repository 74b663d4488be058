"""Options of commands, made from declared settings, and those that several commands share."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from cfsp.errors import InputError
from cfsp.settings import (
    DTYPE,
    SEED,
    THREADS,
    Declared,
    Settings,
    checked_values,
    declared,
    setting,
    setting_in,
)

MODEL_HELP = "smollm2-135m or gemma3-270m (built in), a Hugging Face folder, a .gguf file, or a hub id."

ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
SeedOption = Annotated[int, SEED]
DtypeOption = Annotated[str, DTYPE]
ThreadsOption = Annotated[int | None, THREADS]
DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
)
"""An option of every command, which phoneready.main reads."""
SET: tuple[str, ...] = setting(
    (), "Override a setting. The value is TOML: prune.prune_ratio=0.3.", option="--set", metavar="KEY=VALUE"
)


@dataclass(frozen=True)
class _Group:
    """What stands for one parameter of a command.

    Attributes:
        parameter: Its name.
        kind: The settings class that the command is given; None for a single value.
        rows: Name of a field to its declaration.
    """

    parameter: str
    kind: type | None
    rows: dict[str, Declared]

    def value(self, given: Mapping[str, Any]) -> Any:
        """What the command is given.

        Raises:
            InputError: Values that cannot be used; each is named by its option.
        """
        values = {field: _read(row, given[row.name]) for field, row in self.rows.items()}
        named = {field: row.options[-1] for field, row in self.rows.items()}
        if self.kind is not None:
            return self.kind(**checked_values(self.kind, values, named))
        ((name, row),) = self.rows.items()
        return row.setting.checked(values[name], named[name])


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of the settings classes, every Setting in its signature, and DEBUG.

    It is called with the settings made and checked. Other parameters are typer's as they are.

    Raises:
        TypeError: One name would stand for two options.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: list[_Group] = []
    for parameter in inspect.signature(command).parameters.values():
        group = _group(parameter, hints[parameter.name])
        if group is None:
            kept = parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            parameters.append(kept)
        else:
            groups.append(group)
            parameters += map(_option, group.rows.values())

    parameters.append(DEBUG)
    options = Counter(name for parameter in parameters for name in _names(parameter))
    if twice := [name for name, count in options.items() if count > 1]:
        raise TypeError(f"{command.__name__} has {', '.join(twice)} twice")

    def run(debug: bool, **given: Any) -> None:
        read = {row.name: given.pop(row.name) for group in groups for row in group.rows.values()}
        command(**given, **{group.parameter: group.value(read) for group in groups})

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter's value comes from the command line; raises KeyError for one that there is not."""
    if (source := context.get_parameter_source(name)) is None:
        raise KeyError(name)
    return source.name == "COMMANDLINE"


def given_options(context: typer.Context, names: Collection[str]) -> tuple[str, ...]:
    """Options of these parameters that are on the command line."""
    given = (one for one in context.command.params if one.name in names and was_given(context, one.name))
    return tuple(one.opts[-1] for one in given)


def _group(parameter: inspect.Parameter, hint: Any) -> _Group | None:
    name, default = parameter.name, parameter.default
    if (carried := setting_in(default)) is not None:
        return _Group(name, None, {name: Declared(name, hint, default.default, carried)})
    if (carried := setting_in(hint)) is not None:
        return _Group(name, None, {name: Declared(name, get_args(hint)[0], default, carried)})
    if not (isinstance(hint, type) and issubclass(hint, Settings)):
        return None
    rows = {row.name: row for row in declared(hint) if row.setting.option is not None}
    return _Group(name, hint, rows)


def _option(row: Declared) -> inspect.Parameter:
    wanted, kind, default = row.setting, row.kind, row.default
    if wanted.parse is not None:
        kind, default = str | None, None
    elif _is_tuple(row):
        entries = [",".join(map(str, default))] if wanted.splits and default else list(map(str, default))
        kind, default = list[str] | None, entries or None
    elif default is True:
        kind, default = bool, False
    repeatable = " Repeatable." if _is_tuple(row) and not wanted.splits else ""
    made = typer.Option(
        *row.options,
        help=(wanted.off or wanted.help) + repeatable,
        metavar=wanted.metavar,
        show_default=wanted.shown or True,
    )
    return inspect.Parameter(
        row.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
    )


def _names(parameter: inspect.Parameter) -> Iterator[str]:
    """Those of an option; typer takes the first of them for a default until it is asked."""
    for made in get_args(parameter.annotation)[1:]:
        if isinstance(made, OptionInfo):
            names = (made.default, *(made.param_decls or ()))
            yield from (name for name in names if isinstance(name, str) and name.startswith("-"))


def _is_tuple(row: Declared) -> bool:
    return get_origin(row.kind) is tuple


def _read(row: Declared, given: Any) -> Any:
    """The value of a setting from what typer read."""
    wanted, option = row.setting, row.options[-1]
    if wanted.parse is not None:
        return row.default if given is None else wanted.parse(given, option)
    if _is_tuple(row):
        kind = get_args(row.kind)[0]
        if not wanted.splits:
            return tuple(map(kind, _each(given or [], option)))
        return split_names(given or []) if kind is str else _numbers(given or [], kind, option)
    return not given if row.default is True else given


def _numbers(values: Sequence[str], kind: type, option: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(name) for name in split_names(values))
    except ValueError:
        whole, real = "whole numbers, such as 128 or 128,512", "numbers, such as 0.1 or 0.1,0.2"
        allowed = whole if kind is int else real
        raise InputError("not understood", field=option, value=",".join(values), allowed=allowed) from None


def _each(values: Sequence[str], option: str) -> tuple[str, ...]:
    if any(not value.strip() for value in values):
        raise InputError("empty", field=option)
    return tuple(values)


def split_names(values: Sequence[str]) -> tuple[str, ...]:
    """Names given as `A,B` or by repeating an option, each once, in order."""
    return tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))
