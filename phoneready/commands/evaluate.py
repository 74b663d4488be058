"""`phoneready eval`: judge a model, alone or against another one, a baseline, or its own pruned versions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfsp.errors import InputError
from cfsp.files import record_head, refuse_existing, write_text
from cfsp.progress import Progress
from cfsp.pruning.settings import ALIGN, DEFAULT_ALIGN, PruneSettings
from cfsp.records import read_record, record_to_json, write_record
from cfsp.settings import SEED, Settings, as_read, declared, no_effect, setting
from cfsp.text.settings import BUILTIN_TEXT, CalibrationSettings
from exporters.families import FAMILIES
from exporters.gguf.cache_types import DEFAULT_CACHE, MEASURED_CACHES, PARITY_CACHE
from phoneready.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    Renamed,
    ThreadsOption,
    TrustOption,
    given_options,
)
from phoneready.console import prepare_torch, show_progress, warn, write_result
from phoneready.evaluation.places import READS as PLACE_READS
from phoneready.evaluation.places import PlaceSettings, check_place, open_elsewhere
from phoneready.evaluation.settings import READS, EvaluationSettings
from phoneready.figures.metrics import TOLERANCES

if TYPE_CHECKING:
    from phoneready.evaluation.evaluation_record import Evaluation
    from phoneready.evaluation.gate import GateRow
    from phoneready.evaluation.models import OpenSettings


_RECORD, _TABLE = record_head("evaluation", "evaluation_sweep"), re.compile(rb"\Aprune ratio,")
"""How a file begins that --save and --csv may replace: one that they made."""


_RUNTIMES = ", ".join(family.runtime for family in FAMILIES.values())
_CLAIMS = ", ".join(f"{family.runtime} for {family.title}" for family in FAMILIES.values())


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
    """What the judgement is held against."""

    save: Path | None = setting(None, "Write the result to this file, as --baseline reads it.")
    baseline: Path | None = setting(
        None, "Compare with this earlier result; exit 1 where a figure got worse."
    )


_TOLERANCES = make_dataclass(
    "_TOLERANCES",
    [
        (name, float | None, setting(None, f"Gate: {row.help}", ge=0, shown=f"{row.default:g}"))
        for name, row in TOLERANCES.items()
    ],
    bases=(Settings,),
    frozen=True,
)


class Tolerances(_TOLERANCES):  # type: ignore[misc, valid-type]  # its fields are the rows of TOLERANCES
    """By how much each figure may be worse than the baseline's."""

    @property
    def limits(self) -> dict[str, float]:
        """Those that were set."""
        return {name: value for name in TOLERANCES if (value := getattr(self, name)) is not None}


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
    align: int = setting(DEFAULT_ALIGN, replace(ALIGN, help="Sweep: widths are multiples of this."))


_OF_SWEEPS = (
    "calibration_seed",
    "align",
    *(f"calibration_{row.name}" for row in declared(CalibrationSettings)),
)


