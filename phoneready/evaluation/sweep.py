"""One dense model, pruned at several ratios, each judged against the dense one."""

from __future__ import annotations

import copy
import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from cfsp.errors import InputError
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.files import atomic_file
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress, no_progress
from cfsp.pruning.plan import apply_plan
from cfsp.pruning.prune import plan_for, statistics_for
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import BlockStatistics
from cfsp.settings import check_settings
from cfsp.text.calibration import Calibration
from phoneready.console import format_rows
from phoneready.evaluation.gate import measures
from phoneready.evaluation.record import Evaluation, ModelIdentity, identity_of
from phoneready.evaluation.run import evaluate
from phoneready.evaluation.settings import EvaluationSettings


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
    """

    KIND: ClassVar[str] = "evaluation_sweep"
    SCHEMA_VERSION: ClassVar[int] = 1

    model: ModelIdentity
    calibration: tuple[str, ...]
    calibration_sha256: str
    calibration_tokens: int
    seed: int
    points: tuple[SweepPoint, ...]


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
    progress: Progress = no_progress,
) -> Sweep:
    """Prune a copy of the model at each ratio and judge it against the model itself.

    Args:
        loaded: The dense model; it stays as it is.
        calibration: Windows that statistics are taken from.
        ratios: Shares of FFN channels to remove.
        prune: How; its ratio is not used.
        judge: What to judge on.
        progress: Told about each step.

    Raises:
        InputError: As `evaluate`, or settings that do not fit the model.
    """
    dense = TorchLanguageModel(loaded)
    points = []
    ratios = check_ratios(ratios, prune)
    measured = statistics_for(loaded.model, calibration, prune, progress=progress)
    for ratio in ratios:
        settings = replace(prune, prune_ratio=ratio)
        pruned, removed = _pruned_copy(loaded, measured, calibration, settings, progress)
        judged = evaluate(TorchLanguageModel(pruned), dense, judge, progress=progress)
        name = f"{loaded.source.reference} pruned by {ratio:g}"
        judged = replace(judged, model=ModelIdentity(name))
        points.append(SweepPoint(ratio, removed, judged))
        progress("ratios", len(points), len(ratios))
    return Sweep(
        model=identity_of(dense),
        calibration=calibration.sources,
        calibration_sha256=calibration.sha256,
        calibration_tokens=calibration.n_tokens,
        seed=calibration.seed,
        points=tuple(points),
    )


def format_sweep(result: Sweep) -> str:
    """One row a ratio, one column a figure."""
    header, rows = _table(result)
    cells = [[f"{ratio:g}", f"{removed:.4f}", *(f"{v:.4f}" for v in rest)] for ratio, removed, *rest in rows]
    return format_rows(header, cells)


def write_csv(path: Path, result: Sweep) -> None:
    """The same as CSV, for plotting, with full precision."""
    header, rows = _table(result)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([name.replace(", ", " ") for name in header])
        writer.writerows(rows)


def _table(result: Sweep) -> tuple[list[str], list[list[float]]]:
    columns = list(measures(result.points[0].evaluation))
    rows = []
    for point in result.points:
        found = measures(point.evaluation)
        rows.append([point.prune_ratio, point.removed, *(found[name].value or 0.0 for name in columns)])
    return ["prune ratio", "removed", *columns], rows


def _pruned_copy(
    loaded: LoadedModel,
    measured: BlockStatistics,
    calibration: Calibration,
    settings: PruneSettings,
    progress: Progress,
) -> tuple[LoadedModel, float]:
    """A pruned copy, and the share of channels that it lost; the dense model's statistics serve every ratio."""
    plan = plan_for(loaded, measured, calibration, settings)
    model = copy.deepcopy(loaded.model)
    apply_plan(model, plan, statistics=measured, input_ids=calibration.input_ids, progress=progress)
    return LoadedModel(model, loaded.tokenizer, loaded.source), 1 - plan.keep_ratio
