"""Settings declared once: fields of a frozen dataclass, each with its bounds and a word on what it means.

    @dataclass(frozen=True)
    class Training(Settings):
        rank: int = setting(16, "Mean rank of the adapters.", ge=1)

Options of the command line, keys of release.toml, its template and the commands that a report prints are made from
that. pydantic checks the fields of such a dataclass; `check_settings` checks one that was made in Python.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cfsp.errors import InputError

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

S = TypeVar("S", bound="Settings")
T = TypeVar("T")

LARGEST = 2**31 - 1  # no number may be beyond this unless its setting says so


@dataclass(frozen=True, eq=False)
class Setting:
    """What a value has to be, and how people set it. Of a tuple, bounds, choices and `look_up` are each entry's."""

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: Iterable[
        str
    ] = ()  # names, or where their table is, as `module:NAME`, so that help need not load it
    # Finds an entry in its table and gives the name as it is written there; raises InputError.
    look_up: Callable[[str], str] | None = None
    least: int = 0  # fewest entries of a tuple
    parse: Callable[[str, str], Any] | None = None  # reads the option's text, given its name for errors
    option: str = ""  # names such as `-n --n-gen`; `--field-name` if empty
    rare: bool = False  # no option of its own: the command line has it as `--set NAME=VALUE`
    hidden: bool = False  # an option that only --help-all shows
    metavar: str | None = None  # `NAME,...` splits at commas, otherwise an option of a tuple is repeated
    shown: str | None = None  # the default in help, if the value itself does not say it
    example: Any = None  # for the template of a configuration, if there is no default

    @property
    def allowed(self) -> str:
        """The range in words."""
        if self.ge is not None and self.le is not None:
            return f"{self.ge} to {self.le}"
        bounds = {"{} or more": self.ge, "above {}": self.gt, "at most {}": self.le, "below {}": self.lt}
        said = [text.format(bound) for text, bound in bounds.items() if bound is not None]
        return " and ".join(said) or f"at most {LARGEST}"

    @property
    def splits(self) -> bool:
        """Whether several values are given as `A,B`."""
        return (self.metavar or "").endswith(",...")

    def checked(self, value: Any, field: str = "") -> Any:
        """The value, with names as their table writes them; raises InputError that names `field`."""
        if not isinstance(value, tuple):
            return value if value is None else self._entry(value, field)
        if len(value) < self.least:
            raise InputError("empty", field=field, allowed="at least one")
        entries = _all([functools.partial(self._entry, entry, field) for entry in value])
        return tuple(dict.fromkeys(entries) if self.look_up else entries)

    def _entry(self, value: Any, field: str) -> Any:
        if self.look_up is not None:
            return self.look_up(value)
        names = self.choices
        if isinstance(names, str):
            module, _, name = names.partition(":")
            names = getattr(importlib.import_module(module), name)
        if (names := tuple(names)) and value not in names:
            raise InputError("unknown", field=field, value=value, allowed=", ".join(names))
        if isinstance(value, int | float) and not isinstance(value, bool):
            within = (  # so that nothing holds for NaN
                (self.ge is None or value >= self.ge)
                and (self.gt is None or value > self.gt)
                and (self.lt is None or value < self.lt)
                and -LARGEST <= value <= (LARGEST if self.le is None else self.le)
            )
            if not within:
                raise InputError("out of range", field=field, value=value, allowed=self.allowed)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        """Pydantic's check of the type, then ours."""
        from pydantic_core import core_schema

        def checked(value: Any) -> Any:
            try:
                return self.checked(value)
            except InputError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_after_validator_function(checked, _strict(handler(source)))


class Settings:
    """Base of dataclasses whose fields are declared by `setting`, which goes into their annotations."""

    def __init_subclass__(cls) -> None:
        for name, hint in inspect.get_annotations(cls).items():
            field = cls.__dict__.get(name)
            if isinstance(field, dataclasses.Field) and _DECLARED in field.metadata:
                cls.__annotations__[name] = Annotated[hint, field.metadata[_DECLARED]]


def setting(default: T, help: str | Setting, **attributes: Any) -> T:
    """A field of a class of settings: its default, its help, and whatever else `Setting` has."""
    declaration = Setting(help, **attributes) if isinstance(help, str) else help
    field: Any = dataclasses.field(default=default, metadata={_DECLARED: declaration})
    typed: T = field
    return typed


_DECLARED = "setting"
SEED = Setting("Seed of everything that is drawn at random.", ge=0, le=2**32 - 4, metavar="N", rare=True)
"""NumPy takes 32 bits, llama.cpp's last means any seed, and a release also uses the two seeds after its own."""


def _device_name(name: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]{0,2}))?", name) is None:
        raise InputError("unknown", field="device", value=name, allowed="auto, cpu, cuda, cuda:N or mps")
    return name


DEVICE = Setting(
    "Where torch computes: auto (cuda where there is one), cpu, cuda, cuda:N or mps (Apple's).",
    look_up=_device_name,
    metavar="DEVICE",
    hidden=True,
)
DTYPE = Setting(
    "What weights are kept in: auto (their own 16 bits where float32 takes too much memory), float32, bfloat16 or "
    "float16; they are float32 while something is computed with them.",
    choices="cfsp.precision:DTYPES",
    metavar="DTYPE",
    rare=True,
)
THREADS = Setting("Threads to compute with.", ge=1, le=4096, shown="as many as torch finds", hidden=True)


