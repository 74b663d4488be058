"""release.toml: what a release is made of. All errors are reported at once, each with its line and key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from cfsp.errors import InputError
from cfsp.pruning.settings import READS as PRUNING
from cfsp.reading import parse_toml, read_text
from cfsp.recovery.settings import training_as_read
from cfsp.settings import Reads, as_read, no_effect
from cfsp.validation import Location, describe_problems, place_of
from exporters.families import BASE, FAMILIES, family_of, find_format
from exporters.gguf import find_quant
from exporters.onnx import find_variant
from exporters.settings import READS as FILES
from phoneready.evaluation.evaluation_record import repeated_text
from phoneready.evaluation.settings import READS as JUDGING
from phoneready.settings.planned import budget_problems
from phoneready.settings.schema import COUNTED, RecoverConfig, ReleaseConfig
from phoneready.settings.target import AIMED
from phoneready.settings.template import demo_config_text
from phoneready.settings.toml_lines import key_lines, nearest
from runtime_bench.targets.places import place_slug, row_of_place
from runtime_bench.workload import SAMPLING_READS as SAMPLING


def with_variants(config: ReleaseConfig, names: Sequence[str]) -> ReleaseConfig:
    """The configuration with other ONNX variants.

    Raises:
        InputError: An unknown one, or what the rest of the configuration wants is not among them.
    """
    variants = tuple(dict.fromkeys(find_variant(name).name for name in names))
    changed = config.model_copy(update={"export": dataclasses.replace(config.export, onnx=variants)})
    check_sections(changed, f"with --onnx {','.join(names)}: ")
    return _as_read(changed)


def check_sections(config: ReleaseConfig, prefix: str = "") -> None:
    """Raise InputError for what sections of a configuration that was changed say of each other that is not so."""
    if problems := [f"{place_of(place)}: {message}" for place, message in _problems_between(config)]:
        raise InputError(prefix + "; ".join(problems))


_TRUST = "trust_remote_code"


def load_config(
    path: Path | None, overrides: Sequence[str] = (), *, trust_remote_code: bool = False
) -> ReleaseConfig:
    """Read a release.toml, or the embedded demo's for None; relative paths in it start at its folder.

    Args:
        path: The file.
        overrides: Such as `prune.prune_ratio=0.3`; the value is TOML.
        trust_remote_code: Let transformers run code that the model brings along; only a person may say so, no file.

    Raises:
        InputError: Missing, no TOML, or with errors; the message names all of them. What nothing reads is no error: its
            warning is in the configuration.
    """
    if path is None:
        config = parse_config(demo_config_text(), where="the demo's configuration", overrides=overrides)
    else:
        config = beside(parse_config(read_text(path), where=str(path), overrides=overrides), path.parent)
    if trust_remote_code:
        return config.model_copy(update={"model": config.model.model_copy(update={_TRUST: True})})
    return config


def parse_config(text: str, *, where: str, overrides: Sequence[str] = ()) -> ReleaseConfig:
    """Parse and validate; `where` is named in errors.

    Raises:
        InputError: As `load_config`.
    """
    values, lines = parse_toml(text, where), key_lines(text)
    given = {location: override for override in overrides for location in _override(values, override)}
    name = _place_namer(lines, given)
    model = values.get("model")
    if isinstance(model, dict) and _TRUST in model:
        place = ("model", _TRUST)
        raise InputError(
            f"{where}: {name(place)}{place_of(place)}: no configuration may let a model's code run; "
            "pass --trust-remote-code to the command"
        )

    def described(problems: Sequence[tuple[Location, str]]) -> list[str]:
        return [f"{name(place)}{place_of(place)}: {message}" for place, message in problems]

    try:
        config = _read_target(ReleaseConfig.model_validate(values), values)
    except pydantic.ValidationError as error:
        places = [problem["loc"] for problem in error.errors()]
        problems = [describe_problems(error, name), *described(_problems_beside(values, places))]
        raise InputError(f"{where}: {'; '.join(problems)}") from error
    if problems := described(_problems_between(config)):
        raise InputError(f"{where}: {'; '.join(problems)}")
    return _as_read(config)


def _read_target(config: ReleaseConfig, values: Mapping[str, Any]) -> ReleaseConfig:
    return config.model_copy(update={"prune": config.prune.aimed(values.get("prune", {}))})


def _problems_between(config: ReleaseConfig) -> list[tuple[Location, str]]:
    """What sections say of each other that is not so."""
    searched = config.tune.problem if config.tune else None
    return [
        *([(("tune",), searched)] if searched else []),
        *_training(config),
        *_target(config),
        *_vocabulary_alone(config),
        *_unknown_files(config),
        *_repeated_texts(config),
        *_no_places(config),
        *_no_cache(config),
        *_no_backend(config),
        *_imatrix_needed(config),
        *budget_problems(config),
        *_tiers(config),
    ]


def _problems_beside(values: Mapping[str, Any], faults: Sequence[Location]) -> list[tuple[Location, str]]:
    """`_problems_between` for a configuration with faulty keys, as far as those do not bear on them."""
    names = {fault[0] for fault in faults}
    if names & {"model", "evaluate", "export", "bench", "baseline"}:
        return []
    rest = {key: value for key, value in values.items() if key not in names}
    sound = list(range(len(values["budgets"]))) if "budgets" in rest else []
    if faulty := {fault[1] for fault in faults if fault[0] == "budgets" and len(fault) > 1}:
        sound = [number for number in range(len(values["budgets"])) if number not in faulty]
        rest["budgets"] = [values["budgets"][number] for number in sound]
    try:
        config = _read_target(ReleaseConfig.model_validate(rest), rest)
    except pydantic.ValidationError:
        return []
    return [(_renumbered(place, sound), message) for place, message in _problems_between(config)]


def _renumbered(place: Location, numbers: Sequence[int]) -> Location:
    """The place of a budget among all of them."""
    if place[0] == "budgets" and len(place) > 1 and isinstance(place[1], int):
        return ("budgets", numbers[place[1]], *place[2:])
    return place


def _override(values: dict[str, Any], text: str) -> Iterator[Location]:
    """Set what `a.b=VALUE` says, and yield the locations that were set.

    Raises:
        InputError: It says no such thing.
    """
    try:
        stated = parse_toml(text, "--set")
    except InputError as error:
        raise InputError(
            "not understood", field="--set", value=text,
            allowed="KEY=VALUE with a TOML value, such as prune.prune_ratio=0.3 or 'model.reference=\"NAME\"'",
        ) from error  # fmt: skip
    yield from _merge(values, stated)


def _merge(values: dict[str, Any], stated: Mapping[str, Any], place: Location = ()) -> Iterator[Location]:
    for key, value in stated.items():
        here = values.get(key)
        if isinstance(value, dict) and isinstance(here, dict):
            yield from _merge(here, value, (*place, key))
        else:
            values[key] = value
            yield (*place, key)


def _place_namer(lines: Mapping[Location, int], given: Mapping[Location, str]) -> Callable[[Location], str]:
    """What to put before a location in a message: its line, or the option that set it."""

    def name(location: Location) -> str:
        if (override := nearest(location, given)) is not None:
            return f"--set {override}: "
        line = nearest(location, lines)
        return "" if line is None else f"line {line}: "

    return name


def _target(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    """A target that cannot be, and what does not go together with one."""
    prune = config.prune
    if problem := prune.target_problem:
        yield ("prune",), problem
    if config.tune and prune.target:
        yield ("tune",), "a search chooses the ratio itself: leave the target in [prune] out"
    try:
        prune.sized_formats(config.export.names)
    except InputError as error:
        yield ("prune",), str(error)


def _vocabulary_alone(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    """What cannot be measured where tokens may go."""
    searched = config.tune.vocabularies if config.tune else ()
    if config.evaluate.metrics and (any(searched) if searched else config.prune.may_trim):
        message = "own metrics read token ids of one vocabulary, and tokens may go"
        yield (
            ("evaluate", "metrics"),
            f'{message}; leave out prune.vocabulary, "vocabulary" of target_axes and tune.vocabularies',
        )


def _unknown_files(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    """Files that are to be measured or judged and are not exported."""
    known = config.export.names
    for section in ("bench", "evaluate"):
        for name in getattr(config, section).files:
            if name not in known:
                yield (section, "files"), _not_exported("files", name, known).problem


def _training(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    if (training := config.recover) is not None:
        yield from _complaint("recover", training, lambda: _check_training(training, config.export.names))
        if config.learns_nothing and config.tune is None:
            message = "nothing is removed, and a model learns nothing from its own distribution"
            yield ("recover", "loss"), f"{message}; allowed: next-token or both, or something to prune"


def _check_training(training: RecoverConfig, exported: Sequence[str]) -> None:
    """Raise InputError where a model cannot be trained so, or as a file that is not exported."""
    training.check()
    if (name := training.for_quant) is not None and find_format(name).name not in exported:
        raise _not_exported("for_quant", name, exported)


def _not_exported(field: str, name: str, exported: Sequence[str]) -> InputError:
    return InputError("not exported", field=field, value=name, allowed=", ".join(exported))


def _no_places(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    """Targets that cannot run what is to be measured there."""
    measured = config.bench.measured(config.export.names)
    others = [name for name in measured if family_of(name) is not BASE]
    folders = [place_slug(place) for place in config.bench.targets]
    if len(set(folders)) < len(folders):
        yield ("bench", "targets"), f"two have one name on disk: {', '.join(config.bench.targets)}"
    for place in config.bench.targets if others else ():
        if row_of_place(place).gguf_only:
            message = f"{place} runs GGUF files alone, not {', '.join(others)}; name others in files"
            yield ("bench", "targets"), message


def _no_cache(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    """A type of the key-value cache that not all that is measured can have."""
    asked = config.bench.cache_type
    if asked is None:
        return
    for place in config.bench.targets:
        if not row_of_place(place).tells_cache:
            yield ("bench", "cache_type"), f"the engines of {place} cannot be told the type of their cache"
    measured = [(name, family_of(name)) for name in config.bench.measured(config.export.names)]
    if anchor := config.bench.anchor:
        measured += [(anchor, family) for family in FAMILIES.values() if family.claims(anchor)]
    for name, family in measured:
        if asked not in family.cache_types:
            known = ", ".join(family.cache_types) or "none"
            message = (
                f"{family.runtime} cannot run {name} with {asked}; allowed: {known}, or other names in files"
            )
            yield ("bench", "cache_type"), message


def _no_backend(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    """A backend that the runner of a place was not built with."""
    asked, names = config.bench.backend, config.bench.measured(config.export.names)
    if asked not in (None, "cpu") and any(family_of(name) is BASE for name in names):
        for place in config.bench.targets:
            if row_of_place(place).has_runner:
                message = (
                    f"the runner that a release has for {place} computes on the processor; see bench --runner"
                )
                yield ("bench", "backend"), message


def _imatrix_needed(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    needed = [name for name in config.export.quants if find_quant(name).needs_imatrix]
    if needed and not config.export.imatrix:
        yield ("export", "imatrix"), f"{', '.join(needed)} cannot be written without an importance matrix"


def _as_read(config: ReleaseConfig) -> ReleaseConfig:
    """With the default of what nothing reads, and a warning for each; a search prunes in other ways than is written."""
    rows: list[tuple[str, Reads, tuple[Any, ...]]] = [
        ("evaluate", JUDGING, ()),
        ("export", FILES, ()),
        ("bench", SAMPLING, ()),
        ("prune", AIMED, ()),
    ]
    if config.tune is None:
        rows += [("prune", PRUNING, ()), ("prune", COUNTED, (config.prune.may_trim,))]
    changed, warnings = dict[str, Any](), list[str]()
    for name, reads, beside in rows:
        section = changed.get(name, getattr(config, name))
        changed[name], unread = as_read(section, reads, *beside, section=name)
        warnings += unread
    if config.recover is not None:
        changed["recover"], unread = training_as_read(config.recover, config.recover.texts, "recover")
        warnings += unread
    if config.tiers and config.stores is None:
        changed["tiers"] = ()
        warnings.append(no_effect("tiers", "without [stores]"))
    return config.model_copy(update=changed).with_warnings(warnings)


def _complaint(name: str, section: object, check: Callable[[], object]) -> Iterator[tuple[Location, str]]:
    """What a check says of a section, at the key that it names."""
    try:
        check()
    except InputError as error:
        at_key = bool(error.field) and hasattr(section, error.field)
        yield ((name, error.field), error.problem) if at_key else ((name,), str(error))


def _tiers(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    """Tiers that cannot be told apart, and stores without any."""
    if config.stores is not None and not config.tiers:
        yield ("stores",), "[stores] names the frontier, [[tiers]] the devices: name some"
    for field in ("name", "ram_bytes"):
        values = [getattr(tier, field) for tier in config.tiers]
        if len(set(values)) < len(values):
            yield ("tiers",), f"two have the same {field.partition('_')[0]}"


def _repeated_texts(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    if name := repeated_text(config.evaluate.text, config.evaluate.chats):
        yield ("evaluate", name.partition(" ")[0]), f"two have the name {name!r}; rename one of the files"


def beside(config: ReleaseConfig, folder: Path) -> ReleaseConfig:
    """The configuration with references that name a file or folder in `folder` resolved from there."""

    def resolve(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(resolve, value))
        is_there = value is not None and (folder / value).exists()
        return type(value)(str(folder / value)) if is_there else value

    changed: dict[str, Any] = {}
    for name, fields in _REFERENCES.items():
        section = getattr(config, name)
        if section is not None:
            resolved = {field: resolve(getattr(section, field)) for field in fields}
            plain = dataclasses.is_dataclass(section)
            changed[name] = (
                dataclasses.replace(section, **resolved) if plain else section.model_copy(update=resolved)
            )
    return config.model_copy(update=changed)


_REFERENCES: Mapping[str, tuple[str, ...]] = {
    "model": ("reference",),
    "prune": ("calibration", "vocabulary_text"),
    "recover": ("data", "validation"),
    "evaluate": ("text", "chats", "tasks", "task_data"),
    "bench": ("anchor",),
    "baseline": ("file",),
    "stores": ("frontier",),
}
"""Section -> the fields that may name files."""
