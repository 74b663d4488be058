"""The gate: figures held against budgets, with their noise.

A figure passes or misses its budget only if its whole interval does; if the limit lies inside, or there is too little
to say, the verdict is inconclusive. An interval is

    of timings      the bootstrap interval of the median, or of the ratio of medians (runtime_bench.records.summary),
                    as in `phoneready compare`, with samples of at least five processes; if the machine was too busy
                    to tell, none is missed, and no ratio passes; of fewer samples than a look among several needs,
                    their range, 1.5 times wider at both ends
    of energy       that of timings, wider by the error of the meter; of a busy machine nothing is said
    of texts        Student's t over windows, of two models over the same ones (runtime_bench.records.pairs)
    of accuracies   Wilson's; compared: a paired bootstrap over items
    of projections  the band
    of sizes, of memory (the most of any process, by its definition) and of answers to fixed prompts, the figure itself
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from cfsp.errors import InconclusiveError, InputError, LimitError
from cfsp.files import write_text
from cfsp.records import write_record
from cfsp.units import format_seconds
from phoneready.figures.figures import (
    DENSE,
    FIGURES_FILE,
    INCONCLUSIVE,
    MISSED,
    OUTCOMES,
    PASS,
    SHIPPED,
    TASK,
    TEXT,
    UNJUDGED,
    VERDICTS_FILE,
    BudgetConfig,
    BudgetVerdict,
    Figure,
    FigureSet,
    Verdicts,
    format_figure,
    own_reference,
    recorded_metric,
    select,
)
from runtime_bench.presentation.table import lay_out_table, table_of_cells
from runtime_bench.records.bench_record import DOES_NOT_FIT
from runtime_bench.records.compare import MIN_SAMPLES, TOO_NOISY, WIDEST, judge_pairs, surer
from runtime_bench.records.compare import judge as judge_samples
from runtime_bench.records.pairs import item_interval, window_interval
from runtime_bench.records.summary import CONFIDENCE, NORMAL_95, ratio_interval

logger = logging.getLogger(__name__)
NO_BUDGETS = "no budgets: nothing was judged"
JUNIT_FILE, SUMMARY_FILE = "junit.xml", "summary.md"
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
_ROUNDING = 1e-9
_MORE = {TEXT: "more windows of text (max_windows)", TASK: "more items"}
_MARKUP = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*{}[]<>#~|&@$"})
_HEADER = ("metric", "of", "on", "limit", "figure", "verdict", "why")
_MARKS = {PASS: "✅ pass", MISSED: "❌ missed", INCONCLUSIVE: "❔ inconclusive"}


class _Estimate(NamedTuple):
    """A figure, its interval, why nothing can be said of it if nothing can, and what is to be said beside it."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    missed: bool = False
    aside: str = ""


def judge_all(
    budgets: Sequence[BudgetConfig], figures: FigureSet, baseline: FigureSet | None = None
) -> tuple[BudgetVerdict, ...]:
    """Every budget's verdict on every figure; raises InputError for one that limits nothing, and as `judge`."""
    ours = figures.by_key(SHIPPED)
    references = {"dense": figures.by_key(DENSE), "baseline": baseline.by_key(SHIPPED) if baseline else {}}
    verdicts = []
    for position, budget in enumerate(budgets):
        chosen = select(budget, ours)
        if not chosen:
            whose = own_reference(budget.metric)
            known = ", ".join(key.on or key.metric for key in ours if own_reference(key.metric) == whose)
            raise InputError(
                f"nothing has {budget.metric} here", field=f"budgets[{position}]", allowed=known or "others"
            )
        others = references.get(budget.relative_to or "", {})
        try:
            verdicts += [judge(budget, ours[key], others.get(key)) for key in chosen]
        except ValueError as error:
            raise InputError(str(error), field=f"budgets[{position}]") from error
    return tuple(verdicts)


