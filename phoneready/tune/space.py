"""The points that a search may choose from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cfsp.errors import InputError
from exporters.families import BASE, FAMILIES, family_of, required_multiple
from exporters.family import ExportFamily
from phoneready.figures.budgets import BudgetConfig, select
from phoneready.figures.metrics import CHECKPOINT
from phoneready.settings.planned import planned_figures
from phoneready.settings.schema import ReleaseConfig, TuneConfig
from phoneready.settings.structures import Structures


@dataclass(frozen=True)
class Recipe(Structures):
    """All of a point but its ratio; the structures are what goes beside the FFN channels.

    Attributes:
        item: Quantization or ONNX variant.
        allocation: As prune.allocation.
        align: Widths are multiples of it.
        recover: Whether the pruned model is trained.
    """

    item: str
    allocation: str
    align: int
    recover: bool

    @property
    def settings(self) -> Mapping[str, str]:
        """By name, as predictions tell them apart."""
        return {name: str(value) for name, value in asdict(self).items()}

    @property
    def family(self) -> ExportFamily:
        """The family of the file."""
        return family_of(self.item)

    @property
    def is_sized(self) -> bool:
        """Whether the file's size follows from the widths alone."""
        return self.family.draft is not None and self.family.find(self.item).is_sized

    def describe(self) -> str:
        """For people."""
        parts = [self.item, self.allocation, f"widths in {self.align}", *self.words]
        return ", ".join([*parts, *(["recovered"] if self.recover else [])])


@dataclass(frozen=True)
class Point:
    """A point: a recipe at a ratio, the share of FFN channels to remove."""

    recipe: Recipe
    prune_ratio: float

    def describe(self) -> str:
        """For people."""
        return f"prune_ratio {self.prune_ratio:g}, {self.recipe.describe()}"


def recipes_of(config: ReleaseConfig) -> tuple[Recipe, ...]:
    """Everything that [tune] lets vary, combined.

    Raises:
        InputError: Recovery is to be tried and the configuration does not say how; or a share of blocks or attentions.
    """
    tune = config.tune or TuneConfig()
    recover = tune.recover or (config.recover is not None,)
    if any(recover) and config.recover is None:
        raise InputError("there is no [recover] that says how to train", field="tune.recover", value=True)
    for name in ("blocks", "attentions"):
        if 0 < (share := getattr(config.prune, name)) < 1:
            raise InputError("tune takes a number, no share", field=f"prune.{name}", value=share)
    items = tune.files or config.export.names
    allocations = tune.allocations or (config.prune.allocation,)
    recipes: Iterator[Recipe] = (
        Recipe(item, allocation, align or _needed(item, config), trained, **gone.plain)
        for gone, item, allocation, align, trained in itertools.product(
            tune.combined(Structures.of(config.prune)),
            items,
            allocations,
            tune.aligns or (config.prune.align,),
            recover,
        )
    )
    return tuple(dict.fromkeys(recipes))


def config_of(config: ReleaseConfig, point: Point) -> ReleaseConfig:
    """The configuration of the release that a point is, without what it does not do.

    Budgets of files that it does not make are left out, and training where nothing is removed that it would bring back.
    """
    recipe, export = point.recipe, config.export
    formats: dict[str, Any] = {family.setting: () for family in FAMILIES.values() if family is not BASE}
    exported = replace(export, **(formats | {recipe.family.setting: (recipe.item,)}))
    pruned = replace(
        config.prune,
        prune_ratio=point.prune_ratio,
        allocation=recipe.allocation,
        align=recipe.align,
        **recipe.plain,
    )
    changed = {
        "prune": pruned,
        "export": exported,
        "recover": config.recover if recipe.recover else None,
        "evaluate": replace(config.evaluate, files=_kept(config.evaluate.files, exported.names)),
        "bench": replace(config.bench, files=_kept(config.bench.files, exported.names)),
        "tune": None,
    }
    release = config.model_copy(update=changed)
    if release.learns_nothing:
        release = release.model_copy(update={"recover": None})
    return release.model_copy(update={"budgets": tuple(_budgets(release, recipe))})


def _budgets(release: ReleaseConfig, recipe: Recipe) -> Iterator[BudgetConfig]:
    """Budgets on the point's file and checkpoint: not on the GGUF file that a release makes beside an ONNX folder."""
    keys = list(planned_figures(release))
    for budget in release.budgets:
        if recipe.family is BASE and not budget.files:
            yield budget
            continue
        limited = {key.item for key in select(budget, keys)}
        files = tuple(name for name in (recipe.item, CHECKPOINT) if name in limited)
        if files:
            yield budget.model_copy(update={"files": files})


def _kept(names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in known)


def _needed(item: str, config: ReleaseConfig) -> int:
    beside = () if family_of(item) is BASE else getattr(config.export, BASE.setting)
    return required_multiple((item, *beside))
