"""`phoneready eval`: judge a model, alone or against another one, a baseline, or its own pruned versions."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cfsp.errors import InputError
from cfsp.files import record_head, refuse_existing, write_text
from cfsp.settings import SEED, Settings, setting
from cfsp.text.settings import BUILTIN_TEXT, CalibrationSettings
from phoneready.commands.options import (
    DebugOption,
    JsonOption,
    ModelArgument,
    Renamed,
    ThreadsOption,
    TrustOption,
)
from phoneready.console import prepare_torch, show_progress, write_result
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.metrics import TOLERANCES

if TYPE_CHECKING:
    from phoneready.evaluation.evaluation_record import Evaluation
    from phoneready.evaluation.gate import GateRow
    from phoneready.evaluation.models import OpenSettings
    from phoneready.evaluation.sweep import Sweep


_RECORD, _TABLE = record_head("evaluation", "evaluation_sweep"), re.compile(rb"\Aprune ratio,")
"""How a file begins that --save and --csv may replace: one that they made."""


_LIMITS = {option: f"{tolerance.default:g}" for option, tolerance in TOLERANCES.items()}
"""Option of the gate -> its default."""


@dataclass(frozen=True)
class Subject:
    """What is judged against what."""

    model: str
    against: str | None
    runtime: str | None


@dataclass(frozen=True)
class QuestionOptions(Settings):
    """What to ask beside, or instead of, what the settings say."""

    no_text: bool = setting(False, "Measure on no text: tasks or answers only.")
    prompts_file: Path | None = setting(
        None,
        "File of such questions: .txt, or .jsonl with `prompt` or `turns`.",
        option="--prompts",
        metavar="FILE",
    )
    no_prompts: bool = setting(False, "Ask nothing.")


@dataclass(frozen=True)
class GateOptions(Settings):
    """What the judgement is held against, and by how much it may be worse."""

    save: Path | None = setting(None, "Write the result to this file, as --baseline reads it.")
    baseline: Path | None = setting(
        None, "Compare with this earlier result; exit 1 where a figure got worse."
    )
    max_perplexity_ratio: float | None = setting(
        None, "Gate: perplexity, times the baseline's.", ge=0, shown=_LIMITS["max_perplexity_ratio"]
    )
    max_kl_increase: float | None = setting(
        None, "Gate: mean KL divergence, in nats.", ge=0, shown=_LIMITS["max_kl_increase"]
    )
    max_top1_drop: float | None = setting(
        None, "Gate: same-top-1 share.", ge=0, shown=_LIMITS["max_top1_drop"]
    )
    max_accuracy_drop: float | None = setting(
        None, "Gate: each figure of a task.", ge=0, shown=_LIMITS["max_accuracy_drop"]
    )
    max_degenerate_increase: float | None = setting(
        None, "Gate: share of degenerate answers.", ge=0, shown=_LIMITS["max_degenerate_increase"]
    )
    max_metric_change: float | None = setting(
        None, "Gate: own metrics that state a direction.", ge=0, shown=_LIMITS["max_metric_change"]
    )

    @property
    def limits(self) -> dict[str, float]:
        """The tolerances that were set."""
        return {name: value for name in _LIMITS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class SweepOptions(Settings):
    """Pruned copies of the model to judge against it."""

    ratios: tuple[float, ...] = setting(
        (),
        "Sweep: prune a copy of MODEL at each ratio and judge it against MODEL.",
        ge=0,
        lt=1,
        metavar="RATIO,...",
    )
    csv: Path | None = setting(None, "Sweep: also write the table as CSV.")
    calibration_seed: int = setting(0, replace(SEED, help="Sweep: seed of calibration."))
    align: int = setting(32, "Sweep: widths are multiples of this.", ge=1)


def evaluate(
    model: ModelArgument,
    settings: EvaluationSettings,
    questions: QuestionOptions,
    gate: GateOptions,
    sweep: SweepOptions,
    calibration: Annotated[CalibrationSettings, Renamed("Sweep: ", {"seqlen": "--calibration-seqlen"})],
    against: str | None = setting(None, "Reference model, usually the dense one.", metavar="MODEL"),
    runtime: str | None = setting(
        None,
        "What runs MODEL: torch (a .gguf file is dequantized), llama.cpp or onnxruntime.",
        shown="llama.cpp for .gguf files, onnxruntime for ONNX, else torch",
    ),
    trust_remote_code: TrustOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure perplexity, divergence (--against), tasks and answers; hold the result against a baseline.

    Every figure is printed with its text and its number of tokens: without these it means nothing.
    """
    subject = Subject(model, against, runtime)
    _check_sweep(sweep, subject, gate)
    _check_gate(gate)
    _check_questions(questions, settings)
    for path, like in ((gate.save, _RECORD), (sweep.csv, _TABLE)):
        if path is not None:
            refuse_existing(path, force=True, like=like)
    prepare_torch(threads)
    from phoneready.evaluation.models import OpenSettings

    settings = _settings(settings, questions)
    longest = settings.seqlen if settings.text or settings.chats else 1
    opening = OpenSettings(longest, trust_remote_code, threads)
    if sweep.ratios:
        result = _run_sweep(model, sweep, calibration, settings, opening)
        _write_sweep(result, gate.save, sweep.csv, as_json=json)
    else:
        _evaluate(subject, settings, gate, opening, as_json=json)