def judge(budget: BudgetConfig, figure: Figure, reference: Figure | None) -> BudgetVerdict:
    """A budget's verdict on one figure.

    Raises:
        InputError: The reference was measured on another text or task.
        ValueError: The metric's own direction is the other one.
    """
    if figure.higher_is_better is not None:
        budget.check_direction(figure.higher_is_better)
    if budget.relative_to is None:
        estimate = _absolute(figure)
    elif reference is None:
        estimate = _Estimate(reason=f"the {budget.relative_to} has no such figure")
    else:
        estimate = _relative(budget, figure, reference)
    unit = "x" if budget.is_ratio else figure.unit
    outcome, reason = _outcome(budget, estimate, unit)
    reason += estimate.aside if outcome != INCONCLUSIVE or not estimate.reason else ""
    # A busy machine only slows: what passes there, passes.
    if figure.samples and figure.samples.noise and outcome == MISSED and budget.relative_to is None:
        outcome, reason = INCONCLUSIVE, _too_noisy(figure)
    if outcome == INCONCLUSIVE and figure.measured_on and figure.measured_on.seconds:
        took, over = format_seconds(figure.measured_on.seconds), figure.measured_on.time_over
        rounds = figure.samples.n_independent if figure.samples else 0
        reason += f"; not decided in {rounds} rounds; those added took {took}"
        reason += ": the time of bench.decide_s is over" if over else ""
    low, high = (None, None) if estimate.low == estimate.high else (estimate.low, estimate.high)
    return BudgetVerdict(
        metric=", ".join(filter(None, (figure.key.metric, figure.key.on, figure.key.threads))),
        subject=figure.subject,
        target=figure.target,
        limit=budget.describe(),
        value=estimate.value,
        low=low,
        high=high,
        outcome=outcome,
        reason=reason,
        unit=unit,
    )


def _absolute(figure: Figure) -> _Estimate:
    if figure.value is None:
        return _failed(figure)
    metered, timed = recorded_metric(figure.key.metric).metered, figure.samples
    if metered and timed and timed.noise:  # what slows a processor may spare energy
        return _Estimate(reason=_too_noisy(figure))
    if figure.low is not None and figure.high is not None and not metered:
        return _Estimate(figure.value, figure.low, figure.high)
    if figure.windows:
        found = window_interval(figure.windows)
        return _Estimate(*found, "one window says nothing of its noise" if found.low is None else None)
    if figure.right:
        return _Estimate(*item_interval(figure.right))
    if figure.is_estimate:
        if not figure.stderr:
            return _Estimate(
                figure.value, reason=f"{figure.subject}: neither items nor a standard error are recorded"
            )
        return _around(figure.value, NORMAL_95 * figure.stderr)
    if not timed:
        return _Estimate(figure.value, figure.value, figure.value)
    few = timed.too_few(CONFIDENCE)
    if few and timed.n_independent < MIN_SAMPLES:
        return _Estimate(figure.value, reason=few)
    speed = ratio_interval(
        (1.0,),
        timed.times,
        paired=False,
        denominator_rounds=timed.rounds,
        confidence=surer(CONFIDENCE, timed),
    )
    if few:  # a limit that is far from every sample needs no more of them
        speed = replace(speed, low=1 / (max(timed.times) * WIDEST), high=WIDEST / min(timed.times))
    interval = figure.in_unit(speed)
    least, most = _meter(figure)
    aside = f"; {few}, and each is far from the limit" if few else ""
    return _Estimate(interval.ratio, interval.low * least, interval.high * most, few, aside=aside)


def _relative(budget: BudgetConfig, figure: Figure, reference: Figure) -> _Estimate:
    now, before = figure.value, reference.value
    if now is None:
        return _failed(figure)
    if before is None:
        return _failed(reference)._replace(missed=False)
    if not math.isfinite(before):
        return _Estimate(reason=f"{reference.subject}: {before} is nothing to be compared with")
    if why := differing(figure, reference):
        if figure.target is None:
            raise InputError(f"the {budget.relative_to} was measured otherwise: {why}")
        return _Estimate(reason=f"the {budget.relative_to} was measured otherwise: {why}")
    if figure.samples and reference.samples:
        apart = figure.samples.session is None or figure.samples.session != reference.samples.session
        both = reference.anchor, figure.anchor
        anchors = (both[0], both[1]) if apart and both[0] and both[1] else None
        found = judge_samples(reference.samples, figure.samples, anchors)
        if found.problem or found.shown is None:
            return _Estimate(reason=found.problem or f"{TOO_NOISY}: {found.noise}")
        interval = figure.in_unit(found.shown)
        (least, most), (its_least, its_most) = _meter(figure), _meter(reference)
        return _Estimate(interval.ratio, interval.low * least / its_most, interval.high * most / its_least)
    if not budget.difference and not before and now:
        return _Estimate(reason=f"no ratio to {reference.subject}, whose figure is 0")
    value = now - before if budget.difference else 1.0 if now == before else now / before
    pairs = (reference.windows, figure.windows) if figure.windows else (reference.right, figure.right)
    if pairs[0] and pairs[1]:
        pair = judge_pairs(pairs[0], pairs[1], difference=budget.difference)
        return _Estimate(*pair[:3], pair.reason if pair.low is None else None)
    # Which answers were right is not recorded: squares of standard errors, of a ratio the relative ones, are added.
    if figure.is_estimate and not (figure.stderr and reference.stderr):
        return _Estimate(value, reason="neither items nor standard errors are recorded of both")
    errors = [figure.stderr or 0.0, reference.stderr or 0.0]
    if not budget.difference:
        shares = zip(errors, (now, before), strict=True)
        errors = [abs(value) * error / one if one else 0.0 for error, one in shares]
    aside = "; taken as independent: which items were right is not recorded of both" if any(errors) else ""
    return _around(value, NORMAL_95 * math.hypot(*errors))._replace(aside=aside)


