"""Evaluations for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cfsp.text.choosing import Sampling
from phoneready.evaluation.evaluation_record import (
    Degeneration,
    Evaluation,
    TextResult,
)
from phoneready.evaluation.measured_file import DOMINATED, UNDECIDED, MeasuredFile, MeasuredText, Standing
from phoneready.figures.metrics import METRICS
from runtime_bench.presentation.table import Column, Table, table_of_cells
from runtime_bench.records.reported import fell_back

NAMES = ("reference", "model")
"""What the two models are called, unless they are the dense one and the pruned one."""
_DIVERGENCE = {
    "perplexity_ratio": ".3f",
    "kl_mean": ".4f",
    "kl_median": ".4f",
    "kl_p99": ".3f",
    "kl_p99_9": ".3f",
    "same_top1": ".2%",
}
"""Figure of a divergence -> how it is written."""
_TITLES = {"perplexity_ratio": "ratio", "kl_median": "KL median", "kl_p99": "KL p99"}

_RELATIONS = {DOMINATED: "dominated by", UNDECIDED: "within noise of"}
WHAT_STANDINGS_MEAN = (
    "Dominated by: that file is no larger and surely loses no more. Within noise of: that file is no larger, and "
    "that it loses more cannot be told. Surely: by the 95 % interval of the difference over the windows."
)


def _named(text: TextResult) -> str:
    return f"{text.source} ({text.kind})"


def text_table(
    evaluation: Evaluation, names: tuple[str, str] = NAMES, called: Callable[[TextResult], str] = _named
) -> Table[TextResult]:
    """The figures on text; `names` are of the reference model and the model.

    The reference's tokens a byte stand there if its tokenizer is another one.
    """
    columns: list[Column[TextResult]] = [
        Column("measured on", called),
        Column("tokens", lambda text: f"{text.n_tokens}", right=True),
    ]
    own = "perplexity"
    if evaluation.texts and all(text.divergence for text in evaluation.texts):
        own = f"{names[1]}'s"
        columns.append(_divergence("reference_perplexity", ".3f", f"perplexity, {names[0]}'s"))
    columns.append(Column(own, lambda text: f"{text.perplexity:.3f}", right=True))
    per_byte = {"bits/byte": "bits_per_byte", f"{names[0]}'s": "against_bits_per_byte"}
    per_byte["tokens/byte"] = "tokens_per_byte"
    if any(text.tokens_per_byte != text.against_tokens_per_byte for text in evaluation.texts):
        per_byte[f"tokens/byte, {names[0]}'s"] = "against_tokens_per_byte"
    for title, field in per_byte.items():
        if evaluation.texts and all(getattr(text, field) is not None for text in evaluation.texts):
            columns.append(Column(title, _number(field), right=True))
    if own != "perplexity":
        columns += [_divergence(field, form) for field, form in _DIVERGENCE.items()]
    return Table(columns, evaluation.texts)


def _number(field: str) -> Callable[[TextResult], str]:
    return lambda text: f"{getattr(text, field):.4f}"


def _divergence(field: str, form: str, title: str | None = None) -> Column[TextResult]:
    title = title or _TITLES.get(field) or METRICS[field].title
    return Column(title, lambda text: format(getattr(text.divergence, field), form), right=True)


def vocabulary_note(evaluation: Evaluation, names: tuple[str, str] = NAMES) -> str:
    """What is compared if the vocabularies differ, for people; "" where they do not."""
    both = evaluation.vocabularies
    if both is None or not evaluation.texts:
        return ""
    reference, model = names
    if not both.is_part:
        return (
            f"Perplexities, KL and same top-1 are not compared: the vocabularies of the {model} ({both.tokens} tokens) "
            f"and the {reference} ({both.against_tokens} tokens) differ. Bits per byte compare the two."
        )
    return (
        f"KL and same top-1 are taken where tokens of the {reference} end, over the {both.tokens} of its "
        f"{both.against_tokens} tokens that the {model} has; perplexities are a token of the {reference}'s. "
        "Bits per byte are of the whole text."
    )


_TOKENS: Column[Any] = Column("tokens/byte", lambda one: f"{one.tokens_per_byte:.4f}", right=True)


def loss_columns(files: Sequence[MeasuredFile]) -> list[Column[Any]]:
    """What files lose, of all texts and of each if there are several; tokens a byte if vocabularies differ."""
    texts = files[0].texts if files else ()
    return [
        Column("bits/byte", lambda one: f"{one.bits_per_byte:.4f}", right=True),
        *(_loss_on(index, text) for index, text in enumerate(texts) if len(texts) > 1),
        Column(
            "over dense f32",
            lambda one: f"{one.bits_per_byte / one.dense_bits_per_byte - 1:+.2%}",
            right=True,
        ),
        *([_TOKENS] if len({one.tokens_per_byte for one in files}) > 1 else []),
        Column("KL", lambda one: None if one.kl_mean is None else f"{one.kl_mean:.4f}", right=True),
        Column(
            "same top-1", lambda one: None if one.same_top1 is None else f"{one.same_top1:.1%}", right=True
        ),
    ]


def standing_column(files: Sequence[MeasuredFile], standings: Mapping[str, Standing]) -> Column[Any]:
    """How files stand to those that are no larger; of the others by their labels."""
    labels = {one.file: one.label for one in files}

    def stands(one: MeasuredFile) -> str:
        standing = standings[one.file]
        return f"{_RELATIONS[standing.verdict]} {labels[standing.by]}" if standing.by else standing.verdict

    return Column("standing", stands)


def measured_on(files: Sequence[MeasuredFile]) -> str:
    """The texts, and what the dense model loses on them."""
    named = "; ".join(
        f"{text.name}, {len(text.nats)} windows of {text.seqlen} tokens, {sum(text.n_bytes)} bytes"
        for text in files[0].texts
    )
    return f"Bits per byte on {named}; the dense model in float32 has {files[0].dense_bits_per_byte:.4f}."


def _loss_on(index: int, text: MeasuredText) -> Column[Any]:
    return Column(text.name, lambda one: f"{one.texts[index].bits_per_byte:.4f}", right=True)


def figure_tables(evaluation: Evaluation, names: tuple[str, str] = NAMES) -> list[Table[Sequence[str]]]:
    """Tasks, own metrics and the shares of degenerate answers, if they were asked for."""
    own = [(metric.name, f"{metric.value:.6g}", metric.unit) for metric in evaluation.metrics]
    tables = [
        _tasks(evaluation, names),
        table_of_cells(("own metric", names[1], "unit"), own),
        _degeneration(evaluation.degeneration, names, "degenerate answers"),
    ]
    if sampled := evaluation.sampled:
        title = f"degenerate answers, sampled at {_described(sampled.settings)}"
        tables.append(_degeneration(sampled.degeneration, names, title))
    return [table for table in tables if table.rows]


def _described(settings: Sampling) -> str:
    """The temperature, and whatever else changes something."""
    stated = {name: value for name, value in asdict(settings).items() if value != getattr(Sampling, name)}
    return ", ".join(f"{name} {value:g}" for name, value in ({"temperature": 1.0} | stated).items())


def evaluation_text(evaluation: Evaluation, seqlen: int) -> str:
    """All of it, for people."""
    parts = []
    if evaluation.texts:
        parts += [text_table(evaluation).markdown()]
        parts += [f"Windows of {seqlen} tokens, each without context before it.\n"]
        model, against = evaluation.model, evaluation.against
        cache = ""
        if model.cache_type is not None:
            cache = f"Keys and values of {model.reference} are in {model.cache_type}"
            if against is not None:
                theirs = f"in {against.cache_type}" if against.cache_type else "as in proofs"
                cache += f", and those of {against.reference} {theirs}"
            cache += "."
        parts += [f"{note}\n" for note in (vocabulary_note(evaluation), cache) if note]
    parts += [table.markdown() for table in figure_tables(evaluation)]
    if (place := evaluation.place) is not None:
        missed = fell_back(place.asked_backend, place.backends)
        computed = f"{place.backends} (not {missed})" if missed else place.backends
        threads = "1 thread" if place.n_threads == 1 else f"{place.n_threads} threads"
        cache = f", keys and values in {place.cache_type}" if place.cache_type else ""
        parts.append(
            f"Judged on {place.target} in {evaluation.model.runtime}: {computed}, {threads}{cache}.\n"
        )
        if place.same_tokens is False:
            parts.append(
                "Its own tokenizer cuts texts otherwise than the one here, whose tokens were used.\n"
            )
    answers: list[str] = []
    for index, prompt in enumerate(evaluation.prompts):
        answers.append(f"Q: {prompt}")
        for how, of in evaluation.answer_sets.items():
            if (why := of.degeneration) is None:
                continue
            sides = zip(
                NAMES, (of.against_answers, of.answers), (why.against_reasons, why.reasons), strict=True
            )
            for name, said, reasons in sides:
                if said:
                    flag = f" [{reasons[index]}]" if reasons[index] else ""
                    answers.append(f"{name}{how}{flag}: {' '.join(said[index].split())}")
        answers.append("")
    return "\n".join(part for part in (*parts, "\n".join(answers)) if part)


def _tasks(evaluation: Evaluation, names: tuple[str, str]) -> Table[Sequence[str]]:
    header = ["task", "version", "items", "few-shot", "metric", names[1], "standard error"]
    if evaluation.against_tasks:
        header += [names[0], "difference"]
    rows = []
    for index, task in enumerate(evaluation.tasks):
        for number, metric in enumerate(task.metrics):
            error = "-" if metric.stderr is None else f"{metric.stderr:.4f}"
            row = [task.task, task.version, f"{task.n_items}", f"{task.num_fewshot}", metric.name]
            row += [f"{metric.value:.4f}", error]
            if evaluation.against_tasks:
                other = evaluation.against_tasks[index].metrics[number].value
                row += [f"{other:.4f}", f"{metric.value - other:+.4f}"]
            rows.append(row)
    return table_of_cells(header, rows)


def _degeneration(
    degeneration: Degeneration | None, names: tuple[str, str], title: str
) -> Table[Sequence[str]]:
    if degeneration is None:
        return table_of_cells((), ())
    shares = [
        (reason, degeneration.by_reason.get(reason, 0.0), degeneration.against_by_reason.get(reason, 0.0))
        for reason in sorted({*degeneration.by_reason, *degeneration.against_by_reason})
    ]
    shares.append(
        (f"all, of {degeneration.n_prompts} answers", degeneration.share, degeneration.against_share or 0.0)
    )
    if degeneration.against_share is None:
        return table_of_cells((title, names[1]), [(why, f"{ours:.1%}") for why, ours, _ in shares])
    header = (title, names[1], names[0], "difference, points")
    rows = [(why, f"{a:.1%}", f"{b:.1%}", f"{100 * (a - b):+.1f}") for why, a, b in shares]
    return table_of_cells(header, rows)
