"""A release.toml to begin with: the demo's values, and every other setting with its default and what it means."""

from __future__ import annotations

import importlib.resources
import json
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cfsp.settings import DEVICE, DTYPE, Declared, Settings, declared
from exporters.families import find_format
from phoneready.settings.schema import (
    BenchConfig,
    EvaluateConfig,
    PruneConfig,
    QuantizeConfig,
    RecoverConfig,
)

_SECTIONS: Mapping[str, tuple[type[Settings], str]] = {
    "prune": (PruneConfig, "How to prune, and with what text."),
    "recover": (RecoverConfig, "Training after pruning; the section turns it on. See docs/recovery.md."),
    "evaluate": (EvaluateConfig, "What ships, and what it is judged on."),
    "quantize": (QuantizeConfig, "What is made; of a pruned model's dense one, too."),
    "bench": (BenchConfig, "What is measured where. A size of 0 leaves a workload out."),
}
_OF_ANY_MODEL: Mapping[str, Mapping[str, Any]] = {
    "prune": {"prune_ratio": 0.0, "calibration": ["self"]},
    "evaluate": {"text": ["builtin:python-docs"], "chats": ["self"], "files": ["Q4_0"]},
    "quantize": {"to": ["Q8_0", "Q4_0"]},
    "bench": {"n_gen": [64], "repetitions": 8},
}
"""In place of what the demo says: how little of its own model to keep, and few samples to be quick with."""
_WHAT_PAYS = " Nothing goes yet: `phoneready search MODEL --vocabularies 0,32768` shows what pays."
_WIDTH, _COLUMN = 118, 32


def demo_config_text() -> str:
    """The release.toml of the embedded demo."""
    return _resource("demo.toml")


def gate_text(model: str, max_size: int | None = None, max_kl: float | None = None) -> str:
    """A release.toml of a few lines: one file of the whole model, and the budgets that it must keep."""
    quant = find_format(f"mixed:{max_size}B" if max_size else "Q4_0").name
    limits = {"file_bytes": max_size, "kl_mean": max_kl}
    sections: dict[str, dict[str, Any]] = {
        "model": {"reference": model},
        "prune": {"prune_ratio": 0.0, "calibration": ["self"]},
        "quantize": {"to": [quant]},
    }
    budgets = [{"metric": name, "at_most": limit} for name, limit in limits.items() if limit is not None]
    about = "The whole model as one file, and its budgets; text like yours in place of `self` loses less."
    return release_text(about, sections, budgets)


def release_text(
    about: str, sections: Mapping[str, Mapping[str, Any]], budgets: Iterable[Mapping[str, Any]]
) -> str:
    """A release.toml of what is stated; keys without a section come first."""
    text = f"# {about}\n# `phoneready init --all` writes every other setting.\n"
    rows = [
        *((f"[{name}]", values) for name, values in sections.items()),
        *(("[[budgets]]", one) for one in budgets),
    ]
    for head, values in rows:
        lines = [f"{key} = {_toml(value)}\n" for key, value in values.items() if value is not None]
        text += "\n" + (f"{head}\n" if head != "[]" else "") + "".join(lines)
    return text


def template_text(model: str | None = None) -> str:
    """A commented release.toml to begin with."""
    stated, rows = tomllib.loads(demo_config_text()), dict(_SECTIONS)
    text = _resource("template.toml")
    if model not in (None, stated["model"]["reference"]):
        stated |= _OF_ANY_MODEL
        rows["prune"] = PruneConfig, rows["prune"][1] + _WHAT_PAYS
        head, *budgets = re.split(r"(?m)^(?=\[\[budgets\]\])", text)
        text = head + budgets[-1].replace(
            "at_most", "[files]\nat_most", 1
        )  # the whole model, and its own limits
    sections = "\n".join(
        "\n".join(_section(name, stated.get(name), *row)) + "\n" for name, row in rows.items()
    )
    opened = (Declared("device", str, "auto", DEVICE), Declared("dtype", str, "auto", DTYPE))
    how = "".join(f"{line}\n" for row in opened for line in _lines(row, {}))
    text = text.replace("[device]\n", how, 1)
    text = text.replace("[sections]\n", sections + "\n", 1)
    smallest = find_format(stated["quantize"]["to"][-1]).name
    text = text.replace("[files]\n", f"files = {_toml([smallest])}\n")
    return text if model is None else text.replace('"smollm2-135m" ', f"{_toml(model)} ", 1)


def _section(name: str, stated: Mapping[str, Any] | None, kind: type[Settings], about: str) -> Iterator[str]:
    """Its lines; if the demo has none, all of them are comments."""
    yield f"# {about}"
    yield f"[{name}]" if stated is not None else f"#[{name}]"
    for row in declared(kind):
        yield from _lines(row, stated or {})


def _lines(row: Declared, known: Mapping[str, Any]) -> Iterator[str]:
    """Those of one setting: a comment if its value is not known."""
    value = row.setting.example if row.default is None else row.default
    line = f"{'' if row.name in known else '#'}{row.name} = {_toml(known.get(row.name, value))}"
    without = f" Without: {row.setting.shown}." if row.setting.shown and row.default in (None, ()) else ""
    text = row.setting.help + without
    if len(line) < _COLUMN and _COLUMN + len(text) < _WIDTH:
        yield f"{line:<{_COLUMN}}# {text}"
    else:
        yield from (f"# {part}" for part in textwrap.wrap(text, _WIDTH - 2))
        yield line


def _toml(value: Any) -> str:
    """JSON is TOML, but for the one control character that JSON leaves as it is."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _resource(name: str) -> str:
    return importlib.resources.files("phoneready.settings").joinpath(name).read_text(encoding="utf-8")
