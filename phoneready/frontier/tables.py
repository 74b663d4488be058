"""A frontier for people: the table, the best file of every size, and whether pruning pays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cfsp.evaluation.task_results import TaskMetric
from cfsp.recovery.settings import settled, token_budget
from cfsp.units import format_bytes, megabytes
from phoneready.evaluation.dominance import DOMINATED, Best, Choice, Excess
from phoneready.evaluation.tables import WHAT_STANDINGS_MEAN, loss_columns, measured_on, standing_column
from phoneready.frontier.record import Frontier, FrontierPoint, SpeedChoice
from phoneready.frontier.settings import BASE_QUANT
from runtime_bench.presentation.markup import escape_markdown
from runtime_bench.presentation.table import Column, Table


def format_frontier(found: Frontier) -> str:
    """frontier.md."""
    parts = [frontier_table(found).markdown(), escape_markdown(conditions(found)), "", *sentences(found)]
    for title, rows in (
        ("Larger than asked for, and not made", found.left_out),
        ("Could not be made", found.failed),
        ("Not measured yet", found.open),
    ):
        parts += ["", f"{title}:", "", *(f"- {escape_markdown(row)}" for row in rows)] if rows else []
    return "\n".join(parts) + "\n"


def frontier_table(found: Frontier) -> Table[FrontierPoint]:
    """One row a file, the smallest first."""
    columns: list[Column[Any]] = [
        Column("model", lambda point: point.model),
        Column("file", lambda point: point.quant),
        Column("size", lambda point: megabytes(point.file_bytes), right=True),
        *loss_columns(found.points),
    ]
    if any(point.speed for point in found.points):
        columns += [
            Column("decode", _decode, right=True),
            Column(f"over dense {BASE_QUANT}", _times, right=True),
            Column("peak memory", _memory, right=True),
        ]
    columns += [_accuracy(task, metric) for task, metric in accuracies(found)]
    standings = {one.file: one for one in found.standings}
    return Table([*columns, standing_column(found.points, standings)], found.points)


def conditions(found: Frontier) -> str:
    """What was measured on, and what the words mean."""
    if not found.points:
        return "Nothing was measured."
    speeds = {(p.speed.test, p.speed.n_threads) for p in found.points if p.speed}
    decoded = "".join(
        f" Decode is {test} with {count} threads, in turns with the dense {BASE_QUANT} file, over which it is the"
        " quotient of medians with its 95 % interval."
        for test, count in speeds
    )
    return f"{measured_on(found.points)}{decoded}{_asked(found)}{_trained(found)} {WHAT_STANDINGS_MEAN}"


def accuracies(found: Frontier) -> list[tuple[str, str]]:
    """(task, the first of its figures) of all tasks that any file did."""
    pairs = ((t.task, t.metrics[0].name) for point in found.points for t in point.tasks if t.metrics)
    return list(dict.fromkeys(pairs))


def accuracy(point: FrontierPoint, task: str, metric: str) -> TaskMetric | None:
    """A file's figure of a task; None where it did not do it."""
    figures = (m for t in point.tasks if t.task == task for m in t.metrics if m.name == metric)
    return next(figures, None)


def _accuracy(task: str, metric: str) -> Column[Any]:
    def cell(point: FrontierPoint) -> str | None:
        one = accuracy(point, task, metric)
        return None if one is None else f"{one.value:.3f}" + _error(one.stderr)

    return Column(f"{task} {metric}", cell, right=True)


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.3f}"


def _asked(found: Frontier) -> str:
    counts = {task.task: task.n_items for point in found.points for task in point.tasks}
    items = ", ".join(f"{count} items of {name}" for name, count in counts.items())
    return f" Tasks: {items}, ± one standard error." if items else ""


def _trained(found: Frontier) -> str:
    if found.recovery is None or not any(point.recovered for point in found.points):
        return ""
    how = settled(found.recovery)
    most = f"{how.epochs:g} passes over" if how.epochs else f"{token_budget(how)} tokens of"
    return f" Recovered: {how.method}, {how.loss}, {most} {', '.join(how.data)}."


