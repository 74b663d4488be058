"""One dense model, pruned at several ratios, each judged against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from cfsp.errors import InputError
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.paging import copied
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress, no_progress
from cfsp.pruning.plan import apply_plan, make_plan
from cfsp.pruning.prune import statistics_for
from cfsp.pruning.settings import PruneSettings
from cfsp.settings import check_settings
from cfsp.text.calibration import Calibration
from cfsp.text.writers import TRANSFORMERS, Writer
from cfsp.validation import WhereSet
from phoneready.evaluation.evaluation_record import Evaluation, ModelIdentity, identity_of
from phoneready.evaluation.gate import measures
from phoneready.evaluation.run import evaluate
from phoneready.evaluation.settings import EvaluationSettings
from runtime_bench.presentation.table import Column, Table


@dataclass(frozen=True)
class SweepPoint:
    """One ratio.

    Attributes:
        prune_ratio: Share of FFN channels that was asked to be removed.
        removed: Share that was removed, after alignment.
        evaluation: The pruned model against the dense one.
    """

    prune_ratio: float
    removed: float
    evaluation: Evaluation


@dataclass(frozen=True)
class Sweep:
    """Quality over the share of FFN channels removed.

    Attributes:
        model: The dense model.
        calibration: References of the calibration text.
        calibration_sha256: Hash of its token ids.
        calibration_tokens: Their number.
        seed: Calibration's seed.
        points: By ascending ratio.
        warnings: What was asked for and has had no effect.
    """

    KIND: ClassVar[str] = "evaluation_sweep"
    SCHEMA_VERSION: ClassVar[int] = 1

    model: ModelIdentity
    calibration: tuple[str, ...]
    calibration_sha256: str
    calibration_tokens: int
    seed: int
    points: tuple[SweepPoint, ...]
    warnings: Annotated[tuple[str, ...], WhereSet] = ()


def check_ratios(ratios: Sequence[float], settings: PruneSettings) -> tuple[float, ...]:
    """The ratios, ascending and each once.

    Raises:
        InputError: None, or one out of range.
    """
    if not ratios:
        raise InputError("no ratios given", field="ratios", allowed="such as 0.1,0.2,0.3")
    for ratio in ratios:
        check_settings(replace(settings, prune_ratio=ratio))
    return tuple(sorted(set(ratios)))


def sweep(
    loaded: LoadedModel,
    calibration: Calibration,
    ratios: Sequence[float],
    prune: PruneSettings,
    judge: EvaluationSettings,
    *,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    progress: Progress = no_progress,
) -> Sweep:
    """Prune a copy of the model at each ratio and judge it against the model itself.

    Args:
        loaded: The dense model; it stays as it is.
        calibration: Windows that statistics are taken from.
        ratios: Shares of FFN channels to remove.
        prune: How; its ratio is not used.
        judge: What to judge on.
        writers: What may have the dense model write, where that is a text.
        progress: Told about each step.

    Raises:
        InputError: As `evaluate`, or settings that do not fit the model.
    """
    dense = TorchLanguageModel(loaded)
    points = []
    ratios = check_ratios(ratios, prune)
    measured = statistics_for(loaded.model, calibration, prune, progress=progress)
    for ratio in ratios:
        plan = make_plan(loaded, measured, calibration, replace(prune, prune_ratio=ratio))
        model = copied(loaded.model)
        apply_plan(model, plan, statistics=measured, input_ids=calibration.input_ids, progress=progress)
        pruned = TorchLanguageModel(replace(loaded, model=model))
        judged = evaluate(pruned, dense, judge, writers=writers, progress=progress)
        named = ModelIdentity(f"{loaded.source.reference} pruned by {ratio:g}")
        points.append(SweepPoint(ratio, 1 - plan.keep_ratio, replace(judged, model=named)))
        progress("ratios", len(points), len(ratios))
    return Sweep(
        model=identity_of(dense),
        calibration=calibration.sources,
        calibration_sha256=calibration.sha256,
        calibration_tokens=calibration.n_tokens,
        seed=calibration.seed,
        points=tuple(points),
    )


def sweep_table(result: Sweep, show: Callable[[float], Any] = "{:.4f}".format) -> Table[SweepPoint]:
    """One row a ratio, one column a figure, shown for people unless `show` makes something else of it."""

    def column(name: str) -> Column[SweepPoint]:
        def cell(point: SweepPoint) -> Any:
            return show(measures(point.evaluation)[name].value or 0.0)

        return Column(name.replace(", ", " "), cell, right=True)

    ratios: list[Column[SweepPoint]] = [
        Column("prune ratio", lambda point: f"{point.prune_ratio:g}"),
        Column("removed", lambda point: show(point.removed), right=True),
    ]
    return Table([*ratios, *map(column, measures(result.points[0].evaluation))], result.points)
