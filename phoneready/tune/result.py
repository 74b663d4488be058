"""What a search found: tune.json, its tables, and the release.toml of the chosen point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cfsp.errors import without_credentials
from cfsp.units import format_bytes
from phoneready.settings.release import beside
from phoneready.settings.schema import SIZE, ReleaseConfig
from phoneready.settings.structures import Structures
from phoneready.tune.space import Point, Recipe, config_of
from runtime_bench.presentation.table import Column, Table

_BITS = "bits/byte, x dense"
WHAT_BITS_SAY = (
    "KL of fewer tokens than the dense model's is of those that are left, where dense tokens end; bits per byte are of "
    "the whole text, over the dense model's."
)


@dataclass(frozen=True)
class TrialRow(Structures):
    """A trial.

    Attributes:
        number: In the order made, from 0.
        prune_ratio: Share of FFN channels to remove.
        removed: Share that went, after alignment.
        file: Quantization or variant.
        allocation: As prune.allocation.
        align: Widths are multiples of it.
        recover: Whether the model was trained.
        file_bytes: Size of the file.
        divergence: Mean KL divergence from the dense model over the texts, in nats.
        expected: What was predicted of that before the trial: middle, low, high; None of the first.
        others: Other figures that budgets limit, by name.
        meets: Whether it misses no budget.
        is_open: Whether noise leaves one open.
        missed: What it misses, for people.
        seconds: Time it took.
        bits_ratio: Bits per byte over the dense model's on the same text, mean over the texts; None in results of
            versions that did not measure it.
    """

    number: int
    prune_ratio: float
    removed: float
    file: str
    allocation: str
    align: int
    recover: bool
    file_bytes: int
    divergence: float
    expected: tuple[float, float, float] | None
    others: dict[str, float]
    meets: bool
    is_open: bool
    missed: str
    seconds: float
    bits_ratio: float | None = None

    @property
    def point(self) -> Point:
        """What was made."""
        recipe = Recipe(self.file, self.allocation, self.align, self.recover, **self.plain)
        return Point(recipe, self.prune_ratio)


@dataclass(frozen=True)
class Outlook:
    """A point that was not tried.

    Attributes:
        prune_ratio: Of the chosen recipe.
        file_bytes: Size of its file; None of a format that has to be exported first.
        divergence: Expected: middle, low, high.
        others: The same of other measured figures that budgets limit, by name.
        bits_ratio: The same of bits per byte over the dense model's.
    """

    prune_ratio: float
    file_bytes: int | None
    divergence: tuple[float, float, float]
    others: dict[str, tuple[float, float, float]]
    bits_ratio: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class TuneResult:
    """tune.json.

    Attributes:
        source: Reference of the dense model.
        source_sha256: Hash of its weights, where known.
        seed: Of everything drawn.
        goal: As tune.goal.
        judge: As tune.judge.
        budgets: For people.
        trials: All of them.
        failed: Points that could not be made, and why.
        pareto: Numbers of the trials that no other beats in size and quality both.
        chosen: Number of the best that meets all budgets; None where none does.
        next: The point that would be tried next, for people; None where nothing is expected to be better.
        outlook: What other ratios of the chosen recipe are expected to give.
        calibrations: How often statistics were taken, in this run.
        seconds: All trials together.
    """

    KIND: ClassVar[str] = "tune-result"
    SCHEMA_VERSION: ClassVar[int] = 1

    source: str
    source_sha256: str | None
    seed: int
    goal: str
    judge: str
    budgets: tuple[str, ...]
    trials: tuple[TrialRow, ...]
    failed: tuple[str, ...]
    pareto: tuple[int, ...]
    chosen: int | None
    next: str | None
    outlook: tuple[Outlook, ...]
    calibrations: int
    seconds: float

    @property
    def best(self) -> TrialRow | None:
        """The chosen trial."""
        return next((row for row in self.trials if row.number == self.chosen), None)


def pareto(rows: Sequence[TrialRow]) -> tuple[int, ...]:
    """Numbers of the rows that no other beats in size and quality both, by size."""
    unbeaten: list[TrialRow] = []
    for row in sorted(rows, key=lambda r: (r.file_bytes, r.divergence)):
        if not unbeaten or row.divergence < unbeaten[-1].divergence:
            unbeaten.append(row)
    return tuple(row.number for row in unbeaten)


def release_toml(config: ReleaseConfig, point: Point) -> str:
    """The configuration of a point's release; references to files are absolute, and URLs have no credentials."""
    import tomli_w

    chosen = beside(config_of(config, point), Path.cwd()).model_dump(
        mode="json",
        exclude={"model": {"trust_remote_code"}},
        exclude_unset=True,
        exclude_none=True,
        exclude_defaults=True,
    )
    head = f"# Chosen by `phoneready tune`: {point.describe()}.\n\n"
    return head + tomli_w.dumps(without_credentials(chosen))