def sentences(found: Frontier) -> Iterator[str]:
    """The best file of each size, and whether a dense file beats what was pruned."""
    for choice in found.choices:
        yield f"- {_of_size(found, choice)}"
    for speed in found.speed_choices:
        yield f"- {_of_speed(found, speed)}"
    if not found.speed_choices and any(point.tokens_per_second for point in found.points):
        yield f"- No file of a speed is named: no file could be held against the dense {BASE_QUANT} file."
    if pays := whether_it_pays(found):
        yield f"\n{pays}"


def whether_it_pays(found: Frontier) -> str:
    """What quantizing the dense model alone makes of the pruned files; empty without any."""
    pruned = [point for point in found.points if not point.is_dense]
    standings = {one.file: one for one in found.standings}
    beaten = [
        point
        for point in pruned
        if standings[point.file].verdict == DOMINATED
        and (rival := found.find(standings[point.file].by)) is not None
        and rival.is_dense
    ]
    if not pruned:
        return ""
    if len(beaten) == len(pruned):
        return (
            "Pruning does not pay here: every pruned file is dominated by a dense quantization, "
            "which is no larger and loses no more. Quantize the dense model instead."
        )
    return f"{len(beaten)} of {len(pruned)} pruned files are dominated by a dense quantization."


def _of_size(found: Frontier, choice: Choice) -> str:
    least = min(found.points, key=lambda point: point.file_bytes)
    dense = min((p for p in found.points if p.is_dense), key=lambda p: p.file_bytes, default=None)
    where = f"At {megabytes(choice.at_bytes)}"
    return _sentence(found, choice, where, f"the smallest is {_named(least)}", "smallest", dense)


def _of_speed(found: Frontier, choice: SpeedChoice) -> str:
    timed = sorted((p for p in found.points if p.times), key=lambda p: -(p.times or 0.0))
    dense = next((point for point in timed if point.is_dense), None)
    where = f"At {choice.times:g} times the decode of dense {BASE_QUANT}"
    return _sentence(found, choice, where, f"the fastest is {_named(timed[0])}", "fastest", dense)


def _sentence(
    found: Frontier, choice: Best, where: str, nearest: str, kind: str, nearest_dense: FrontierPoint | None
) -> str:
    """The best file; `nearest` is what comes closest where there is none, `nearest_dense` the dense file that does."""
    best, dense = found.find(choice.best), found.find(choice.dense)
    if best is None:
        return f"{where} there is no file; {nearest}."
    head = f"{where} the best file is {_named(best)}"
    if dense is best:
        return f"{head}: nothing pruned is better there."
    if dense is None or choice.excess is None:
        rest = f"; its {kind} file is {_named(nearest_dense)}" if nearest_dense else ""
        return f"{head}. No quantization of the dense model gets there{rest}."
    lost = _lost(choice.excess)
    if choice.excess.low is None or choice.excess.low <= 0:
        return f"{head}, but the best dense one, {_named(dense)}, is within the noise: it loses {lost} more."
    return f"{head}. Quantizing the dense model to that, {_named(dense)}, loses {lost} more."


def _named(point: FrontierPoint) -> str:
    over = point.bits_per_byte / point.dense_bits_per_byte - 1
    return (
        f"{point.label} ({megabytes(point.file_bytes)}, {point.bits_per_byte:.4f} bits a byte, {over:+.1%})"
    )


def _lost(excess: Excess) -> str:
    if excess.low is None or excess.high is None:
        return f"{excess.bits:.4f} bits a byte"
    return f"{excess.bits:.4f} ({excess.low:.4f} to {excess.high:.4f}) bits a byte"


def _decode(point: FrontierPoint) -> str | None:
    if point.tokens_per_second is None:
        return "failed" if point.speed and point.speed.failure else None
    return f"{point.tokens_per_second:.1f} t/s"


def _times(point: FrontierPoint) -> str | None:
    speed = point.speed
    if speed is None or not speed.in_turns:
        return None
    if speed.failure:
        return "failed"
    if speed.times is None or speed.times_low is None or speed.times_high is None:
        return "too noisy to tell"
    return f"{speed.times:.2f} ({speed.times_low:.2f} to {speed.times_high:.2f})"


def _memory(point: FrontierPoint) -> str | None:
    peak = point.speed.peak_rss_bytes if point.speed else None
    return None if peak is None else format_bytes(peak)
