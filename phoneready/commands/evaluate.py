"""`phoneready eval`: judge a model, alone or against another one, a baseline, or its own pruned versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfsp.errors import InputError
from cfsp.files import record_head, refuse_existing
from phoneready.commands.options import (
    TEXT_HELP,
    DebugOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    TrustOption,
    split_names,
    text_references,
)
from phoneready.console import prepare_torch, show_progress, write_result

if TYPE_CHECKING:
    from phoneready.evaluation.gate import GateRow
    from phoneready.evaluation.models import OpenSettings
    from phoneready.evaluation.record import Evaluation, EvaluationSettings
    from phoneready.evaluation.sweep import Sweep

_Limit = float | None
_OUTPUTS = {
    "save": record_head("evaluation", "evaluation_sweep"),
    "csv": re.compile(rb"\Aprune ratio,"),
}
"""Options that name a file, and how a file begins that may be replaced there: one that they made."""


def evaluate(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option("--against", help="Reference model, usually the dense one.", metavar="MODEL")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="What runs MODEL: torch (a .gguf file is dequantized), llama.cpp or onnxruntime.",
            show_default="llama.cpp for .gguf files, onnxruntime for ONNX, else torch",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help=f"Text to measure on; repeatable. {TEXT_HELP}.",
            metavar="REF",
            show_default="builtin:python-docs",
        ),
    ] = None,
    chats: Annotated[
        list[str] | None,
        typer.Option(
            "--chats",
            help="Chats to measure on; repeatable. As --text, or `self`: sampled from the reference model.",
            metavar="REF",
        ),
    ] = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Measure on no text: tasks or answers only.")
    ] = False,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens in a window.", min=2)] = 1024,
    windows: Annotated[int, typer.Option("--windows", help="Most windows of each text.", min=1)] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Seed of `--chats self`.", min=0)] = 1,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="Tasks of lm-evaluation-harness: names, task files or folders of them (extra: eval).",
            metavar="NAME|FILE.yaml,...",
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option("--task-data", help="Folder of the task files' data.", show_default="the task file's"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Items of each task.", min=1, show_default="all")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", help="Examples before each item.", min=0, show_default="the task's"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Own metric; repeatable.", metavar="MODULE:FUNCTION"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Prompts whose answers are shown and checked for degeneration: .txt, or .jsonl with `prompt` "
            "or `turns`.",
            show_default="a built-in set",
        ),
    ] = None,
    no_prompts: Annotated[bool, typer.Option("--no-prompts", help="Ask nothing.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.", min=1)] = 64,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write the result to this file, as --baseline reads it.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="Compare with this earlier result; exit 1 where a figure got worse."),
    ] = None,
    max_perplexity_ratio: Annotated[
        _Limit, typer.Option(help="Gate: perplexity, times the baseline's.", show_default="1.02")
    ] = None,
    max_kl_increase: Annotated[
        _Limit, typer.Option(help="Gate: mean KL divergence, in nats.", show_default="0.01")
    ] = None,
    max_top1_drop: Annotated[
        _Limit, typer.Option(help="Gate: same-top-1 share.", show_default="0.01")
    ] = None,
    max_accuracy_drop: Annotated[
        _Limit, typer.Option(help="Gate: each figure of a task.", show_default="0.02")
    ] = None,
    max_degenerate_increase: Annotated[
        _Limit, typer.Option(help="Gate: share of degenerate answers.", show_default="0.05")
    ] = None,
    max_metric_change: Annotated[
        _Limit, typer.Option(help="Gate: own metrics that state a direction.", show_default="0.02")
    ] = None,
    ratios: Annotated[
        list[str] | None,
        typer.Option(
            "--ratios",
            help="Sweep: prune a copy of MODEL at each ratio and judge it against MODEL.",
            metavar="RATIO,...",
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Sweep: also write the table as CSV.")] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            help="Sweep: calibration text as in `phoneready prune`; repeatable.",
            metavar="REF",
            show_default="self",
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option("--nsamples", help="Sweep: calibration windows.", min=1)] = 128,
    calibration_seqlen: Annotated[
        int, typer.Option("--calibration-seqlen", help="Sweep: tokens in a calibration window.", min=2)
    ] = 1024,
    calibration_seed: Annotated[
        int, typer.Option("--calibration-seed", help="Sweep: seed of calibration.", min=0)
    ] = 0,
    align: Annotated[
        int | None,
        typer.Option("--align", help="Sweep: widths are multiples of this.", min=1, show_default="32"),
    ] = None,
    trust_remote_code: TrustOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure perplexity, divergence (--against), tasks and answers; hold the result against a baseline.

    Every figure is printed with its text and its number of tokens: without these it means nothing.
    """
    given = locals()
    _check_together(given)
    prepare_torch(threads)
    from phoneready.evaluation.models import OpenSettings

    settings = _settings(given)
    longest = seqlen if settings.text or settings.chats else 1
    opening = OpenSettings(longest, trust_remote_code, threads)
    if ratios is None:
        _evaluate(given, settings, opening)
    else:
        _sweep(given, settings, opening)


def _check_together(given: dict[str, Any]) -> None:
    """Options that contradict each other, found before anything is loaded."""
    if given["ratios"] is not None:
        for name in ("against", "baseline", "runtime"):
            if given[name] is not None:
                raise InputError(f"--ratios judges MODEL's pruned copies against MODEL: leave out --{name}")
    elif given["csv"] is not None:
        raise InputError("--csv is for sweeps: give --ratios too")
    if given["prompts"] is not None and given["no_prompts"]:
        raise InputError("--prompts and --no-prompts: give one of the two")
    limits = sorted(_limits(given))
    if limits and given["baseline"] is None:
        raise InputError(f"--{limits[0].replace('_', '-')} is of the gate: give --baseline too")
    if given["save"] and given["baseline"] and given["save"].resolve() == given["baseline"].resolve():
        raise InputError("--save would overwrite the --baseline that is compared with: name another file")
    for name, like in _OUTPUTS.items():
        if given[name] is not None:
            refuse_existing(given[name], force=True, like=like)
    if given["no_text"] and (given["text"] or given["chats"]):
        raise InputError("--no-text with --text or --chats: give one of the two")