class Declared(NamedTuple):
    """A field of a settings class, or a parameter of a command, that a Setting describes."""

    name: str
    kind: Any  # its type, without the marker
    default: Any
    setting: Setting

    @property
    def options(self) -> list[str]:
        """Names of its option, the longest last; none if it is rare."""
        return (
            [] if self.setting.rare else (self.setting.option or f"--{self.name.replace('_', '-')}").split()
        )

    @property
    def label(self) -> str:
        """How the command line names it."""
        return f"--set {self.name}" if self.setting.rare else self.options[-1]

    def written(self, value: Any) -> list[str]:
        """The texts that people give for a value."""
        if isinstance(value, bool):
            return [str(value).lower()]
        texts = [str(one) for one in (value if isinstance(value, tuple) else (value,)) if one is not None]
        return [",".join(texts)] if texts and self.setting.splits else texts

    def read(self, given: Any) -> Any:
        """The value that an option's text, or the texts of one that is repeated, stand for; raises InputError."""
        if self.setting.parse is not None:
            return self.setting.parse(given, self.label)
        if get_origin(self.kind) is not tuple:
            return given
        kind = get_args(self.kind)[0]
        if not self.setting.splits:
            if any(not text.strip() for text in given):
                raise InputError("empty", field=self.label)
            return tuple(map(kind, given))
        names = dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip())
        try:
            return tuple(map(kind, names))
        except ValueError:
            whole, real = "whole numbers, such as 128 or 128,512", "numbers, such as 0.1 or 0.1,0.2"
            allowed = whole if kind is int else real
            raise InputError(
                "not understood", field=self.label, value=",".join(given), allowed=allowed
            ) from None


def setting_in(hint: Any) -> Setting | None:
    """The Setting that an annotation, or the default of a parameter, carries."""
    if isinstance(hint, dataclasses.Field):
        return hint.metadata.get(_DECLARED)
    metadata = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((one for one in metadata if isinstance(one, Setting)), None)


def declared(settings: Any) -> tuple[Declared, ...]:
    """The fields of a dataclass that can be set, in order; those without a Setting are not for users."""
    hints = get_type_hints(settings, include_extras=True)
    return tuple(
        Declared(field.name, get_args(hints[field.name])[0], field.default, setting)
        for field in dataclasses.fields(settings)
        if (setting := setting_in(hints[field.name])) is not None
    )


def check_settings(settings: Any) -> None:
    """Raise InputError for fields of a settings dataclass whose value cannot be used, each with what can be."""
    kind = type(settings)
    checked_values(kind, {row.name: getattr(settings, row.name) for row in declared(kind)}, {})


def checked_values(kind: type, values: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    """Values of a settings class as they are used; raises InputError for all that cannot be, under their `named`."""

    def check(row: Declared) -> Any:
        name, value = named.get(row.name, row.name), values[row.name]
        optional = get_origin(row.kind) in (Union, types.UnionType) and type(None) in get_args(row.kind)
        if value is None and not optional:
            raise InputError("not set", field=name)
        return row.setting.checked(value, name)

    rows = [row for row in declared(kind) if row.name in values]
    checks = [functools.partial(check, row) for row in rows]
    return dict(zip((row.name for row in rows), _all(checks), strict=True))


Reads = Mapping[str, tuple[Callable[..., bool], str]]
"""Field -> whether it is read, given the settings and what they are used with; and `without ...`, if it is not."""


def as_read(settings: S, reads: Reads, *beside: Any, section: str = "") -> tuple[S, tuple[str, ...]]:
    """Settings in which what nothing reads has its default, and a warning for each of these.

    Args:
        reads: A row is asked of settings in which the rows before it are as they are read.
        beside: What the settings are used with.
        section: Of release.toml, whose keys warnings name; if empty they name options.
    """
    rows, warnings = {row.name: row for row in declared(type(settings))}, []
    for name, (is_read, where) in reads.items():
        row = rows[name]
        if getattr(settings, name) != row.default and not is_read(settings, *beside):
            settings = dataclasses.replace(settings, **{name: row.default})  # type: ignore[type-var]
            warnings.append(no_effect(f"{section}.{name}" if section else row.label, where))
    return settings, tuple(warnings)


def no_effect(name: str, where: str) -> str:
    """The warning of an option or key that nothing reads; where: `without ...`."""
    return f"{name} has no effect {where}"


def pick(kind: type[S], source: Any, **changes: Any) -> S:
    """Settings of a class, with the fields that a larger class shares with it."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(source, name) for name in names if hasattr(source, name)} | changes)


def _all(checks: Iterable[Callable[[], Any]]) -> list[Any]:
    """What all checks give; or the complaints of all that fail, as one."""
    values, problems = [], []
    for check in checks:
        try:
            values.append(check())
        except InputError as error:
            problems.append(error)
    if len(problems) > 1:
        raise InputError("; ".join(map(str, problems)))
    if problems:
        raise problems[0]
    return values


def _strict(schema: Any) -> Any:
    """The schema in which `true` is not 1, and "1" is a text."""
    if schema["type"] in ("bool", "float", "int"):
        return schema | {"strict": True}
    if schema["type"] == "nullable":
        return schema | {"schema": _strict(schema["schema"])}
    if schema["type"] == "tuple":
        return schema | {"items_schema": [_strict(item) for item in schema["items_schema"]]}
    return schema
