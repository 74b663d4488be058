"""`phoneready eval`: judge a model, by itself, against another one, or against a baseline."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cfsp.errors import InputError
from cfsp.evaluation.task_results import READS
from cfsp.files import record_head, refuse_existing
from cfsp.records import read_record, record_to_json, write_record
from cfsp.settings import DEVICE, DTYPE, THREADS, Settings, as_read, declared, setting
from cfsp.text.settings import BUILTIN_TEXT
from exporters.families import FAMILIES
from exporters.gguf.quants import DEFAULT_CACHE, MEASURED_CACHES, PARITY_CACHE
from phoneready.commands.options import JsonOption, ModelArgument
from phoneready.console import prepare_torch, show_progress, warn, write_result
from phoneready.evaluation.models import (
    HERE,
    PLACES,
    TORCH,
    OpenSettings,
    RemoteLanguageModel,
    check_place,
    open_language_model,
    own_cache,
    runtime_for,
)
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.figures.figures import TOLERANCES, BudgetVerdict
from runtime_bench.workload import BenchSettings

if TYPE_CHECKING:
    from cfsp.progress import Progress
    from phoneready.evaluation.evaluation_record import Evaluation

NONE = "none"
"""In place of texts or prompts: measured on none."""
_RECORD = record_head("evaluation")
"""How a file begins that --save may replace: one that it made."""
_RUNTIMES = ", ".join(family.runtime for family in FAMILIES.values())
_CLAIMS = ", ".join(f"{family.runtime} for {family.title}" for family in FAMILIES.values())
_BENCH = {row.name: row.setting for row in declared(BenchSettings)}
_DEFAULTS = ", ".join(f"{name}={value:g}" for name, value in TOLERANCES.items())


@dataclass(frozen=True)
class GateOptions(Settings):
    """What the judgement is compared with."""

    save: Path | None = setting(None, "Write the result to this file, as --baseline reads it.")
    baseline: Path | None = setting(
        None, "Compare with this earlier result; exit 1 if a figure got worse, 3 if that cannot be told."
    )
    tolerance: tuple[str, ...] = setting(
        (), "With --baseline: how much worse a figure may be.", metavar="KEY=VALUE", shown=_DEFAULTS
    )


@dataclass(frozen=True)
class RunOptions(Settings):
    """What runs the models, and how."""

    against: str | None = setting(None, "Reference model, usually the dense one.", metavar="MODEL")
    runtime: str | None = setting(
        None,
        f"What runs MODEL: torch (a .gguf file is dequantized), {_RUNTIMES}.",
        shown=f"{_CLAIMS}, else torch",
    )
    cache_type: str | None = setting(
        None,
        f"Type of keys and values of a GGUF file. Without --against the reference is the file with {DEFAULT_CACHE}.",
        choices=MEASURED_CACHES,
        metavar="TYPE",
        shown=PARITY_CACHE,
        rare=True,
    )
    on: str = setting(
        HERE, f"Where MODEL reads texts, does its tasks and writes its answers: {PLACES}.", metavar="TARGET"
    )
    backend: str | None = setting(None, _BENCH["backend"])
    device: Annotated[str, DEVICE] = "auto"
    dtype: Annotated[str, DTYPE] = "auto"
    threads: Annotated[int | None, THREADS] = None


def evaluate(
    model: ModelArgument,
    settings: EvaluationSettings,
    gate: GateOptions,
    run: RunOptions,
    json: JsonOption = False,
) -> None:
    """Measure perplexity, divergence (--against), tasks and answers; compare the result with a baseline.

    Every figure is printed with its text and its number of tokens: without these it means nothing.
    """
    from phoneready.evaluation.figures import compare_with_baseline, evaluation_figures, read_tolerances
    from phoneready.figures.gate import check_verdicts, verdict_rows

    limits = read_tolerances(gate.tolerance)
    no_text, texts = (
        NONE in settings.text,
        tuple(one for one in (*settings.text, *settings.chats) if one != NONE),
    )
    replaced = gate.save and gate.baseline and gate.save.resolve() == gate.baseline.resolve()
    for contradiction, refusal in (
        (gate.tolerance and gate.baseline is None, "--tolerance is of the gate: give --baseline too"),
        (replaced, "--save would overwrite the --baseline that is compared with: name another file"),
        (no_text and texts, "--text none with another text, or with --chats: give one of the two"),
        (NONE in settings.prompts[1:], "--prompts none with another: give one of the two"),
    ):
        if contradiction:
            raise InputError(refusal)
    settings, unread = as_read(settings, READS)
    warnings = unread
    warn(warnings)
    if gate.save is not None:
        refuse_existing(gate.save, force=True, like=_RECORD)
    prepare_torch(run.threads)
    from cfsp.devices import find_device
    from cfsp.evaluation.language_model import CHECK_PROMPTS
    from phoneready.evaluation.evaluation_record import Evaluation
    from phoneready.evaluation.run import check_texts
    from phoneready.evaluation.tables import evaluation_text

    prompts = () if NONE in settings.prompts else _questions(settings.prompts) or CHECK_PROMPTS
    text = () if no_text else settings.text
    if not texts and not no_text and run.on == HERE:
        text = (BUILTIN_TEXT,)
    settings = replace(settings, prompts=prompts, text=text)
    check_texts(settings)
    check_place(run.on, run.backend, settings)
    earlier = read_record(Evaluation, gate.baseline) if gate.baseline else None
    longest = settings.seqlen if settings.text or settings.chats else 1
    device = find_device(run.device)
    opening = OpenSettings(longest, run.threads, device, run.cache_type, run.dtype)
    with show_progress() as progress:
        judged = _judge(model, run, settings, opening, progress)
    result = replace(judged, warnings=warnings)
    if gate.save:
        write_record(gate.save, result)
    verdicts: tuple[BudgetVerdict, ...] = ()
    if earlier and gate.baseline:
        verdicts = compare_with_baseline(result, earlier, limits, where=gate.baseline)
    figures = [asdict(one) for one in evaluation_figures("model", model, result)]
    payload = record_to_json(result) | {"figures": figures}
    payload |= {"gate": [asdict(one) for one in verdicts]} if earlier else {}
    parts = (evaluation_text(result, settings.seqlen), verdict_rows(verdicts))
    write_result("\n".join(part for part in parts if part), payload, as_json=json)
    check_verdicts(verdicts, "limits of the baseline")


def _questions(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Questions as they stand; those of a file of them in its place."""
    from phoneready.evaluation.run import read_prompts

    files = (" " not in one and (one.endswith((".txt", ".jsonl")) or Path(one).is_file()) for one in prompts)
    return tuple(
        question
        for one, is_file in zip(prompts, files, strict=True)
        for question in (read_prompts(Path(one)) if is_file else (one,))
    )