def format_result(result: TuneResult) -> str:
    """The Pareto table, all other trials, what comes next."""
    on_front = [row for number in result.pareto for row in result.trials if row.number == number]
    others = [row for row in result.trials if row.number not in result.pareto]
    best = result.best
    goal = "the smallest file" if result.goal == SIZE else "the best quality"
    head = f"Goal: {goal} with {'; '.join(result.budgets) or 'no budget'}."
    parts = [head, "", "Size against quality, best of both:", "", _table(on_front, result.chosen)]
    parts += ["Other points that were tried:", "", _table(others, result.chosen)] if others else []
    parts += [WHAT_BITS_SAY, ""] if any(row.vocabulary for row in result.trials) else []
    parts += ["Could not be made:", *(f"- {text}" for text in result.failed), ""] if result.failed else []
    if result.outlook and best is not None:
        recipe = best.point.recipe.describe()
        title = f"Expected of other ratios with the same recipe ({recipe}), with 95 % intervals:"
        parts += [title, "", _outlook_table(result.outlook)]
    parts.append(f"Next to try: {result.next}." if result.next else "Nothing else is expected to be better.")
    parts += [_chosen(best)] if best is not None else []
    return "\n".join(parts) + "\n"


def _chosen(best: TrialRow) -> str:
    bits = "" if best.bits_ratio is None else f", bits per byte {best.bits_ratio:.4f} x dense"
    return (
        f"Chosen: {best.point.describe()}, {format_bytes(best.file_bytes)} "
        f"({best.file_bytes / 1e6:.2f} MB), KL {best.divergence:.4f}{bits}"
        f"{'; noise leaves a budget open' if best.is_open else ''}."
    )


def _table(rows: Sequence[TrialRow], chosen: int | None) -> str:
    def verdict(row: TrialRow) -> str:
        return "chosen" if row.number == chosen else "meets" if row.meets else row.missed

    def gone(row: TrialRow) -> str:
        return ", ".join(row.words) or "all"

    columns: list[Column[TrialRow]] = [
        Column("trial", lambda row: row.number),
        Column("prune ratio", lambda row: f"{row.prune_ratio:.4f}", right=True),
        Column("file", lambda row: row.file, right=True),
        Column("allocation", lambda row: row.allocation, right=True),
        Column("align", lambda row: row.align, right=True),
        *([Column("structures", gone, right=True)] if any(not row.is_whole for row in rows) else []),
        Column("recovered", lambda row: "yes" if row.recover else "no", right=True),
        Column("size", lambda row: _megabytes(row.file_bytes), right=True),
        Column("KL", lambda row: f"{row.divergence:.4f}", right=True),
        Column("expected", lambda row: format_expected(row.expected), right=True),
        Column(_BITS, lambda row: None if row.bits_ratio is None else f"{row.bits_ratio:.4f}", right=True),
        *(_other(name, "{:.4g}".format) for name in _names(rows)),
        Column("budgets", verdict, right=True),
    ]
    return Table(columns, rows).markdown()


def _outlook_table(rows: Sequence[Outlook]) -> str:
    columns: list[Column[Outlook]] = [
        Column("prune ratio", lambda row: f"{row.prune_ratio:.4f}"),
        Column("size", lambda row: _megabytes(row.file_bytes), right=True),
        Column("KL", lambda row: format_expected(row.divergence), right=True),
        Column(_BITS, lambda row: format_expected(row.bits_ratio), right=True),
        *(_other(name, lambda value: format_expected(value, ".4g")) for name in _names(rows)),
    ]
    return Table(columns, rows).markdown()


def _names(rows: Sequence[TrialRow] | Sequence[Outlook]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.others))


def _other(name: str, form: Callable[[Any], str | None]) -> Column[Any]:
    return Column(name, lambda row: form(row.others[name]) if name in row.others else None, right=True)


def _megabytes(n_bytes: int | None) -> str | None:
    return None if n_bytes is None else f"{n_bytes / 1e6:.2f} MB"


def format_expected(expected: tuple[float, float, float] | None, form: str = ".3f") -> str | None:
    """What is predicted of a figure, with the ends of its interval; None of what nothing is predicted of."""
    if expected is None:
        return None
    value, low, high = (format(one, form) for one in expected)
    return f"{value} ({low} to {high})"
