"""Records with values that nothing can have measured are refused where they are read: no gate passes on them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.files import write_json
from cfsp.records import read_record, record_to_json
from phoneready.evaluation.evaluation_record import Degeneration, Evaluation, ModelIdentity, TextLoss
from phoneready.figures.figures import Figure, FigureKey, FigureSet, read_baseline
from phoneready.history import HistoryEntry, HistoryFigure, read_entries
from phoneready.release.steps import Answers

VALUES = ["Infinity", "-Infinity", "NaN", "1e400", "-1.0", '"12"', "true", "[1]"]
KEY = FigureKey("perplexity", "checkpoint")


def _with_value(record: Any, path: Path, name: str, value: str) -> Path:
    """The record as a file in which `name` has another value."""
    text = json.dumps(record_to_json(record))
    assert f'"{name}": 12.5' in text
    path.write_text(text.replace(f'"{name}": 12.5', f'"{name}": {value}'), encoding="utf-8")
    return path


def _figures() -> FigureSet:
    return FigureSet("m", None, 0, (Figure(KEY, "shipped", "m", "", 12.5),))


def _evaluation() -> Evaluation:
    text = TextLoss("text", "t.txt", 64, "0" * 64, (100,), (126,), (12.5,))
    fields = {field.name for field in dataclasses.fields(Evaluation)}
    given: dict[str, Any] = {"model": ModelIdentity("m"), "against": None, "seed": 1, "texts": (text,)}
    assert given.keys() <= fields
    return Evaluation(**given)


def _entry(metric: str = "perplexity") -> HistoryEntry:
    figure = HistoryFigure(FigureKey(metric, "checkpoint"), "shipped", "", 12.5, None, {})
    return HistoryEntry("0" * 64, "2026-01-01T00:00:00Z", None, "m", None, "pass", {}, {}, {}, (figure,))


def test_what_nobody_can_have_measured_is_no_baseline_and_no_history(tmp_path: Path) -> None:
    figures, judged, history = (tmp_path / name for name in ("figures.json", "eval.json", "history.jsonl"))
    _with_value(_figures(), figures, "value", "11")
    assert read_baseline(figures, [KEY]).figures[0].value == 11
    state = record_to_json(_evaluation())
    write_json(judged, state)
    assert read_record(Evaluation, judged) == _evaluation()
    for value in VALUES:
        _with_value(_figures(), figures, "value", value)
        with pytest.raises(InputError, match=r"figures\.json"):
            read_baseline(figures, [KEY])
    for key, values in (("nats", (-1.0, "12", None)), ("n_bytes", (0, -1, 1.5)), ("n_tokens", (0, "1"))):
        for windows in (*([value] for value in values), [1, 1]):
            changed = dict(state["texts"][0], **{key: windows})
            write_json(judged, state | {"texts": [changed]})
            with pytest.raises(InputError, match=r"eval\.json"):
                read_record(Evaluation, judged)
    judged.write_text(json.dumps(state).replace("12.5", "NaN"), encoding="utf-8")
    with pytest.raises(InputError, match=r"eval\.json"):
        read_record(Evaluation, judged)
    for value in ("Infinity", "NaN", "1e400", '"12"'):
        _with_value(_entry(), history, "value", value)
        history.write_text("\n" + history.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        with pytest.raises(InputError, match=r"history\.jsonl, line 2"):
            read_entries(history)
    for metric in ("", "pp" + "9" * 5000):  # any other name may be an own metric's, not installed any more
        history.write_text(json.dumps(record_to_json(_entry(metric))), encoding="utf-8")
        with pytest.raises(InputError, match=r"history\.jsonl, line 1.*metric"):
            read_entries(history)
    for seed in (2**63, -(2**63) - 1, 10**40, 1.5, "1", True):
        figures.write_text(json.dumps(record_to_json(_figures()) | {"seed": seed}), encoding="utf-8")
        with pytest.raises(InputError, match="seed"):
            read_record(FigureSet, figures)


def test_answers_without_their_reasons_are_refused(tmp_path: Path) -> None:
    why = Degeneration("0" * 64, 8, 0.0, (None,), 0.0, (None,))
    record = dataclasses.replace(
        _evaluation(), prompts=("q",), answers=("a",), against_answers=("b",), degeneration=why
    )
    path = tmp_path / "evaluation.json"
    for name in ("reasons", "against_reasons", "answers", "against_answers"):
        state = record_to_json(record)
        write_json(path, state)
        assert read_record(Evaluation, path) == record
        (state["degeneration"] if "reasons" in name else state)[name] = []
        write_json(path, state)
        with pytest.raises(InputError, match=r"evaluation\.json: degeneration: reasons are not one for each"):
            read_record(Evaluation, path)


def test_every_prompt_has_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    write_json(path, record_to_json(Answers(("q",), {"a.gguf": ("a",)}, {"a.gguf": (None,)})))
    assert read_record(Answers, path).answers == {"a.gguf": ("a",)}
    write_json(
        path,
        record_to_json(Answers(("q",), {}, {})) | {"answers": {"a.gguf": []}, "reasons": {"a.gguf": [None]}},
    )
    with pytest.raises(InputError, match=r"answers\.json: answers, a\.gguf: 0 answers to 1 prompts"):
        read_record(Answers, path)
    write_json(path, record_to_json(Answers(("q",), {}, {})) | {"prompts": []})
    with pytest.raises(InputError, match=r"answers\.json: prompts: empty"):
        read_record(Answers, path)


def test_records_of_a_release_say_something_of_every_file(make_report_input: Callable[..., Any]) -> None:
    figures = make_report_input().figures
    file, *others = figures.answers.answers
    answers, reasons = (
        {one: found[one] for one in others} for found in (figures.answers.answers, figures.answers.reasons)
    )
    for changed, said in (
        (
            {"answers": dataclasses.replace(figures.answers, answers=answers, reasons=reasons)},
            f"no answers of {file}",
        ),
        ({"dense": ()}, "the dense model has no"),
        ({"shipped": ()}, "what ships has no exports"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            dataclasses.replace(figures, **changed)
