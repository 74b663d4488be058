"""`phoneready prune`: a dense model in, a pruned checkpoint out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cfsp.errors import InputError
from cfsp.files import record_head, refuse_existing
from cfsp.pruning.settings import READS
from cfsp.records import read_record, record_to_json, write_record
from cfsp.settings import as_read, declared, setting
from cfsp.text.settings import CalibrationSettings
from exporters.families import DEFAULT_FORMAT, required_multiple
from phoneready.commands.options import (
    DeviceOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    ThreadsOption,
    TrustOption,
    given_options,
    was_given,
)
from phoneready.commands.processes import note_once, shared_passes
from phoneready.console import prepare_torch, warn, write_result
from phoneready.settings.schema import COUNTED, PruneConfig

if TYPE_CHECKING:
    from cfsp.models.source import LoadedModel
    from cfsp.progress import Progress
    from cfsp.pruning.axes.parts import Removal
    from cfsp.pruning.plan import PruningPlan
    from cfsp.pruning.prune import Planned, PruneResult
    from cfsp.pruning.settings import PruneSettings
    from cfsp.text.calibration import Calibration
    from phoneready.forecasts.said import Machine
    from phoneready.forecasts.stages import Pruning


_BESIDE_PLAN = {
    "prune_ratio",
    "for_quant",
    "dtype",
    "weights_dtype",
    *(row.name for row in declared(CalibrationSettings)),
}
"""What is read where a plan is applied: the rest is as the plan says."""


@dataclass(frozen=True)
class PruneOptions(PruneConfig):
    """How to prune, and what weights are kept in meanwhile."""

    dtype: str = setting(
        "auto",
        "Of matrix products over the calibration text and of the weights in memory: auto, float32, bfloat16 or "
        "float16, which is of weights alone (products are float32 then).",
        choices="cfsp.precision:DTYPES",
    )
    weights_dtype: str | None = setting(
        None,
        "Of the weights alone, and --dtype of products.",
        choices="cfsp.precision:DTYPES",
        shown="--dtype",
    )

    @property
    def kept(self) -> str:
        """What weights are kept in."""
        return self.weights_dtype or self.dtype

    @property
    def products(self) -> str:
        """What goes into products, of which none is float16."""
        return "float32" if self.dtype == "float16" else self.dtype

    def settings(self, align: int) -> PruneSettings:
        """See `PruneConfig`."""
        return replace(super().settings(align), dtype=self.products)


def prune(
    context: typer.Context,
    model: ModelArgument,
    settings: PruneOptions,
    output: Path | None = setting(None, "Checkpoint folder to create.", option="-o --output"),
    seed: SeedOption = 0,
    plan: Path | None = setting(None, "Apply this plan; --prune-ratio re-allocates it."),
    plan_only: Path | None = setting(None, "Write the plan to this file and change no model."),
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Remove FFN channels with CFSP and solve down_proj anew for what is left; other options remove more.

    The result is a Hugging Face folder that transformers loads, with the plan and where it came from inside. `torchrun
    --standalone --nproc_per_node 2 -m phoneready prune ...` shares the calibration text among two processes.
    """
    wanted = _output(output, plan, plan_only, settings)
    inputs = [Path(name) for name in (model, plan, *settings.calibration, *settings.vocabulary_text) if name]
    like = record_head("pruning_plan") if plan_only else None
    refuse_existing(wanted, force=force, inputs=inputs, like=like)
    prepare_torch(threads)
    from cfsp.devices import find_device
    from cfsp.models.reference import load_model
    from cfsp.pruning.prune import plan_model, prune_model
    from phoneready.forecasts.said import Machine
    from phoneready.release.pruning_budget import fitting_settings, shape_check

    settings, chosen, warnings = _chosen(context, settings, plan)
    warn(warnings, note_once)
    ready, references = _given_plan(context, plan, settings)
    with shared_passes(wanted, device) as (writes, progress):
        where, how = find_device(device), ready.settings if ready else chosen
        if writes:
            shown = _asked(settings, how, ready, only_plan=plan_only is not None)
            _foretell(model, output, shown, references, Machine(how.dtype, where, settings.kept), progress)
        loaded = load_model(
            model,
            trust_remote_code=trust_remote_code,
            device=where,
            dtype=settings.kept,
            may_stream=True,
            progress=progress,
        )
        chosen = chosen if ready else fitting_settings(settings, chosen, loaded.model)
        check = shape_check(settings, chosen, loaded.model)
        drawn = _drawn(references, loaded, settings, seed, progress)
        asked: dict[str, Any] = {"counted": settings.vocabulary_text, "check": check}
        asked["progress"] = progress
        made = (
            plan_model(loaded, drawn, chosen, **asked, only_plan=True)
            if plan_only
            else prune_model(loaded, drawn, chosen, plan=ready, **asked)
        )
        if writes:
            decided = replace(made.plan, warnings=(*made.plan.warnings, *warnings))
            _keep(made, decided, wanted, seed=seed, force=force, progress=progress)
            write_result(format_plan(decided, wanted), _summary(decided), as_json=json)


