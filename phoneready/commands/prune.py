"""`phoneready prune`: a dense model in, a pruned checkpoint out."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfsp.errors import InputError
from cfsp.files import claim_output, record_head, refuse_existing
from cfsp.pruning.settings import READS
from cfsp.records import read_record, record_to_json, write_record
from cfsp.settings import as_read, declared, setting
from cfsp.text.settings import CalibrationSettings
from exporters.families import DEFAULT_FORMAT, required_multiple
from phoneready.commands.options import ModelArgument, SeedOption, given_options, was_given
from phoneready.console import MakeOptions, prepare_torch, show_progress, warn, write_result
from phoneready.settings.schema import COUNTED, PruneConfig

if TYPE_CHECKING:
    from cfsp.pruning.plan import PruningPlan
    from cfsp.pruning.settings import PruneSettings

_BESIDE_PLAN = {
    "prune_ratio",
    "for_quant",
    "dtype",
    "weights_dtype",
    *(row.name for row in declared(CalibrationSettings)),
}
"""What is read if a plan is applied: the rest is as the plan says."""


@dataclass(frozen=True)
class PruneOptions(PruneConfig):
    """How to prune, and what weights are kept in meanwhile."""

    dtype: str = setting(
        "auto",
        "Of matrix products over the calibration text and of the weights in memory: auto, float32, bfloat16 or "
        "float16, which is of weights alone (products are float32 then).",
        choices="cfsp.precision:DTYPES",
        rare=True,
    )
    weights_dtype: str | None = setting(
        None,
        "Of the weights alone, and `dtype` of products.",
        choices="cfsp.precision:DTYPES",
        shown="as dtype",
        rare=True,
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
    how: MakeOptions,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Checkpoint folder to create; FILE.json: the plan alone.",
            show_default=False,
        ),
    ],
    seed: SeedOption = 0,
    plan: Path | None = setting(None, "Apply this plan; --prune-ratio re-allocates it."),
) -> None:
    """Remove FFN channels with CFSP and solve down_proj anew for what is left; other options remove more.

    The result is a Hugging Face folder that transformers loads, with the plan and where it came from inside.
    """
    plan_only = output.suffix == ".json"
    if plan is not None and plan_only:
        raise InputError("--plan applies a plan and -o FILE.json writes one: name a folder")
    inputs = [Path(name) for name in (model, plan, *settings.calibration, *settings.vocabulary_text) if name]
    like = record_head("pruning_plan") if plan_only else None
    refuse_existing(output, force=how.force, inputs=inputs, like=like)
    prepare_torch(how.threads)
    from cfsp.devices import find_device
    from cfsp.models.checkpoint import save_checkpoint
    from cfsp.models.reference import load_model
    from cfsp.pruning.plan import PruningPlan
    from cfsp.pruning.prune import plan_model, prune_model
    from phoneready.release.steps import fitting_settings, shape_check
    from phoneready.room import check_room, pruning_needs
    from phoneready.text import load_calibration

    decided = {row.name for row in declared(PruneOptions)} - _BESIDE_PLAN
    if plan is not None and (given := given_options(context, decided)):
        raise InputError("decided by the plan", field=given[0], allowed="without --plan")
    settings, uncounted = as_read(settings, COUNTED, bool(settings.vocabulary))
    chosen = settings.settings(required_multiple(settings.for_quant or (DEFAULT_FORMAT,)))
    chosen, unread = as_read(chosen, READS)
    warnings = (*uncounted, *unread)
    warn(warnings)
    ready, references = None, settings.calibration
    if plan is not None:
        ready = read_record(PruningPlan, plan)
        ready = ready.at_ratio(settings.prune_ratio) if was_given(context, "prune_ratio") else ready
        if was_given(context, "dtype"):
            ready = replace(ready, settings=replace(ready.settings, dtype=settings.products))
        references = references if was_given(context, "calibration") else ready.calibration
    if "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("prune runs in one process: start it without torchrun")
    with claim_output(output), show_progress() as progress:
        device = find_device(how.device)
        needs = partial(
            pruning_needs,
            settings=ready.settings if ready else chosen,
            windows=settings.nsamples,
            seqlen=settings.seqlen,
            only_plan=plan_only,
        )
        check_room(
            "prune",
            (model,),
            needs,
            None if plan_only else output,
            device=device,
            kept=settings.kept,
            progress=progress,
        )
        loaded = load_model(
            model,
            device=device,
            dtype=settings.kept,
            may_stream=True,
            progress=progress,
        )
        chosen = chosen if ready else fitting_settings(chosen, loaded.model, settings.for_quant)
        check = shape_check(chosen, loaded.model, settings.for_quant)
        drawn = load_calibration(
            references,
            loaded,
            nsamples=settings.nsamples,
            seqlen=settings.seqlen,
            seed=seed,
            progress=progress,
        )
        also: dict[str, Any] = {"counted": settings.vocabulary_text, "check": check, "progress": progress}
        if plan_only:
            _, _, planned, _ = plan_model(loaded, drawn, chosen, **also, only_plan=True)
        else:
            made = prune_model(loaded, drawn, chosen, plan=ready, **also)
            planned = made.plan
        planned = replace(planned, warnings=(*planned.warnings, *warnings))
        if plan_only:
            write_record(output, planned)
        else:
            moments = made.input_moments
            save_checkpoint(
                made.loaded,
                output,
                plan=planned,
                input_moments=moments,
                seed=seed,
                force=how.force,
                progress=progress,
            )
        # Rankings and tokens are long, and stand in the plan file.
        record = record_to_json(planned)
        if planned.vocabulary:
            hidden = ("kept", "counts")
            record["vocabulary"] = {k: v for k, v in record["vocabulary"].items() if k not in hidden}
        record["blocks"] = [{k: v for k, v in block.items() if k != "ranking"} for block in record["blocks"]]
        write_result(
            format_plan(planned, output), record | {"keep_ratio": planned.keep_ratio}, as_json=how.json
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
        *([str(plan.forecast)] if plan.forecast else []),
    ]
    after = (
        "without {}, and before anything makes up for it, the divergence is {:.3f} nats a token on {} tokens."
    )
    attentions = "Attentions, with these blocks gone," if plan.depth else "Attentions"
    for what, removal in (("Blocks", plan.depth), (attentions, plan.attention)):
        if removal is not None:
            alone = ", ".join(f"{index} ({removal.losses[index]:.3f} alone)" for index in removal.removed)
            lines.append(f"{what} removed: {alone}; " + after.format("them", removal.loss, removal.tokens))
    if (groups := plan.kv_groups) is not None:
        gone, total = groups.removed
        rest = after.format("the others", groups.loss, groups.tokens)
        lines.append(f"KV groups kept: {groups} ({gone} of {total} removed); {rest}")
    if (kept := plan.vocabulary) is not None:
        lines.append(
            f"Vocabulary: {len(kept.kept)} of {kept.dense_size} rows kept, counted on {kept.counted_tokens} tokens of "
            f"{', '.join(kept.sources)}, which become {kept.growth:.4f} times as many."
        )
        for kind in kept.by_script:
            lines.append(f"  {kind.name}: {kind.kept} of {kind.tokens}, {kind.share:.2%} of the text")
    calibration = f"{', '.join(plan.calibration)}, {plan.calibration_tokens} tokens, seed {plan.seed}"
    return "\n".join([*lines, f"Calibration: {calibration}.", f"Written to {destination}."])