def _judge(
    model: str,
    run: RunOptions,
    settings: EvaluationSettings,
    opening: OpenSettings,
    progress: Progress,
) -> Evaluation:
    """Open the model, with the runtime that is asked for, and its reference, and judge."""
    from cfsp.devices import find_device
    from phoneready.evaluation.run import evaluate as judge
    from phoneready.room import check_room, judging_needs
    from phoneready.text import WRITERS

    against, chosen = run.against, runtime_for(model, run.runtime)
    own = own_cache(chosen)
    of_reference = replace(opening, cache_type=None)
    if against is None and run.on == HERE and opening.cache_type not in (None, own):
        against, of_reference = model, replace(opening, cache_type=own)
    # A model in torch is compared with one in torch: the file's own runtime would add its rounding.
    other = runtime_for(against, TORCH if chosen == TORCH else None) if against else None
    with ExitStack() as stack:
        if run.on == HERE:
            pairs = [(model, chosen), *([(against, other)] if against and other else [])]
            needs = partial(
                judging_needs, seqlen=opening.seqlen, few_bits=tuple(runtime != TORCH for _, runtime in pairs)
            )
            names = [name for name, _ in pairs]
            check_room(
                "eval", names, needs, device=find_device(run.device), kept=run.dtype, progress=progress
            )
        opened = open_language_model(
            model, chosen, opening, on=run.on, backend=run.backend, progress=progress
        )
        judged = stack.enter_context(opened)
        dense = None
        if against and other:
            dense = stack.enter_context(open_language_model(against, other, of_reference, progress=progress))
        result = judge(judged, dense, settings, writers=WRITERS, progress=progress)
        return replace(result, place=judged.place) if isinstance(judged, RemoteLanguageModel) else result