def _meter(figure: Figure) -> tuple[float, float]:
    """The factors by which its meter may be wrong; an error on one side says nothing of the other."""
    metered = recorded_metric(figure.key.metric).metered
    if not metered or not figure.value or figure.low is None or figure.high is None:
        return 1.0, 1.0
    return figure.low / figure.value, figure.high / figure.value


def _around(value: float, half: float) -> _Estimate:
    return _Estimate(value, value - half, value + half)


def _failed(figure: Figure) -> _Estimate:
    why = figure.failure or "not measured"
    return _Estimate(reason=f"{figure.subject}: {why}", missed=why.startswith(DOES_NOT_FIT))


def _too_noisy(figure: Figure) -> str:
    return f"{TOO_NOISY}: {figure.subject}: {figure.samples and figure.samples.noise}"


def differences(figure: Figure, reference: Figure, *, but: str = "") -> str:
    """What must be equal for two figures to be comparable and is not, without the condition `but`; empty if all is."""
    before, now = reference.conditions, figure.conditions
    names = [*now, *(name for name in before if name not in now)]
    pairs = (
        (name, before.get(name, "not stated"), now.get(name, "not stated")) for name in names if name != but
    )
    return ", ".join(f"{name} was {then} and is {today}" for name, then, today in pairs if then != today)


def differing(figure: Figure, reference: Figure) -> str:
    """As `differences`, and what computed them, if both say it; clocks are judged with the samples."""
    found = differences(figure, reference, but="clocks" if figure.samples or reference.samples else "")
    if not found and figure.backends and reference.backends and figure.backends != reference.backends:
        return f"backends was {reference.backends} and is {figure.backends}"
    return found


def _outcome(budget: BudgetConfig, estimate: _Estimate, unit: str) -> tuple[str, str]:
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None or low is None or high is None:
        return MISSED if estimate.missed else INCONCLUSIVE, estimate.reason or "not measured"
    limit, sign = budget.limit, 1 if budget.is_upper else -1
    slack = _ROUNDING * max(1.0, abs(limit))
    excess = sorted(sign * (end - limit) for end in (low, high))
    # Written so that NaN is no pass.
    if excess[1] <= slack:
        return PASS, "within it"
    if excess[0] > slack:
        share = f" ({abs(value - limit) / abs(limit):.1%})" if limit else ""
        side = "over" if budget.is_upper else "short"
        return MISSED, f"{side} by {format_figure(abs(value - limit), unit)}{share}"
    if estimate.reason:
        return INCONCLUSIVE, estimate.reason
    ends = " to ".join(format_figure(end, unit) for end in (low, high))
    more = _MORE.get(recorded_metric(budget.metric).source, "more samples")
    return INCONCLUSIVE, f"the interval, {ends}, crosses the limit; {more} narrow it"