def _drawn(
    references: Sequence[str], loaded: LoadedModel, settings: PruneConfig, seed: int, progress: Progress
) -> Calibration:
    """The calibration windows, of several processes the same in each."""
    from cfsp.processes import first_ahead, require_alike
    from phoneready.text import load_calibration

    with first_ahead():
        drawn = load_calibration(
            references,
            loaded,
            nsamples=settings.nsamples,
            seqlen=settings.seqlen,
            seed=seed,
            progress=progress,
        )
    require_alike(drawn.sha256, "calibration text")
    return drawn


def _asked(
    settings: PruneConfig, chosen: PruneSettings, plan: PruningPlan | None, *, only_plan: bool
) -> Pruning:
    """What a forecast reads of it."""
    from cfsp.processes import count
    from phoneready.forecasts.stages import Pruning, Windows

    shared = Windows(math.ceil(settings.nsamples / count()), settings.seqlen)
    return Pruning(chosen, shared, only_plan=only_plan, has_plan=plan is not None)


def _foretell(
    model: str,
    output: Path | None,
    asked: Pruning,
    text: Sequence[str],
    machine: Machine,
    progress: Progress,
) -> None:
    from phoneready.forecasts.said import foretell

    foretell(
        "prune",
        (model,),
        asked,
        output,
        text=text,
        machine=machine,
        tell=note_once,
        progress=progress,
    )


def _keep(
    made: PruneResult | Planned,
    plan: PruningPlan,
    output: Path,
    *,
    seed: int,
    force: bool,
    progress: Progress,
) -> None:
    """Write the checkpoint, or the plan where there is no more."""
    from cfsp.models.checkpoint import save_checkpoint
    from cfsp.pruning.prune import Planned

    if isinstance(made, Planned):
        write_record(output, plan)
        return
    save_checkpoint(
        made.loaded,
        output,
        plan=plan,
        input_moments=made.input_moments,
        seed=seed,
        force=force,
        progress=progress,
    )


def format_plan(plan: PruningPlan, destination: Path) -> str:
    """What was removed, in words."""
    widths = plan.shape.ffn_widths
    removed = 1 - plan.keep_ratio
    lines = [
        f"Removed {removed:.2%} of the FFN channels ({plan.settings.prune_ratio:.2%} asked); "
        f"{len(widths)} blocks of {min(widths)} to {max(widths)} channels, "
        f"multiples of {plan.settings.align}.",
        f"Widths: {', '.join(map(str, widths))}",
        *_removal_lines("Blocks", plan.depth),
        *_removal_lines(
            "Attentions, with these blocks gone," if plan.depth else "Attentions", plan.attention
        ),
        *_group_lines(plan),
        *_vocabulary_lines(plan),
        f"Calibration: {', '.join(plan.calibration)}, {plan.calibration_tokens} tokens, seed {plan.seed}.",
        f"Written to {destination}.",
    ]
    return "\n".join(lines)


