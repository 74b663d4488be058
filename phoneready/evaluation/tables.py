"""Evaluations for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from phoneready.evaluation.evaluation_record import Evaluation, TextLoss
from phoneready.evaluation.measured_file import AS_GOOD, DOMINATED, UNDECIDED, MeasuredFile, Standing
from phoneready.figures.figures import TOLERANCES
from runtime_bench.presentation.table import Column, Table, table_of_cells
from runtime_bench.records.compare import PairJudgement, judge_pairs
from runtime_bench.records.reported import fell_back

NAMES = ("reference", "model")
"""What the two models are called, unless they are the dense one and the pruned one."""
_DISTANCE = (
    ("KL mean", "kl_mean", ".4f"),
    ("KL median", "kl_median", ".4f"),
    ("KL p99", "kl_p99", ".3f"),
    ("KL p99.9", "kl_p99_9", ".3f"),
    ("same top-1", "same_top1", ".2%"),
)
"""Title, figure of a distance, and its format."""
_RELATIONS = {DOMINATED: "dominated by", AS_GOOD: "no difference from", UNDECIDED: "inconclusive against"}
WHAT_STANDINGS_MEAN = (
    "Each file against those that are no larger. Dominated: that one loses no more (95 % CI over the windows). No "
    "difference: the interval lies within 3 %. Inconclusive: the windows do not tell."
)


def _number(title: str, value: Callable[[Any], str]) -> Column[Any]:
    return Column(title, value, right=True)


def text_table(
    evaluation: Evaluation,
    names: tuple[str, str] = NAMES,
    called: Callable[[TextLoss], str] = lambda text: f"{text.source} ({text.kind})",
) -> Table[TextLoss]:
    """The figures on text; `names` are of the reference model and the model."""
    texts = evaluation.texts
    against = bool(texts) and all(text.distance for text in texts)

    def of_reference(field: str, form: str, text: TextLoss) -> str:
        return format(getattr(text.against, field), form)

    def own_figure(field: str, form: str, text: TextLoss) -> str:
        return format(getattr(text, field), form)

    columns = [Column("measured on", called), _number("tokens", lambda text: f"{sum(text.n_tokens)}")]
    if against:
        columns.append(_number(f"perplexity, {names[0]}'s", partial(of_reference, "perplexity", ".3f")))
    own = f"{names[1]}'s" if against else "perplexity"
    columns.append(_number(own, partial(own_figure, "perplexity", ".3f")))
    for title, field in (("bits/byte", "bits_per_byte"), ("tokens/byte", "tokens_per_byte")):
        columns.append(_number(title, partial(own_figure, field, ".4f")))
        both = texts and all(text.against for text in texts)
        if both and (
            field == "bits_per_byte" or any(text.n_tokens != text.against_n_tokens for text in texts)
        ):
            columns.append(_number(f"{title}, {names[0]}'s", partial(of_reference, field, ".4f")))
    if texts and all(text.against for text in texts):
        columns.append(Column("bits over the reference's", _beside_reference))
    if against:
        columns.append(_number("ratio", lambda text: f"{text.perplexity / text.against.perplexity:.3f}"))
        for title, field, form in _DISTANCE:
            columns.append(_number(title, partial(_of_distance, field, form)))
    return Table(columns, texts)


def _beside_reference(text: TextLoss) -> str:
    assert text.against is not None
    return judgement_text(judge_pairs(text.against.bits, text.bits))


def judgement_text(found: PairJudgement, *, difference: bool = False) -> str:
    """Such as `+4.1 % (2.0 to 6.2): worse`; of a difference in points."""
    if found.value is None:
        return found.verdict
    ends = [one for one in (found.value, found.low, found.high) if one is not None]
    value, *rest = (f"{100 * (one if difference else one - 1):.1f}" for one in ends)
    span = f" ({' to '.join(rest)})" if rest else ""
    sign = "" if value.startswith("-") else "+"
    return f"{sign}{value} {'points' if difference else '%'}{span}: {found.verdict}"


def _of_distance(field: str, form: str, text: TextLoss) -> str:
    return format(getattr(text.distance, field), form)


def vocabulary_note(evaluation: Evaluation, names: tuple[str, str] = NAMES) -> str:
    """What is compared if the vocabularies differ, for people; "" if they do not."""
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
        f"{both.against_tokens} tokens that the {model} has; perplexities are per token of the {reference}."
    )


def loss_columns(files: Sequence[MeasuredFile]) -> list[Column[Any]]:
    """What files lose, of all texts and of each if there are several; tokens a byte if vocabularies differ."""

    def lost_on(index: int, one: MeasuredFile) -> str:
        return f"{one.texts[index].bits_per_byte:.4f}"

    texts = files[0].texts if files else ()
    tokens = _number("tokens/byte", lambda one: f"{one.tokens_per_byte:.4f}")
    return [
        _number("bits/byte", lambda one: f"{one.bits_per_byte:.4f}"),
        *(_number(text.name, partial(lost_on, n)) for n, text in enumerate(texts) if len(texts) > 1),
        _number("over dense f32", lambda one: f"{one.bits_per_byte / one.dense_bits_per_byte - 1:+.2%}"),
        *([tokens] if len({one.tokens_per_byte for one in files}) > 1 else []),
        _number("KL", lambda one: f"{one.kl_mean:.4f}"),
        _number("same top-1", lambda one: f"{one.same_top1:.1%}"),
    ]


def standing_column(files: Sequence[MeasuredFile], standings: Mapping[str, Standing]) -> Column[Any]:
    """How files stand to those that are no larger, which are named by their labels."""
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


def figure_tables(evaluation: Evaluation, names: tuple[str, str] = NAMES) -> list[Table[Sequence[str]]]:
    """Tasks, own metrics and the shares of degenerate answers, if they were asked for."""
    header = ["task", "version", "items", "few-shot", "metric", names[1], "standard error"]
    if evaluation.against_tasks:
        header += [names[0], "difference"]
    tasks = []
    for index, task in enumerate(evaluation.tasks):
        for number, metric in enumerate(task.metrics):
            error = "-" if metric.stderr is None else f"{metric.stderr:.4f}"
            row = [task.task, task.version, f"{task.n_items}", f"{task.num_fewshot}", metric.name]
            row += [f"{metric.value:.4f}", error]
            if evaluation.against_tasks:
                other = evaluation.against_tasks[index].metrics[number]
                said = f"{metric.value - other.value:+.4f}"
                if metric.right and other.right:
                    allowed = TOLERANCES["accuracy"]
                    found = judge_pairs(
                        (other.right,),
                        (metric.right,),
                        higher_is_better=True,
                        difference=True,
                        threshold=allowed,
                    )
                    said = judgement_text(found, difference=True)
                row += [f"{other.value:.4f}", said]
            tasks.append(row)
    own = [(metric.name, f"{metric.value:.6g}", metric.unit) for metric in evaluation.metrics]
    tables = [table_of_cells(header, tasks), table_of_cells(("own metric", names[1], "unit"), own)]
    if why_all := evaluation.degeneration:
        sides = [why_all.reasons, *([why_all.against_reasons] if why_all.against_reasons else [])]
        rows = []
        for why in (*sorted({one for side in sides for one in side if one}), None):
            counts = [sum(one == why if why else one is not None for one in side) for side in sides]
            shares = [count / len(side) for count, side in zip(counts, sides, strict=True)]
            change = [f"{100 * (shares[0] - shares[1]):+.1f}"] if len(sides) > 1 else []
            title = why or f"all, of {len(why_all.reasons)} answers"
            rows.append((title, *(f"{share:.1%}" for share in shares), *change))
        titles = ("degenerate answers", names[1], names[0], "difference, points")
        tables.append(table_of_cells(titles[: len(rows[0])], rows))
    return [table for table in tables if table.rows]


def evaluation_text(evaluation: Evaluation, seqlen: int) -> str:
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
        if not place.same_tokens:
            parts.append("Its own tokenizer cuts texts differently; the tokens of the one here were used.\n")
    if why := evaluation.degeneration:
        answers = (evaluation.against_answers, evaluation.answers)
        sides = list(zip(NAMES, answers, (why.against_reasons, why.reasons), strict=True))
        for index, prompt in enumerate(evaluation.prompts):
            lines = [f"Q: {prompt}"]
            for name, said, reasons in sides:
                if said:
                    flag = f" [{reasons[index]}]" if reasons[index] else ""
                    lines.append(f"{name}{flag}: {' '.join(said[index].split())}")
            parts.append("\n".join((*lines, "")))
    return "\n".join(parts)
