"""Options of commands, made from declared settings, and those that several commands share.

What people use is an option; every other setting is `--set KEY=VALUE`, and --help-all lists them.
"""

from __future__ import annotations

import difflib
import inspect
import textwrap
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
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON document.", hidden=True)
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
SeedOption = Annotated[int, SEED]
DtypeOption = Annotated[str, DTYPE]
ThreadsOption = Annotated[int | None, THREADS]
SET: tuple[str, ...] = setting(
    (), "Override a setting. The value is TOML: prune.prune_ratio=0.3.", option="--set", metavar="KEY=VALUE"
)
EPILOG = "--help-all shows more: --json, --debug and what --set KEY=VALUE sets."
_GIVEN = "phoneready.given"
"""Of a command's context: key of `--set` -> whether it is on the command line."""


@dataclass(frozen=True)
class _Group:
    """What stands for one parameter of a command."""

    parameter: str
    kind: type | None  # the settings class that the command is given; None for a single value
    rows: dict[str, Declared]  # by field

    def value(self, given: Mapping[str, Any]) -> Any:
        """What the command is given; InputError names each value that cannot be used by its option."""
        values = {field: given[row.name] for field, row in self.rows.items()}
        named = {field: row.label for field, row in self.rows.items()}
        if self.kind is not None:
            return self.kind(**checked_values(self.kind, values, named))
        ((name, row),) = self.rows.items()
        return row.setting.checked(values[name], named[name])


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with options for the fields of its settings classes and the Settings in its signature.

    It is called with the settings made and checked. Other parameters are typer's as they are.

    Raises:
        TypeError: One name would stand for two options or settings.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    groups: list[_Group] = []
    for parameter in inspect.signature(command).parameters.values():
        group = _group(parameter, hints[parameter.name])
        if group is not None:
            groups.append(group)
            parameters += [_option(row) for row in group.rows.values() if not row.setting.rare]
        elif hints[parameter.name] is not typer.Context:
            kept = parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            parameters.append(kept)
    rows = {row.name: row for group in groups for row in group.rows.values()}
    keys = {name: row for name, row in rows.items() if row.setting.rare}
    if keys:
        parameters.append(_flag("set_", list[str] | None, None, "--set", help=f"Set one of: {', '.join(keys)}.",
                                metavar="KEY=VALUE"))  # fmt: skip

    def show_all(context: typer.Context, wanted: bool) -> None:
        if wanted:
            _show_all(context, keys)

    parameters += [
        _flag("debug", bool, False, "--debug", help="Show the traceback of an error.", hidden=True),
        _flag("help_all", bool, False, "--help-all", help="Show every option and setting, and exit.",
              is_eager=True, hidden=True, callback=show_all),
    ]  # fmt: skip
    names = [row.name for group in groups for row in group.rows.values()]
    taken = Counter([*names, *(name for parameter in parameters for name in _names(parameter))])
    if twice := [name for name, count in taken.items() if count > 1]:
        raise TypeError(f"{command.__name__} has {', '.join(twice)} twice")

    def run(
        ctx: typer.Context, debug: bool, help_all: bool, set_: Sequence[str] | None = None, **given: Any
    ) -> None:
        found = _read_keys(keys, set_ or ())
        ctx.meta[_GIVEN] = {name: name in found for name in keys}
        values = {name: row.default for name, row in keys.items()} | found
        for name in rows.keys() - keys.keys():
            value, row = given.pop(name), rows[name]
            absent = value is None and get_origin(row.kind) is not tuple
            values[name] = row.default if absent else row.read(value or () if value is None else value)
        more = {name: ctx for name, hint in hints.items() if hint is typer.Context}
        command(**more, **given, **{group.parameter: group.value(values) for group in groups})

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.keys = keys  # type: ignore[attr-defined]
    return run


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter's value comes from the command line; raises KeyError for one that there is not."""
    if name in context.meta[_GIVEN]:
        return bool(context.meta[_GIVEN][name])
    if (source := context.get_parameter_source(name)) is None:
        raise KeyError(name)
    return source.name == "COMMANDLINE"


def given_options(context: typer.Context, names: Collection[str]) -> tuple[str, ...]:
    """Options of these parameters that are on the command line."""
    given = (one for one in context.command.params if one.name in names and was_given(context, one.name))
    keys = (f"--set {name}" for name, is_given in context.meta[_GIVEN].items() if is_given and name in names)
    return (*(one.opts[-1] for one in given), *keys)


