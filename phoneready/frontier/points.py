"""The files of a frontier, in the order in which they are made: checkpoint after checkpoint, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from exporters.families import required_multiple
from exporters.gguf.fallbacks import block_of
from exporters.gguf.quants import find_quant
from exporters.provenance import file_stem
from phoneready.figures.figure_set import DENSE, PRUNED
from phoneready.frontier.record import model_label
from phoneready.frontier.settings import FrontierSettings
from phoneready.settings.structures import Structures
from phoneready.tune.space import Point, Recipe

_TRAINED = "-recovered"


@dataclass(frozen=True)
class Batch:
    """Files of one checkpoint.

    Attributes:
        points: One for each quantization.
    """

    points: tuple[Point, ...]

    @property
    def role(self) -> str:
        """`dense` or `pruned`."""
        return role_of(self.points[0])

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        point = self.points[0]
        recipe = point.recipe
        return f"{point.prune_ratio:g}-{recipe.align}{recipe.in_names}{_TRAINED * recipe.recover}"


def role_of(point: Point) -> str:
    """`dense` where nothing goes, else `pruned`."""
    return DENSE if point.recipe.is_whole and not point.prune_ratio else PRUNED


def point_label(point: Point) -> str:
    """A file that is to be made, for people."""
    recipe = point.recipe
    return f"{model_label(recipe, point.prune_ratio, recipe.recover)} {recipe.item}"


def point_name(point: Point) -> str:
    """What the record of a point is called."""
    recipe = point.recipe
    name = f"{recipe.allocation}-{point.prune_ratio:g}{recipe.in_names}-{recipe.align}-{recipe.item}"
    return file_stem(name.replace(":", "-")) + _TRAINED * recipe.recover


def bits_of(item: str) -> float:
    """Bits of a weight in most matrices of a quantization."""
    elements, size = block_of(find_quant(item).base_type)
    return 8 * size / elements


def batches_of(settings: FrontierSettings, allocation: str) -> tuple[Batch, ...]:
    """The dense model, then, unless they are searched over, all structures with every ratio, the least pruned first.

    Where no channels go, widths have no alignment; else each quantization has what it needs, and those that need the
    same share a checkpoint. Where recovery is asked for, each pruned one is followed by itself, trained.
    """
    batches: dict[tuple[Structures, float, bool, int], list[Point]] = {}
    combined = () if settings.trials else _combinations(settings)
    for gone, ratio, recover in dict.fromkeys(((Structures(), 0.0, False), *combined)):
        for item in settings.chosen_quants:
            point = make_point(settings, allocation, item, ratio, gone, recover)
            batches.setdefault((gone, ratio, recover, point.recipe.align), []).append(point)
    return tuple(Batch(tuple(points)) for points in batches.values())


def make_point(
    settings: FrontierSettings, allocation: str, item: str, ratio: float, gone: Structures, recover: bool
) -> Point:
    """A file with the alignment that it needs; the dense model is never trained."""
    align = (settings.align or required_multiple((item,))) if ratio else 1
    trained = recover and not (gone.is_whole and not ratio)
    return Point(Recipe(item, allocation, align, trained, **gone.plain), ratio)


def _combinations(settings: FrontierSettings) -> Iterator[tuple[Structures, float, bool]]:
    for gone in settings.combined(Structures()):
        for ratio in sorted(set(settings.prune_ratios)):
            yield gone, ratio, False
            if settings.recover and (ratio or not gone.is_whole):
                yield gone, ratio, True
