"""`phoneready prune`: a dense model in, a pruned checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfsp.errors import InputError
from cfsp.files import claim_output, record_head, refuse_existing
from phoneready.commands.options import (
    TEXT_HELP,
    DebugOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    ThreadsOption,
    TrustOption,
    split_names,
    text_references,
)
from phoneready.console import prepare_torch, show_progress, write_result

if TYPE_CHECKING:
    from cfsp.models.source import LoadedModel
    from cfsp.progress import Progress
    from cfsp.pruning.plan import PruningPlan
    from cfsp.pruning.settings import PruneSettings
    from cfsp.text.calibration import Calibration


def prune(
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Checkpoint folder to create.", show_default=False)
    ] = None,
    prune_ratio: Annotated[
        float | None,
        typer.Option(
            "--prune-ratio",
            help="Share of FFN channels to remove (not of all parameters), 0 <= ratio < 1.",
            show_default="0.2, or the plan's",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            help=f"Calibration text; repeatable. `self` (sampled from the model), {TEXT_HELP}.",
            metavar="REF",
            show_default="self",
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option("--nsamples", help="Calibration windows.", min=1)] = 128,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens in a calibration window.", min=2)] = 1024,
    seed: SeedOption = 0,
    score: Annotated[
        str | None, typer.Option("--score", help="Importance of a channel inside its block.")
    ] = None,
    coarse: Annotated[
        str | None, typer.Option("--coarse", help="Importance of a block: angular, cosine, mse or mae.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option("--allocation", help="Widths of the blocks: cfsp, loss, mixed or uniform.")
    ] = None,
    coarse_strength: Annotated[
        float | None, typer.Option("--coarse-strength", help="CFSP's a; 1 is the paper's.", min=0)
    ] = None,
    align: Annotated[
        int | None,
        typer.Option("--align", help="Widths are multiples of this.", min=1, show_default="from --for-quant"),
    ] = None,
    for_quant: Annotated[
        list[str], typer.Option("--for-quant", help="Quantizations the widths must fit.", metavar="QUANT,...")
    ] = ["Q4_0"],  # noqa: B006
    uniform: Annotated[bool, typer.Option("--uniform", help="Give every block the same width.")] = False,
    reconstruct: Annotated[
        str | None,
        typer.Option(
            "--reconstruct",
            help="How down_proj is solved anew: block-by-block, one-pass, mean or none.",
            show_default="block-by-block",
        ),
    ] = None,
    ridge: Annotated[
        float | None, typer.Option("--ridge", help="Ridge of that solution.", show_default="0.01")
    ] = None,
    correction: Annotated[
        float | None,
        typer.Option(
            "--correction",
            help="Share of earlier blocks' error that a block takes back, 0 to 1.",
            show_default="0.4",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Of matrix products over the calibration text: auto, float32 or bfloat16.",
            show_default="auto",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Apply this plan; --prune-ratio re-allocates it.")
    ] = None,
    plan_only: Annotated[
        Path | None, typer.Option("--plan-only", help="Write the plan to this file and change no model.")
    ] = None,
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove FFN channels with CFSP and solve down_proj anew for what is left.

    The result is a Hugging Face folder that transformers loads, with the plan and where it came from inside.
    """
    wanted = _output(output, plan, plan_only)
    inputs = [Path(name) for name in (model, plan, *(calibration or [])) if name]
    refuse_existing(
        wanted, force=force, inputs=inputs, like=record_head("pruning_plan") if plan_only else None
    )
    prepare_torch(threads)
    from cfsp.models.reference import load_model
    from cfsp.text.calibration import SELF, load_calibration

    chosen = {"score": score, "coarse_metric": coarse, "allocation": allocation, "strength": coarse_strength}
    chosen |= {"prune_ratio": prune_ratio, "reconstruct": reconstruct, "ridge": ridge}
    settings = _settings(
        chosen | {"correction": correction, "dtype": dtype}, align, for_quant, uniform=uniform
    )
    ready = _read_plan(plan, prune_ratio)
    if ready and dtype:
        ready = replace(ready, settings=replace(ready.settings, dtype=dtype))
    references = text_references(calibration or (ready.calibration if ready else [SELF]))
    with claim_output(wanted), show_progress() as progress:
        loaded = load_model(model, trust_remote_code=trust_remote_code, progress=progress)
        drawn = load_calibration(
            references, loaded, nsamples=nsamples, seqlen=seqlen, seed=seed, progress=progress
        )
        if plan_only:
            result = _only_plan(loaded, drawn, settings, plan_only, progress)
        else:
            assert output is not None  # or else there is plan_only
            result = _prune(loaded, drawn, settings, ready, output, force=force, progress=progress)
    write_result(format_plan(result, output or plan_only), _summary(result), as_json=json)