def evaluate(
    context: typer.Context,
    model: ModelArgument,
    settings: EvaluationSettings,
    questions: QuestionOptions,
    gate: GateOptions,
    tolerances: Tolerances,
    sweep: SweepOptions,
    place: PlaceSettings,
    calibration: Annotated[CalibrationSettings, Renamed("Sweep: ", {"seqlen": "--calibration-seqlen"})],
    against: str | None = setting(None, "Reference model, usually the dense one.", metavar="MODEL"),
    runtime: str | None = setting(
        None,
        f"What runs MODEL: torch (a .gguf file is dequantized), {_RUNTIMES}.",
        shown=f"{_CLAIMS}, else torch",
    ),
    cache_type: str | None = setting(
        None,
        f"Type of keys and values of a GGUF file. Without --against the reference is the file with {DEFAULT_CACHE}.",
        choices=MEASURED_CACHES,
        metavar="TYPE",
        shown=PARITY_CACHE,
    ),
    trust_remote_code: TrustOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure perplexity, divergence (--against), tasks and answers; hold the result against a baseline.

    Every figure is printed with its text and its number of tokens: without these it means nothing.
    """
    elsewhere = None if place.is_here else place.on
    subject = {"--against": against, "--runtime": runtime, "--cache-type": cache_type, "--on": elsewhere}
    _check(settings, questions, gate, tolerances, sweep, subject)
    settings, unread = as_read(settings, READS)
    place, untaken = as_read(place, PLACE_READS, (place.on,))
    unswept = () if sweep.ratios else given_options(context, _OF_SWEEPS)
    warnings = (*unread, *untaken, *(no_effect(name, "without --ratios") for name in unswept))
    warn(warnings)
    for path, like in ((gate.save, _RECORD), (sweep.csv, _TABLE)):
        if path is not None:
            refuse_existing(path, force=True, like=like)
    prepare_torch(threads)
    from cfsp.devices import find_device
    from phoneready.evaluation.models import OpenSettings

    settings = _settings(settings, replace(questions, no_text=True) if elsewhere else questions)
    check_place(place, settings)
    longest = settings.seqlen if settings.text or settings.chats else 1
    opening = OpenSettings(longest, trust_remote_code, threads, find_device(device), cache_type, dtype)
    if sweep.ratios:
        _sweep(
            model,
            sweep,
            calibration,
            settings,
            opening,
            save=gate.save,
            warnings=warnings,
            as_json=json,
        )
    else:
        _evaluate(
            model,
            against,
            runtime,
            settings,
            opening,
            place,
            gate,
            tolerances.limits,
            warnings=warnings,
            as_json=json,
        )


def _check(
    settings: EvaluationSettings,
    questions: QuestionOptions,
    gate: GateOptions,
    tolerances: Tolerances,
    sweep: SweepOptions,
    subject: dict[str, str | None],
) -> None:
    """Refuse options that contradict each other, and what could not be done or held."""
    asked = {
        "--prompts": questions.prompts_file is not None,
        "--prompt": bool(settings.prompts),
        "--no-prompts": questions.no_prompts,
    }
    together = [name for name, given in asked.items() if given]
    others = [name for name, given in (subject | {"--baseline": gate.baseline}).items() if given is not None]
    texts = settings.text or settings.chats
    limit = min(tolerances.limits, default="").replace("_", "-")
    replaced = gate.save and gate.baseline and gate.save.resolve() == gate.baseline.resolve()
    wrong = (
        (
            sweep.ratios and others,
            f"--ratios judges MODEL's pruned copies against MODEL: leave out {' and '.join(others)}",
        ),
        (sweep.csv and not sweep.ratios, "--csv is of a sweep's table: give --ratios too"),
        (limit and gate.baseline is None, f"--{limit} is of the gate: give --baseline too"),
        (replaced, "--save would overwrite the --baseline that is compared with: name another file"),
        (settings.sampled and questions.no_prompts, "--sampled is of answers: leave out --no-prompts"),
        (len(together) > 1, f"{' and '.join(together)}: give one of them"),
        (questions.no_text and texts, "--no-text with --text or --chats: give one of the two"),
    )
    for contradiction, refusal in wrong:
        if contradiction:
            raise InputError(refusal)


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
    model: str,
    against: str | None,
    runtime: str | None,
    settings: EvaluationSettings,
    opening: OpenSettings,
    place: PlaceSettings,
    gate: GateOptions,
    limits: Mapping[str, float],
    *,
    warnings: tuple[str, ...],
    as_json: bool,
) -> None:

    from phoneready.evaluation.evaluation_record import Evaluation
    from phoneready.evaluation.far_model import HeldModel
    from phoneready.evaluation.gate import check_gate, compare_with_baseline
    from phoneready.evaluation.models import TORCH, open_language_model, own_cache, runtime_for
    from phoneready.evaluation.run import evaluate as judge
    from phoneready.text import WRITERS

    earlier = read_record(Evaluation, gate.baseline) if gate.baseline else None
    chosen = runtime_for(model, runtime)
    own = own_cache(chosen)
    of_reference = replace(opening, cache_type=None)
    if against is None and place.is_here and opening.cache_type not in (None, own):
        against, of_reference = model, replace(opening, cache_type=own)
    # A model in torch is compared with one in torch: the file's own runtime would add its rounding.
    other = runtime_for(against, TORCH if chosen == TORCH else None) if against else None
    with show_progress() as progress, ExitStack() as stack:
        if place.is_here:
            pairs = [(model, chosen), *([(against, other)] if against and other else [])]
            _foretell(pairs, settings, opening, progress)
            opened = open_language_model(model, chosen, opening, progress=progress)
        else:
            opened = open_elsewhere(model, chosen, place, opening, progress=progress)
        judged = stack.enter_context(opened)
        dense = None
        if against and other:
            dense = stack.enter_context(open_language_model(against, other, of_reference, progress=progress))
        result = judge(judged, dense, settings, writers=WRITERS, progress=progress)
        if isinstance(judged, HeldModel):
            result = replace(result, place=judged.place())
    result = replace(result, warnings=warnings)
    if gate.save:
        write_record(gate.save, result)
    rows: tuple[GateRow, ...] = ()
    if earlier and gate.baseline:
        rows = compare_with_baseline(result, earlier, limits, where=gate.baseline)
    payload = record_to_json(result) | ({"gate": [asdict(row) for row in rows]} if earlier else {})
    write_result(_report(result, settings, rows), payload, as_json=as_json)
    check_gate(rows)


def _foretell(
    runtimes: Sequence[tuple[str, str]],
    settings: EvaluationSettings,
    opening: OpenSettings,
    progress: Progress,
) -> None:
    """Say what the judgement will take of this machine, of models and what runs each."""
    from phoneready.evaluation.models import TORCH
    from phoneready.forecasts.said import Machine, foretell
    from phoneready.forecasts.stages import Judging
    from phoneready.forecasts.texts import judged_windows

    few_bits = tuple(runtime != TORCH for _, runtime in runtimes)
    questions = len(settings.prompts) * settings.n_sets
    asked = Judging(judged_windows(settings), questions, settings.max_new_tokens, few_bits)
    machine = Machine(device=opening.device, kept=opening.dtype)
    foretell("eval", tuple(model for model, _ in runtimes), asked, machine=machine, progress=progress)


def _cache_note(result: Evaluation) -> str | None:
    if result.model.cache_type is None:
        return None
    note = f"Keys and values of {result.model.reference} are in {result.model.cache_type}"
    if result.against is None:
        return f"{note}."
    cache = result.against.cache_type
    return f"{note}, and those of {result.against.reference} {f'in {cache}' if cache else 'as in proofs'}."


def _report(result: Evaluation, settings: EvaluationSettings, rows: tuple[GateRow, ...]) -> str:
    from phoneready.evaluation.gate import gate_table
    from phoneready.evaluation.tables import (
        figure_tables,
        format_answers,
        place_notes,
        text_table,
        vocabulary_note,
    )

    parts = []
    if result.texts:
        parts += [text_table(result).markdown()]
        parts += [f"Windows of {settings.seqlen} tokens, each without context before it.\n"]
        notes = vocabulary_note(result), _cache_note(result)
        parts += [f"{note}\n" for note in notes if note]
    parts += [table.markdown() for table in figure_tables(result)]
    parts += [f"{line}\n" for line in place_notes(result)]
    parts += [format_answers(result)]
    parts += [gate_table(rows).markdown()]
    return "\n".join(part for part in parts if part)


def _sweep(
    model: str,
    options: SweepOptions,
    calibration: CalibrationSettings,
    settings: EvaluationSettings,
    opening: OpenSettings,
    *,
    save: Path | None,
    warnings: tuple[str, ...],
    as_json: bool,
) -> None:
    from cfsp.models.reference import load_model
    from phoneready.evaluation.sweep import check_ratios, sweep, sweep_table
    from phoneready.text import WRITERS, load_calibration

    prune = PruneSettings(align=options.align)
    ratios = check_ratios(options.ratios, prune)
    with show_progress() as progress:
        loaded = load_model(
            model,
            trust_remote_code=opening.trust_remote_code,
            device=opening.device,
            dtype=opening.dtype,
            may_stream=True,
            progress=progress,
        )
        drawn = load_calibration(
            calibration.calibration,
            loaded,
            nsamples=calibration.nsamples,
            seqlen=calibration.seqlen,
            seed=options.calibration_seed,
            progress=progress,
        )
        result = sweep(loaded, drawn, ratios, prune, settings, writers=WRITERS, progress=progress)
    result = replace(result, warnings=warnings)
    if save:
        write_record(save, result)
    if options.csv:
        write_text(options.csv, sweep_table(result, float).csv())  # for plotting, in full precision
    write_result(sweep_table(result).markdown(), record_to_json(result), as_json=as_json)
