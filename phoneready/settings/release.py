"""release.toml: what a release is made of. All errors are reported at once, each with its line and key."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pydantic

from cfsp.errors import InputError
from cfsp.evaluation.task_results import READS as JUDGING
from cfsp.pruning.settings import READS as PRUNING
from cfsp.reading import parse_toml, read_text
from cfsp.recovery.settings import training_as_read
from cfsp.settings import Reads, as_read
from cfsp.validation import Location, describe_problems, place_of
from exporters.families import BASE, FAMILIES, family_of, find_format
from exporters.families import READS as FILES
from exporters.gguf.quants import find_quant
from phoneready.evaluation.evaluation_record import repeated_text, text_name
from phoneready.figures.figures import (
    ANY_MEMBER,
    CHECKPOINT,
    METRICS,
    PROJECTION,
    SELECTORS,
    TEXT,
    FigureKey,
    fits,
    means,
    measured_place,
    metrics_from,
    select,
)
from phoneready.settings.schema import COUNTED, ReleaseConfig
from phoneready.settings.template import demo_config_text
from runtime_bench.targets.table import parse_target, target_beside, target_slug

_REFERENCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model": ("reference",),
        "prune": ("calibration", "vocabulary_text"),
        "recover": ("data", "validation"),
        "evaluate": ("text", "chats", "tasks", "task_data"),
        "quantize": ("made",),
        "bench": ("anchor",),
        "baseline": ("file",),
    }
)
"""Section -> the fields that may name files."""
_Problem = tuple[Location, str]


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ReleaseConfig:
    """Read a release.toml, or the embedded demo's for None; relative paths in it start at its folder.

    Overrides are such as `prune.prune_ratio=0.3`, with a TOML value.

    Raises:
        InputError: Missing, no TOML, or with errors; the message names all of them. What nothing reads is no error: its
            warning is in the configuration.
    """
    if path is None:
        return parse_config(demo_config_text(), where="the demo's configuration", overrides=overrides)
    return beside(parse_config(read_text(path), where=str(path), overrides=overrides), path.parent)


def parse_config(text: str, *, where: str, overrides: Sequence[str] = ()) -> ReleaseConfig:
    """Parse and validate; `where` is named in errors. Raises InputError as `load_config`."""
    values, lines = parse_toml(text, where), key_lines(text)
    given = {location: override for override in overrides for location in _override(values, override)}

    def name(location: Location) -> str:
        """What to put before a location in a message: its line, or the option that set it."""
        around = [location[:length] for length in range(len(location), 0, -1)]
        if override := next((given[place] for place in around if place in given), None):
            return f"--set {override}: "
        line = next((lines[place] for place in around if place in lines), None)
        return "" if line is None else f"line {line}: "

    def described(problems: Iterable[_Problem]) -> list[str]:
        return [f"{name(place)}{place_of(place)}: {message}" for place, message in problems]

    try:
        config = ReleaseConfig.model_validate(values)
        sections = {name: section for name, section in values.items() if isinstance(section, dict)}
        config._stated = frozenset(f"{name}.{key}" for name, section in sections.items() for key in section)
        problems = described(_problems_between(config))
    except pydantic.ValidationError as error:
        places = [problem["loc"] for problem in error.errors()]
        told = describe_problems(error, ReleaseConfig, name)
        problems = [told, *described(_problems_beside(values, places))]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")
    return _as_read(config)


def beside(config: ReleaseConfig, folder: Path) -> ReleaseConfig:
    """The configuration with references that name a file or folder in `folder` resolved from there."""

    def resolve(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(resolve, value))
        is_there = value is not None and (folder / value).exists()
        return type(value)(str(folder / value)) if is_there else value

    targets = tuple(target_beside(place, folder) for place in config.bench.targets)
    config = config.model_copy(update={"bench": dataclasses.replace(config.bench, targets=targets)})
    changed: dict[str, Any] = {
        "budgets": tuple(
            one.model_copy(update={"targets": tuple(target_beside(place, folder) for place in one.targets)})
            for one in config.budgets
        )
    }
    for name, fields in _REFERENCES.items():
        section = getattr(config, name)
        if section is not None:
            resolved = {field: resolve(getattr(section, field)) for field in fields}
            plain = dataclasses.is_dataclass(section)
            changed[name] = (
                dataclasses.replace(section, **resolved) if plain else section.model_copy(update=resolved)
            )
    return config.model_copy(update=changed)


def key_lines(text: str) -> dict[Location, int]:
    """Tables and keys of a TOML document -> the line that they begin at, from 1.

    Keys inside inline tables and in values of several lines stand at their statement.
    """
    found: dict[Location, int] = {}
    arrays: Counter[Location] = Counter()
    table: Location = ()

    def names(text: str) -> list[str]:
        return [name.strip(" \t\"'") for name in text.split(".")]

    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[\[?)([^\[\]#]+)\]", line):
            table = ()
            parts = names(header[2])
            for position, name in enumerate(parts, 1):
                table = (*table, name)
                if header[1] == "[[" and position == len(parts):
                    arrays[table] += 1
                if arrays[table]:
                    table = (*table, arrays[table] - 1)
            found.setdefault(table, number)
        elif key := re.match(r"\s*([\w.\s\"'-]+?)\s*=", line):
            found.setdefault((*table, *names(key[1])), number)
    return found


def _override(values: dict[str, Any], text: str) -> Iterator[Location]:
    """Set what `a.b=VALUE` says, and yield the locations that were set; raises InputError."""
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


def _problems_beside(values: Mapping[str, Any], faults: Sequence[Location]) -> list[_Problem]:
    """`_problems_between` for a configuration with faulty keys, as far as those do not bear on them."""
    names = {fault[0] for fault in faults}
    if names & {"model", "evaluate", "quantize", "bench", "baseline"}:
        return []
    rest = {key: value for key, value in values.items() if key not in names}
    sound = list(range(len(values["budgets"]))) if "budgets" in rest else []
    if faulty := {fault[1] for fault in faults if fault[0] == "budgets" and len(fault) > 1}:
        sound = [number for number in range(len(values["budgets"])) if number not in faulty]
        rest["budgets"] = [values["budgets"][number] for number in sound]
    try:
        found = list(_problems_between(ReleaseConfig.model_validate(rest)))
    except pydantic.ValidationError:
        return []
    problems: list[_Problem] = []
    for place, message in found:
        if place[0] == "budgets" and len(place) > 1 and isinstance(place[1], int):
            place = ("budgets", sound[place[1]], *place[2:])
        problems.append((place, message))
    return problems


def _problems_between(config: ReleaseConfig) -> Iterator[_Problem]:
    """Contradictions between sections: what cannot be pruned, trained, judged, written, or measured at a target."""
    prune, training, made, bench = config.prune, config.recover, config.quantize, config.bench

    def not_exported(name: str) -> str:
        return f"not exported (got {name!r}); allowed: {', '.join(made.names)}"

    if training is not None:
        try:
            training.check()
        except InputError as error:
            at_key = bool(error.field) and hasattr(training, error.field)
            yield (("recover", error.field), error.problem) if at_key else (("recover",), str(error))
        if training.for_quant is not None and find_format(training.for_quant).name not in made.names:
            yield ("recover", "for_quant"), not_exported(training.for_quant)
        if config.learns_nothing:
            message = "nothing is removed, and a model learns nothing from its own distribution"
            yield ("recover", "loss"), f"{message}; allowed: next-token or both, or something to prune"
    if config.evaluate.metrics and prune.vocabulary:
        message = "own metrics read token ids of one vocabulary, and tokens go; leave out prune.vocabulary"
        yield ("evaluate", "metrics"), message
    if name := repeated_text(config.evaluate.text, config.evaluate.chats):
        yield ("evaluate", name.partition(" ")[0]), f"two have the name {name!r}; rename one of the files"
    for section, files in (("bench", bench.files), ("evaluate", config.evaluate.files)):
        yield from (((section, "files"), not_exported(one)) for one in files if one not in made.names)
    if BASE.name not in made.formats:
        yield ("quantize", "to"), f"a release has GGUF files; allowed: also one of {', '.join(BASE.names)}"
    needed = [name for name in made.formats.get(BASE.name, ()) if find_quant(name).needs_imatrix]
    if needed and not made.imatrix:
        yield ("quantize", "imatrix"), f"{', '.join(needed)} cannot be written without an importance matrix"
    measured = {name: family_of(name) for name in bench.measured(made.names)}
    others = [name for name, family in measured.items() if family is not BASE]
    folders = [target_slug(place) for place in bench.targets]
    if len(set(folders)) < len(folders):
        yield ("bench", "targets"), f"two have one name on disk: {', '.join(bench.targets)}"
    elif len(set(map(measured_place, bench.targets))) < len(folders):
        yield ("bench", "targets"), "two are one place: folder and retries tell no figures apart"
    for place in bench.targets:
        row, _, options = parse_target(place)
        if others and row.gguf_only:
            message = f"{place} runs GGUF files only, not {', '.join(others)}; name others in files"
            yield ("bench", "targets"), message
        if bench.cache_type is not None and not row.tells_cache:
            yield ("bench", "cache_type"), f"the engines of {place} cannot be told the type of their cache"
        if (
            bench.backend not in (None, "cpu")
            and row.has_runner
            and not options.runner
            and len(others) < len(measured)
        ):
            message = f"the runner that is built for {place} computes on the processor; see runner= in docs/targets.md"
            yield ("bench", "backend"), message
    if anchor := bench.anchor:
        measured.update((anchor, family) for family in FAMILIES.values() if family.claims(anchor))
    for name, family in measured.items():
        if bench.cache_type is not None and bench.cache_type not in family.cache_types:
            known = ", ".join(family.cache_types) or "none"
            message = f"{family.runtime} cannot run {name} with {bench.cache_type}; allowed: {known}"
            yield ("bench", "cache_type"), f"{message}, or other names in files"
    yield from budget_problems(config)


def _as_read(config: ReleaseConfig) -> ReleaseConfig:
    """With the default of what nothing reads, and a warning for each."""
    rows: list[tuple[str, Reads, tuple[Any, ...]]] = [
        ("evaluate", JUDGING, ()),
        ("quantize", FILES, ()),
        ("prune", PRUNING, ()),
        ("prune", COUNTED, (bool(config.prune.vocabulary),)),
    ]
    changed, warnings = dict[str, Any](), list[str]()
    for name, reads, others in rows:
        section = changed.get(name, getattr(config, name))
        changed[name], unread = as_read(section, reads, *others, section=name)
        warnings += unread
    if config.recover is not None:
        changed["recover"], unread = training_as_read(config.recover, config.recover.texts, "recover")
        warnings += unread
    return config.model_copy(update=changed).with_warnings(warnings)


def planned_figures(config: ReleaseConfig) -> Iterator[FigureKey]:
    """The figures that a release of this configuration will produce for what ships.

    Tasks may be folders or groups whose members show only when they are read: they are planned as one, with `on` None.
    """
    bench, evaluate = config.bench, config.evaluate
    for item in config.quantize.names:
        yield FigureKey("file_bytes", item)
    for place in bench.targets:
        for item in bench.measured(config.quantize.names):
            for n_threads in bench.n_threads or (None,):
                yield from (
                    FigureKey(metric, item, measured_place(place), n_threads) for metric in bench.metrics
                )
    for device in bench.devices:
        for item in bench.measured(config.quantize.projected):
            yield from (FigureKey(metric, item, device) for metric in metrics_from(PROJECTION))
    texts = [text_name(kind, one) for kind in ("text", "chats") for one in getattr(evaluate, kind)]
    for item in (CHECKPOINT, *config.quantize.names):
        for name in texts:
            alone = item == CHECKPOINT and config.is_whole  # nothing to diverge from
            metrics = [one for one in metrics_from(TEXT) if METRICS[one].against_dense or not alone]
            yield from (FigureKey(metric, item, on=name) for metric in metrics)
        yield FigureKey("degenerate", item)
        if item == CHECKPOINT or item in evaluate.files:
            tasks = ("accuracy", "mean_accuracy") if evaluate.tasks else ()
            own = [name + ANY_MEMBER for name in evaluate.metrics]
            yield from (FigureKey(metric, item) for metric in (*tasks, *own))


def budget_problems(config: ReleaseConfig) -> Iterator[_Problem]:
    """Where budgets ask for what the configuration does not produce, and what it does."""
    keys = list(planned_figures(config))
    for position, budget in enumerate(config.budgets):
        place = ("budgets", position)
        if budget.relative_to == "baseline" and config.baseline is None:
            yield (*place, "relative_to"), "there is no [baseline] to be relative to"
        candidates = [key for key in keys if means(budget.metric, key.metric)]
        if not candidates:
            known = ", ".join(dict.fromkeys(key.metric for key in keys))
            yield (*place, "metric"), f"{budget.metric} is not measured here; allowed: {known}"
            continue
        if not budget.files and all(key.item == CHECKPOINT for key in candidates):
            yield (
                (*place, "files"),
                f'no file has {budget.metric} here; allowed: files = ["{CHECKPOINT}"], or files in evaluate.files',
            )
            continue
        fitting = True
        for field, names in SELECTORS.items():
            for value in getattr(budget, field):
                if not any(fits(key, names, (value,)) for key in candidates):
                    fitting = False
                    there = dict.fromkeys(
                        str(one) for key in candidates for one in names(key) if one is not None
                    )
                    allowed = ", ".join(there) or f"nothing: {budget.metric} is the same everywhere"
                    yield (*place, field), f"{value} has no {budget.metric} here; allowed: {allowed}"
        chosen = select(budget, candidates) if fitting else []
        if budget.relative_to == "dense" and config.is_whole:
            alone = {
                key.item
                for key in chosen
                if key.place or key.item == CHECKPOINT or key.metric in ("file_bytes", "degenerate")
            }
            if alone:
                message = "nothing is removed or trained, so no dense model is beside what ships"
                yield (*place, "relative_to"), f"{message}; allowed: baseline, or a limit without relative_to"
        if fitting and not chosen:
            yield place, f"nothing has {budget.metric} in this combination of {', '.join(SELECTORS)}"