def write_verdicts(
    budgets: Sequence[BudgetConfig],
    folder: Path,
    figures: FigureSet,
    baseline: FigureSet | None = None,
    baseline_file: Path | None = None,
) -> Verdicts:
    """Hold the figures against the budgets; write figures.json (even if that raises), verdicts.json, junit.xml and
    summary.md, which is appended to the file that GITHUB_STEP_SUMMARY names, too."""
    write_record(folder / FIGURES_FILE, figures)
    verdicts = judge_all(budgets, figures, baseline)
    worst = min((verdict.outcome for verdict in verdicts), key=OUTCOMES.index, default=UNJUDGED)
    where = baseline_file.name if baseline_file else None
    record = Verdicts(worst, figures.source, figures.source_sha256, where, verdicts)
    write_record(folder / VERDICTS_FILE, record)
    write_text(folder / JUNIT_FILE, _junit_xml(record))
    parts = [f"### {_escape(badge(record))}\n"]
    if verdicts:
        worst_first = sorted(verdicts, key=lambda verdict: OUTCOMES.index(verdict.outcome))
        rows = [[*map(_escape, _cells(v, _MARKS[v.outcome]))] for v in worst_first]
        parts.append(lay_out_table(_HEADER, rows, right=()))
    if where:
        parts.append(f"Baseline: {_escape(where)}\n")
    summary = "\n".join(parts)
    write_text(folder / SUMMARY_FILE, summary)
    step_summary = os.environ.get(STEP_SUMMARY)
    if step_summary:
        try:
            with Path(step_summary).open("a", encoding="utf-8") as stream:
                stream.write(summary + "\n")
        except OSError as error:  # hours of work are not lost for it
            logger.warning("the summary is not in %s: %s", step_summary, error.strerror)
    return record


def check_verdicts(verdicts: Sequence[BudgetVerdict], what: str = "budgets") -> None:
    """Raise LimitError if a budget is missed, else InconclusiveError if nobody knows whether one is met."""
    for outcome, kind, said in (
        (MISSED, LimitError, MISSED),
        (INCONCLUSIVE, InconclusiveError, "not decided"),
    ):
        told = [v for v in verdicts if v.outcome == outcome]
        names = "; ".join(f"{v.metric} of {v.subject} is {v.figure()}, {v.limit}: {v.reason}" for v in told)
        if told:
            raise kind(f"{len(told)} of {len(verdicts)} {what} {said}: {names}")


def badge(found: Verdicts) -> str:
    """The outcome in one line, such as `budgets | 5 pass, 1 missed`."""
    counts = Counter(verdict.outcome for verdict in found.verdicts)
    parts = [f"{counts[outcome]} {outcome}" for outcome in reversed(OUTCOMES) if counts[outcome]]
    return f"[{found.outcome.upper()}] {Path(found.source).name}: {', '.join(parts) or NO_BUDGETS}"


def verdict_rows(verdicts: Sequence[BudgetVerdict]) -> str:
    return table_of_cells(_HEADER, [_cells(verdict, verdict.outcome) for verdict in verdicts]).markdown()


def _junit_xml(found: Verdicts) -> str:
    """JUnit's XML: a missed budget is a failure, one that could not be decided is an error."""
    counts = Counter(verdict.outcome for verdict in found.verdicts)
    numbers = {"tests": len(found.verdicts) or 1, "failures": counts[MISSED], "errors": counts[INCONCLUSIVE]}
    numbers |= {} if found.verdicts else {"skipped": 1}
    attributes = {name: str(number) for name, number in numbers.items()}
    suites = ElementTree.Element("testsuites", {"name": "phoneready", **attributes})
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": _xml(f"budgets of {Path(found.source).name}"), **attributes}
    )
    elements = {
        MISSED: ("failure", {"type": "budget"}),
        INCONCLUSIVE: ("error", {"type": "not decided"}),
        PASS: ("system-out", {}),
    }
    for verdict in found.verdicts:
        name = f"{verdict.metric} {verdict.limit}"
        place = ".".join(filter(None, ("budgets", verdict.target, verdict.subject)))
        case = ElementTree.SubElement(suite, "testcase", {"name": _xml(name), "classname": _xml(place)})
        said = _xml(f"{verdict.figure()}: {verdict.reason}")
        tag, more = elements[verdict.outcome]
        ElementTree.SubElement(case, tag, {"message": said, **more} if more else {}).text = said
    if not found.verdicts:
        case = ElementTree.SubElement(suite, "testcase", {"name": "budgets", "classname": "budgets"})
        ElementTree.SubElement(case, "skipped", {"message": NO_BUDGETS})
    ElementTree.indent(suites)
    content: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return content.decode() + "\n"


def _cells(verdict: BudgetVerdict, outcome: str) -> list[str]:
    place = verdict.target or "-"
    return [verdict.metric, verdict.subject, place, verdict.limit, verdict.figure(), outcome, verdict.reason]


def _escape(text: str) -> str:
    """Plain text in a Markdown table: nothing of it is markup, HTML, a link, a mention or a formula."""
    text = " ".join(text.split()).translate(_MARKUP)
    return text.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def _xml(text: str) -> str:
    """Without characters that XML cannot hold; the library escapes the others."""
    return "".join(c if c.isprintable() or c in "\t\n" else "\ufffd" for c in text)