def key_instead(option: str, command: Any) -> str | None:
    """The `--set` that an unknown option seems to mean, unless a known option is nearer to it.

    Typer keeps the command's function as its callback.
    """
    keys: Mapping[str, Declared] = getattr(getattr(command, "callback", None), "keys", {})
    options = (name.lstrip("-").replace("-", "_") for one in command.params for name in one.opts)
    asked = option.lstrip("-").removeprefix("no-").replace("-", "_")
    near = "".join(difflib.get_close_matches(asked, [*keys, *options], 1))
    if near not in keys:
        return None
    row = keys[near]
    return f"--set {near}={row.written(not row.default)[0] if isinstance(row.default, bool) else 'VALUE'}"


def _read_keys(keys: Mapping[str, Declared], given: Sequence[str]) -> dict[str, Any]:
    texts: dict[str, list[str]] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key.strip() not in keys:
            raise InputError(
                "no KEY=VALUE of this command", field="--set", value=text, allowed=", ".join(keys)
            )
        texts.setdefault(key.strip(), []).append(value.strip())
    return {name: _read_key(keys[name], values) for name, values in texts.items()}


def _read_key(row: Declared, texts: list[str]) -> Any:
    if get_origin(row.kind) is tuple:
        return row.read(texts)
    if row.setting.parse is not None:
        return row.read(texts[-1])
    import pydantic  # takes as long as the rest of a help page

    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(row.kind)
        return adapter.validate_python(texts[-1])
    except pydantic.ValidationError as error:
        allowed = error.errors()[0]["msg"].removeprefix("Input should be ").partition(",")[0]
        raise InputError("not understood", field=row.label, value=texts[-1], allowed=allowed) from error


def _show_all(context: typer.Context, keys: Mapping[str, Declared]) -> None:
    for one in context.command.params:
        one.hidden = one.name == "help_all"  # type: ignore[attr-defined]
    context.command.epilog = None
    lines = [context.get_help(), *(["\nSettings, each by --set KEY=VALUE:"] if keys else [])]
    indented = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
    for row in keys.values():
        lines.append(
            f"  {row.name}  [default: {row.setting.shown or ','.join(row.written(row.default)) or 'none'}]"
        )
        lines += textwrap.wrap(row.setting.help, context.terminal_width or 92, **indented)  # type: ignore[arg-type]
    typer.echo("\n".join(lines))
    raise typer.Exit


def _group(parameter: inspect.Parameter, hint: Any) -> _Group | None:
    name, default = parameter.name, parameter.default
    if (carried := setting_in(default)) is not None:
        return _Group(name, None, {name: Declared(name, hint, default.default, carried)})
    if (carried := setting_in(hint)) is not None:
        return _Group(name, None, {name: Declared(name, get_args(hint)[0], default, carried)})
    if not (isinstance(hint, type) and issubclass(hint, Settings)):
        return None
    return _Group(name, hint, {row.name: row for row in declared(hint)})


def _option(row: Declared) -> inspect.Parameter:
    wanted, kind, default = row.setting, row.kind, row.default
    is_tuple = get_origin(kind) is tuple
    if wanted.parse is not None:
        kind, default = str | None, None
    elif is_tuple:
        kind, default = list[str] | None, row.written(default) or None
    return _flag(
        row.name, kind, default, *row.options,
        help=wanted.help + (" Repeatable." if is_tuple and not wanted.splits else ""),
        metavar=wanted.metavar,
        show_default=wanted.shown or True,
        hidden=wanted.hidden,
    )  # fmt: skip


def _flag(name: str, kind: Any, default: Any, *names: str, **attributes: Any) -> inspect.Parameter:
    made = Annotated[kind, typer.Option(*names, **attributes)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=made)


def _names(parameter: inspect.Parameter) -> Iterator[str]:
    """Those of an option; typer takes the first of them for a default until it is asked."""
    for made in get_args(parameter.annotation)[1:]:
        if isinstance(made, OptionInfo):
            names = (made.default, *(made.param_decls or ()))
            yield from (name for name in names if isinstance(name, str) and name.startswith("-"))