def _removal_lines(what: str, removal: Removal | None) -> list[str]:
    if removal is None:
        return []
    alone = ", ".join(f"{index} ({removal.losses[index]:.3f} alone)" for index in removal.removed)
    return [
        f"{what} removed: {alone}; without them, and before anything makes up for it, the divergence is "
        f"{removal.loss:.3f} nats a token on {removal.tokens} tokens."
    ]


def _group_lines(plan: PruningPlan) -> list[str]:
    if (groups := plan.kv_groups) is None:
        return []
    removed, total = groups.removed
    return [
        f"KV groups kept: {groups} ({removed} of {total} removed); without the others, and before anything makes up "
        f"for it, the divergence is {groups.loss:.3f} nats a token on {groups.tokens} tokens."
    ]


def _vocabulary_lines(plan: PruningPlan) -> list[str]:
    if (kept := plan.vocabulary) is None:
        return []
    return [
        f"Vocabulary: {len(kept.kept)} of {kept.dense_size} rows kept, counted on {kept.counted_tokens} tokens of "
        f"{', '.join(kept.sources)}, which become {kept.growth:.4f} times as many.",
        *(
            f"  {kind.name}: {kind.kept} of {kind.tokens}, {kind.share:.2%} of the text"
            for kind in kept.by_script
        ),
    ]


def _summary(plan: PruningPlan) -> dict[str, Any]:
    """The plan's record without rankings and tokens, which are long and stand in the plan file."""

    record = record_to_json(plan)
    if plan.vocabulary:
        hidden = ("kept", "counts")
        record["vocabulary"] = {k: v for k, v in record["vocabulary"].items() if k not in hidden}
    record["blocks"] = [{k: v for k, v in block.items() if k != "ranking"} for block in record["blocks"]]
    return record | {"keep_ratio": plan.keep_ratio}


def _output(output: Path | None, plan: Path | None, plan_only: Path | None, settings: PruneConfig) -> Path:
    """What is to be made: a checkpoint, or a plan alone."""
    if (wanted := output or plan_only) is None or (output and plan_only):
        raise InputError("give one of -o DIR (a pruned checkpoint) and --plan-only FILE (the plan alone)")
    if plan is not None and plan_only is not None:
        raise InputError("--plan applies a plan and --plan-only makes one: give one of the two")
    return wanted


def _chosen(
    context: typer.Context, settings: PruneOptions, plan: Path | None
) -> tuple[PruneOptions, PruneSettings, tuple[str, ...]]:
    """What is asked for, and how to prune without a plan, both as they are read; and a warning for what is not.

    Raises:
        InputError: What a plan has decided is asked for beside one.
    """
    decided = {row.name for row in declared(PruneOptions)} - _BESIDE_PLAN
    if plan is not None and (given := given_options(context, decided)):
        raise InputError("decided by the plan", field=given[0], allowed="without --plan")
    settings, uncounted = as_read(settings, COUNTED, bool(settings.vocabulary))
    chosen = settings.settings(required_multiple(settings.for_quant or (DEFAULT_FORMAT,)))
    chosen, unread = as_read(chosen, READS)
    return settings, chosen, (*uncounted, *unread)


def _given_plan(
    context: typer.Context, path: Path | None, settings: PruneOptions
) -> tuple[PruningPlan | None, tuple[str, ...]]:
    """A plan that was made before, and its calibration text unless another is given; else the settings' text alone."""
    plan = _read_plan(path, settings.prune_ratio if was_given(context, "prune_ratio") else None)
    if plan is None:
        return None, settings.calibration
    if was_given(context, "dtype"):
        plan = replace(plan, settings=replace(plan.settings, dtype=settings.products))
    return plan, settings.calibration if was_given(context, "calibration") else plan.calibration


def _read_plan(path: Path | None, prune_ratio: float | None) -> PruningPlan | None:
    from cfsp.pruning.plan import PruningPlan

    if path is None:
        return None
    plan = read_record(PruningPlan, path)
    return plan if prune_ratio is None else plan.at_ratio(prune_ratio)
