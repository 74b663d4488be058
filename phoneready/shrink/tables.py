"""What shrinking found, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cfsp.evaluation.divergence import Divergence
from cfsp.units import megabytes
from phoneready.evaluation.evaluation_record import TextResult
from phoneready.shrink.record import BASE_QUANT, START, Shrunk, ShrunkStep
from runtime_bench.presentation.markup import escape_markdown
from runtime_bench.presentation.table import Column, Table


def format_shrunk(found: Shrunk) -> str:
    """shrunk.md."""
    return "\n".join([curve_table(found).markdown(), *map(escape_markdown, sentences(found))]) + "\n"


def curve_table(found: Shrunk) -> Table[ShrunkStep]:
    """A row a step."""
    columns: list[Column[ShrunkStep]] = [
        Column("step", lambda step: "start" if step.number == START else f"{step.number}"),
        Column("channels removed", lambda step: f"{step.removed:.1%}", right=True),
        Column("tokens known", lambda step: f"{step.vocabulary}", right=True),
        Column("parameters", lambda step: f"{step.parameters / 1e6:.1f} M", right=True),
        Column(f"{BASE_QUANT} file", _file, right=True),
    ]
    first = found.steps[0]
    for place, text in enumerate(first.texts):
        columns += [
            Column(f"bits/byte, {text.source}", _of_text(place, _bits), right=True),
            Column("KL", _of_text(place, _kl), right=True),
        ]
    for place, task in enumerate(first.tasks):
        if task.accuracy is not None:
            columns.append(Column(f"{task.task} {task.accuracy.name}", _of_task(place), right=True))
    columns.append(Column("", lambda step: "kept" if step.number == found.kept else "", right=False))
    return Table(columns, found.steps)


def sentences(found: Shrunk) -> Iterator[str]:
    """What is kept and why, and what the figures were taken on."""
    best, last = found.best, found.steps[-1]
    if found.missed is not None:
        yield f"Stopped after step {last.number}: {found.missed}."
    for step in found.steps:
        if step.shortcoming is not None:
            yield f"{_name(step).capitalize()}: {step.shortcoming}."
    what = f"step {best.number}, {best.removed:.1%} of the channels removed" if best.number else "the start"
    yield f"Kept: {what}, {best.vocabulary} tokens, {best.parameters / 1e6:.1f} M parameters, in {best.checkpoint}."
    counts = [f"{text.n_tokens} tokens of {text.source}" for text in best.texts]
    counts += [f"{task.n_items} items of {task.source}" for task in best.tasks]
    trained = f" Each step was trained on {found.tokens} tokens at most." if found.tokens else ""
    yield f"Measured on {', '.join(counts)}; KL is from the start's model.{trained}"


def _name(step: ShrunkStep) -> str:
    return "the start" if step.number == START else f"step {step.number}"


def _file(step: ShrunkStep) -> str | None:
    return None if step.file_bytes is None else megabytes(step.file_bytes)


def _of_text(place: int, figure: Callable[[TextResult], str | None]) -> Callable[[ShrunkStep], Any]:
    return lambda step: figure(step.texts[place])


def _bits(text: TextResult) -> str | None:
    return None if text.bits_per_byte is None else f"{text.bits_per_byte:.4f}"


def _kl(text: TextResult) -> str | None:
    found: Divergence | None = text.divergence
    return None if found is None else f"{found.kl_mean:.4f}"


def _of_task(place: int) -> Callable[[ShrunkStep], Any]:
    def cell(step: ShrunkStep) -> str | None:
        score = step.tasks[place].accuracy
        return None if score is None else f"{score.value:.3f}"

    return cell