def _limits(given: dict[str, Any]) -> dict[str, float]:
    """The tolerances that were set."""
    from phoneready.evaluation.gate import TOLERANCES

    return {name: given[name] for name in TOLERANCES if given[name] is not None}


def _settings(given: dict[str, Any]) -> EvaluationSettings:
    from cfsp.evaluation import CHECK_PROMPTS
    from cfsp.evaluation.tasks import TaskSettings
    from cfsp.text.tokens import BUILTIN_TEXT
    from phoneready.evaluation.record import EvaluationSettings
    from phoneready.evaluation.run import check_texts, read_prompts

    text = given["text"] or ([] if given["chats"] or given["no_text"] else [BUILTIN_TEXT])
    prompts = () if given["no_prompts"] else CHECK_PROMPTS
    settings = EvaluationSettings(
        text=text_references(text),
        chats=text_references(given["chats"] or []),
        seqlen=given["seqlen"],
        max_windows=given["windows"],
        prompts=read_prompts(given["prompts"]) if given["prompts"] else prompts,
        max_new_tokens=given["max_new_tokens"],
        seed=given["seed"],
        tasks=TaskSettings(
            split_names(given["tasks"] or []), given["task_data"], given["limit"], given["num_fewshot"]
        ),
        metrics=split_names(given["metric"] or []),
    )
    check_texts(settings)
    return settings


def _evaluate(given: dict[str, Any], settings: EvaluationSettings, opening: OpenSettings) -> None:
    from cfsp.records import read_record, record_to_json, write_record
    from phoneready.evaluation.gate import check_gate, check_limits, compare_with_baseline, gate_to_json
    from phoneready.evaluation.record import Evaluation

    limits = _limits(given)
    check_limits(limits)
    earlier = read_record(Evaluation, given["baseline"]) if given["baseline"] else None
    result = _judge(given, settings, opening)
    if given["save"]:
        write_record(given["save"], result)
    rows: tuple[GateRow, ...] = ()
    if earlier:
        rows = compare_with_baseline(result, earlier, limits, where=given["baseline"])
    payload = record_to_json(result) | ({"gate": gate_to_json(rows)} if earlier else {})
    write_result(_report(result, settings, rows), payload, as_json=given["json"])
    check_gate(rows)


def _judge(given: dict[str, Any], settings: EvaluationSettings, opening: OpenSettings) -> Evaluation:
    from contextlib import ExitStack

    from phoneready.evaluation.models import open_language_model, runtime_for
    from phoneready.evaluation.run import evaluate as judge

    chosen = runtime_for(given["model"], given["runtime"])
    with show_progress() as progress, ExitStack() as stack:
        opened = open_language_model(given["model"], chosen, opening, progress=progress)
        model = stack.enter_context(opened)
        dense = None
        if given["against"]:
            # A model in torch is compared with one in torch: the file's own runtime would add its rounding.
            other = runtime_for(given["against"], "torch" if chosen == "torch" else None)
            opened = open_language_model(given["against"], other, opening, progress=progress)
            dense = stack.enter_context(opened)
        return judge(model, dense, settings, progress=progress)


def _report(result: Evaluation, settings: EvaluationSettings, rows: tuple[GateRow, ...]) -> str:
    from phoneready.evaluation.gate import format_gate
    from phoneready.evaluation.tables import format_answers, format_evaluation, format_figures

    parts = []
    if result.texts:
        parts += [format_evaluation(result)]
        parts += [f"Windows of {settings.seqlen} tokens, each without context before it.\n"]
    parts += [format_figures(result), format_answers(result, ("reference", "model"))]
    parts += [format_gate(rows)] if rows else []
    return "\n".join(part for part in parts if part)


def _sweep(given: dict[str, Any], settings: EvaluationSettings, opening: OpenSettings) -> None:
    from cfsp.records import record_to_json, write_record
    from phoneready.evaluation.sweep import format_sweep, write_csv

    result = _run_sweep(given, settings, opening)
    if given["save"]:
        write_record(given["save"], result)
    if given["csv"]:
        write_csv(given["csv"], result)
    write_result(format_sweep(result), record_to_json(result), as_json=given["json"])


def _run_sweep(given: dict[str, Any], settings: EvaluationSettings, opening: OpenSettings) -> Sweep:
    from cfsp.models.reference import load_model
    from cfsp.pruning.settings import PruneSettings
    from cfsp.text.calibration import SELF, load_calibration
    from phoneready.evaluation.sweep import check_ratios, sweep

    prune = PruneSettings() if given["align"] is None else PruneSettings(align=given["align"])
    ratios = check_ratios(_numbers(given["ratios"]), prune)
    with show_progress() as progress:
        loaded = load_model(given["model"], trust_remote_code=opening.trust_remote_code, progress=progress)
        drawn = load_calibration(
            text_references(given["calibration"] or [SELF]),
            loaded,
            nsamples=given["nsamples"],
            seqlen=given["calibration_seqlen"],
            seed=given["calibration_seed"],
            progress=progress,
        )
        return sweep(loaded, drawn, ratios, prune, settings, progress=progress)


def _numbers(values: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(name) for name in split_names(values))
    except ValueError:
        raise InputError(
            "not a list of numbers", field="--ratios", value=",".join(values), allowed="such as 0.1,0.2"
        ) from None