def format_plan(plan: PruningPlan, destination: Path | None) -> str:
    """What was removed, in words."""
    widths = plan.shape.ffn_widths
    removed = 1 - plan.keep_ratio
    lines = [
        f"Removed {removed:.2%} of the FFN channels ({plan.settings.prune_ratio:.2%} asked); "
        f"{len(widths)} blocks of {min(widths)} to {max(widths)} channels, "
        f"multiples of {plan.settings.align}.",
        f"Widths: {', '.join(map(str, widths))}",
        f"Calibration: {', '.join(plan.calibration)}, {plan.calibration_tokens} tokens, seed {plan.seed}.",
        f"Written to {destination}.",
    ]
    return "\n".join(lines)


def _summary(plan: PruningPlan) -> dict[str, Any]:
    """The plan's record without the rankings, which are long and stand in the plan file."""
    from cfsp.records import record_to_json

    record = record_to_json(plan)
    record["blocks"] = [{k: v for k, v in block.items() if k != "ranking"} for block in record["blocks"]]
    return record | {"keep_ratio": plan.keep_ratio}


def _output(output: Path | None, plan: Path | None, plan_only: Path | None) -> Path:
    """What is to be made: a checkpoint, or a plan alone."""
    if (wanted := output or plan_only) is None or (output and plan_only):
        raise InputError("give one of -o DIR (a pruned checkpoint) and --plan-only FILE (the plan alone)")
    if plan is not None and plan_only is not None:
        raise InputError("--plan applies a plan and --plan-only makes one: give one of the two")
    return wanted


def _settings(
    chosen: dict[str, Any], align: int | None, for_quant: Sequence[str], *, uniform: bool
) -> PruneSettings:
    from cfsp.pruning.settings import PruneSettings, check_settings
    from exporters.gguf import required_multiple

    given = {name: value for name, value in chosen.items() if value is not None}
    multiple = required_multiple(split_names(for_quant)) if align is None else align
    settings = PruneSettings(**given, align=multiple, uniform_width=uniform)
    check_settings(settings)
    return settings


def _read_plan(path: Path | None, prune_ratio: float | None) -> PruningPlan | None:
    from cfsp.pruning.plan import PruningPlan
    from cfsp.records import read_record

    if path is None:
        return None
    plan = read_record(PruningPlan, path)
    return plan if prune_ratio is None else plan.at_ratio(prune_ratio)


def _only_plan(
    loaded: LoadedModel, drawn: Calibration, settings: PruneSettings, path: Path, progress: Progress
) -> PruningPlan:
    from cfsp.pruning.prune import plan_for, statistics_for
    from cfsp.records import write_record

    statistics = statistics_for(loaded.model, drawn, settings, only_plan=True, progress=progress)
    plan = plan_for(loaded, statistics, drawn, settings)
    write_record(path, plan)
    return plan


def _prune(
    loaded: LoadedModel,
    drawn: Calibration,
    settings: PruneSettings,
    plan: PruningPlan | None,
    output: Path,
    *,
    force: bool,
    progress: Progress,
) -> PruningPlan:
    from cfsp.models.checkpoint import save_checkpoint
    from cfsp.pruning.prune import prune_model

    result = prune_model(loaded, drawn, settings, plan=plan, progress=progress)
    save_checkpoint(
        loaded, output, plan=result.plan, input_moments=result.input_moments, seed=drawn.seed, force=force
    )
    return result.plan
