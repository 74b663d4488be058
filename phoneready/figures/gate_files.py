"""What the gate leaves for people and build systems: verdicts.json, figures.json, junit.xml, summary.md."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from cfsp.errors import InconclusiveError, LimitError
from cfsp.files import write_text
from cfsp.records import write_record
from phoneready.figures.budgets import BudgetConfig
from phoneready.figures.figure_set import FIGURES_FILE, FigureSet
from phoneready.figures.gate import judge_all
from phoneready.figures.verdict import (
    INCONCLUSIVE,
    MISSED,
    OUTCOMES,
    PASS,
    VERDICTS_FILE,
    BudgetVerdict,
    Verdicts,
    worst_outcome,
)
from runtime_bench.presentation.markup import lay_out_table
from runtime_bench.presentation.table import table_of_cells

logger = logging.getLogger(__name__)
JUNIT_FILE, SUMMARY_FILE = "junit.xml", "summary.md"
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
_MARKUP = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*{}[]<>#~|&@$"})
_HEADER = ("metric", "of", "on", "limit", "figure", "verdict", "why")
_MARKS = {PASS: "✅ pass", MISSED: "❌ missed", INCONCLUSIVE: "❔ inconclusive"}


def write_verdicts(
    budgets: Sequence[BudgetConfig],
    folder: Path,
    figures: FigureSet,
    baseline: FigureSet | None = None,
    baseline_file: Path | None = None,
) -> Verdicts:
    """Hold the figures against the budgets; write figures.json, verdicts.json, junit.xml and summary.md.

    The summary is appended to the file that GITHUB_STEP_SUMMARY names, too.

    Raises:
        InputError: As `judge_all`; figures.json is written even then.
    """
    write_record(folder / FIGURES_FILE, figures)
    verdicts = judge_all(budgets, figures, baseline)
    where = baseline_file.name if baseline_file else None
    record = Verdicts(worst_outcome(verdicts), figures.source, figures.source_sha256, where, verdicts)
    write_record(folder / VERDICTS_FILE, record)
    write_text(folder / JUNIT_FILE, junit_xml(record))
    summary = summary_markdown(record)
    write_text(folder / SUMMARY_FILE, summary)
    step_summary = os.environ.get(STEP_SUMMARY)
    if step_summary:
        try:
            with Path(step_summary).open("a", encoding="utf-8") as stream:
                stream.write(summary + "\n")
        except OSError as error:  # hours of work are not lost for it
            logger.warning("the summary is not in %s: %s", step_summary, error.strerror)
    return record


def check_verdicts(found: Verdicts) -> None:
    """Turn the outcome into an exit status: a budget that nobody knows to be met is not met.

    Raises:
        LimitError: A budget is missed.
        InconclusiveError: None is missed, and one is inconclusive.
    """
    if found.outcome == PASS:
        return
    told = [v for v in found.verdicts if v.outcome == found.outcome]
    names = "; ".join(f"{v.metric} of {v.subject} is {v.figure()}, {v.limit}: {v.reason}" for v in told)
    kind, said = (LimitError, MISSED) if found.outcome == MISSED else (InconclusiveError, "not decided")
    raise kind(f"{len(told)} of {len(found.verdicts)} budgets {said}: {names}")


def badge(found: Verdicts) -> str:
    """The outcome in one line, such as `budgets | 5 pass, 1 missed`."""
    counts = Counter(verdict.outcome for verdict in found.verdicts)
    parts = [f"{counts[outcome]} {outcome}" for outcome in reversed(OUTCOMES) if counts[outcome]]
    outcome = found.outcome.upper() if found.verdicts else "NO BUDGETS"
    return f"[{outcome}] {Path(found.source).name}: {', '.join(parts) or 'nothing was limited'}"


def verdict_rows(found: Verdicts) -> str:
    """The verdicts for a terminal."""
    return table_of_cells(
        _HEADER, [_cells(verdict, verdict.outcome) for verdict in found.verdicts]
    ).markdown()


def summary_markdown(found: Verdicts) -> str:
    """A page for a build's summary; names and reasons are escaped."""
    parts = [f"### {_escape(badge(found))}\n"]
    if found.verdicts:
        worst_first = sorted(found.verdicts, key=lambda verdict: OUTCOMES.index(verdict.outcome))
        rows = [[*map(_escape, _cells(v, _MARKS[v.outcome]))] for v in worst_first]
        parts.append(lay_out_table(_HEADER, rows, right=()))
    if found.baseline:
        parts.append(f"Baseline: {_escape(found.baseline)}\n")
    return "\n".join(parts)


def junit_xml(found: Verdicts) -> str:
    """JUnit's XML: a missed budget is a failure, one that could not be decided is an error."""
    counts = Counter(verdict.outcome for verdict in found.verdicts)
    numbers = {"tests": len(found.verdicts), "failures": counts[MISSED], "errors": counts[INCONCLUSIVE]}
    attributes = {name: str(number) for name, number in numbers.items()}
    suites = ElementTree.Element("testsuites", {"name": "phoneready", **attributes})
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": _xml(f"budgets of {Path(found.source).name}"), **attributes}
    )
    for verdict in found.verdicts:
        name = f"{verdict.metric} {verdict.limit}"
        place = ".".join(filter(None, ("budgets", verdict.target, verdict.subject)))
        case = ElementTree.SubElement(suite, "testcase", {"name": _xml(name), "classname": _xml(place)})
        said = _xml(f"{verdict.figure()}: {verdict.reason}")
        if verdict.outcome == MISSED:
            ElementTree.SubElement(case, "failure", {"message": said, "type": "budget"}).text = said
        elif verdict.outcome == INCONCLUSIVE:
            ElementTree.SubElement(case, "error", {"message": said, "type": "not decided"}).text = said
        else:
            ElementTree.SubElement(case, "system-out").text = said
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