def _check_sweep(sweep: SweepOptions, subject: Subject, gate: GateOptions) -> None:
    if not sweep.ratios:
        if sweep.csv is not None:
            raise InputError("--csv is for sweeps: give --ratios too")
        return
    given = {"against": subject.against, "baseline": gate.baseline, "runtime": subject.runtime}
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--ratios judges MODEL's pruned copies against MODEL: leave out --{name}")


def _check_gate(gate: GateOptions) -> None:
    if gate.limits and gate.baseline is None:
        option = min(gate.limits).replace("_", "-")
        raise InputError(f"--{option} is of the gate: give --baseline too")
    if gate.save and gate.baseline and gate.save.resolve() == gate.baseline.resolve():
        raise InputError("--save would overwrite the --baseline that is compared with: name another file")


def _check_questions(questions: QuestionOptions, settings: EvaluationSettings) -> None:
    given = {
        "--prompts": questions.prompts_file is not None,
        "--prompt": bool(settings.prompts),
        "--no-prompts": questions.no_prompts,
    }
    together = [name for name, used in given.items() if used]
    if len(together) > 1:
        raise InputError(f"{' and '.join(together)}: give one of them")
    if questions.no_text and (settings.text or settings.chats):
        raise InputError("--no-text with --text or --chats: give one of the two")


def _settings(settings: EvaluationSettings, questions: QuestionOptions) -> EvaluationSettings:
    """With the built-in text and prompts where nothing else is asked for."""
    from cfsp.evaluation.answers import CHECK_PROMPTS
    from phoneready.evaluation.run import check_texts, read_prompts

    prompts = settings.prompts or (() if questions.no_prompts else CHECK_PROMPTS)
    if questions.prompts_file is not None:
        prompts = read_prompts(questions.prompts_file)
    builtin = not (settings.text or settings.chats or questions.no_text)
    settings = replace(settings, text=(BUILTIN_TEXT,) if builtin else settings.text, prompts=prompts)
    check_texts(settings)
    return settings


def _evaluate(
    subject: Subject, settings: EvaluationSettings, gate: GateOptions, opening: OpenSettings, *, as_json: bool
) -> None:
    from cfsp.records import read_record, record_to_json, write_record
    from phoneready.evaluation.evaluation_record import Evaluation
    from phoneready.evaluation.gate import check_gate, check_limits, compare_with_baseline

    check_limits(gate.limits)
    earlier = read_record(Evaluation, gate.baseline) if gate.baseline else None
    result = _judge(subject, settings, opening)
    if gate.save:
        write_record(gate.save, result)
    rows: tuple[GateRow, ...] = ()
    if earlier and gate.baseline:
        rows = compare_with_baseline(result, earlier, gate.limits, where=gate.baseline)
    payload = record_to_json(result) | ({"gate": [asdict(row) for row in rows]} if earlier else {})
    write_result(_report(result, settings, rows), payload, as_json=as_json)
    check_gate(rows)


def _judge(subject: Subject, settings: EvaluationSettings, opening: OpenSettings) -> Evaluation:
    from contextlib import ExitStack

    from phoneready.evaluation.models import open_language_model, runtime_for
    from phoneready.evaluation.run import evaluate as judge

    chosen = runtime_for(subject.model, subject.runtime)
    with show_progress() as progress, ExitStack() as stack:
        opened = open_language_model(subject.model, chosen, opening, progress=progress)
        model = stack.enter_context(opened)
        dense = None
        if subject.against:
            # A model in torch is compared with one in torch: the file's own runtime would add its rounding.
            other = runtime_for(subject.against, "torch" if chosen == "torch" else None)
            opened = open_language_model(subject.against, other, opening, progress=progress)
            dense = stack.enter_context(opened)
        return judge(model, dense, settings, progress=progress)


def _report(result: Evaluation, settings: EvaluationSettings, rows: tuple[GateRow, ...]) -> str:
    from phoneready.evaluation.gate import gate_table
    from phoneready.evaluation.tables import figure_tables, format_answers, text_table

    parts = []
    if result.texts:
        parts += [text_table(result).markdown()]
        parts += [f"Windows of {settings.seqlen} tokens, each without context before it.\n"]
    parts += [table.markdown() for table in figure_tables(result)]
    parts += [format_answers(result)]
    parts += [gate_table(rows).markdown()]
    return "\n".join(part for part in parts if part)


def _write_sweep(result: Sweep, save: Path | None, csv: Path | None, *, as_json: bool) -> None:
    from cfsp.records import record_to_json, write_record
    from phoneready.evaluation.sweep import sweep_table

    if save:
        write_record(save, result)
    if csv:
        write_text(csv, sweep_table(result, float).csv())  # for plotting, in full precision
    write_result(sweep_table(result).markdown(), record_to_json(result), as_json=as_json)


def _run_sweep(
    model: str,
    options: SweepOptions,
    calibration: CalibrationSettings,
    settings: EvaluationSettings,
    opening: OpenSettings,
) -> Sweep:
    from cfsp.models.reference import load_model
    from cfsp.pruning.settings import PruneSettings
    from cfsp.text.calibration import load_calibration
    from phoneready.evaluation.sweep import check_ratios, sweep

    prune = PruneSettings(align=options.align)
    ratios = check_ratios(options.ratios, prune)
    with show_progress() as progress:
        loaded = load_model(model, trust_remote_code=opening.trust_remote_code, progress=progress)
        drawn = load_calibration(
            calibration.calibration,
            loaded,
            nsamples=calibration.nsamples,
            seqlen=calibration.seqlen,
            seed=options.calibration_seed,
            progress=progress,
        )
        return sweep(loaded, drawn, ratios, prune, settings, progress=progress)
