"""The release: from a model reference to proven files, figures, a report and a manifest, stage by stage.

    dense          load the model, draw the calibration windows, keep both
    prune          make a plan, apply it, save the pruned checkpoint
    evaluate       that checkpoint against the dense one on text and chats, answers of both
    export-dense   GGUF files and ONNX folders of the dense model, each held against it
    export         GGUF files and ONNX folders that ship, each held against its checkpoint
    answers        what the exports themselves answer, each in its own runtime
    side-by-side   what all of them lose on the same windows of text
    bench-<target> all of them, in turns, for each target
    decide-<target> more rounds where budgets on speeds are open there

With [recover] a stage `recover` trains after `prune`; in `evaluate-files` those of evaluate.files do tasks, too.
A model of which nothing is removed or trained ships as it is: without `prune` and `export-dense`, judged by itself.
Report and manifest are written from what the stages left, in every run; GGUF files are linked into the folder,
ONNX folders copied.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from cfsp.devices import find_device
from cfsp.errors import InputError, require_extra
from cfsp.evaluation.tasks import needs_harness, tasks_sha256
from cfsp.files import writable_place
from cfsp.models.checkpoint import read_checkpoint_info
from cfsp.models.config_file import read_model_config
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import config_from_gguf
from cfsp.models.reference import config_from_settings, find_model
from cfsp.progress import Progress
from cfsp.recovery.data import check_readable
from cfsp.validation import place_of
from exporters.families import FAMILIES, makes_gguf
from phoneready.evaluation.own_metrics import check_directions, metric_sha256
from phoneready.figures.figures import (
    DENSE,
    SHIPPED,
    FigureSet,
    Verdicts,
    check_same_model,
    read_baseline,
    select,
)
from phoneready.figures.gate import write_verdicts
from phoneready.history import append_entry, entry_of
from phoneready.publish.manifest import ReleaseManifest
from phoneready.publish.publish import publish
from phoneready.release.inputs import check_training, identities, identity, made_with
from phoneready.release.results import (
    bench_settled,
    collect_figures,
    decide_settled,
    disturbed,
    measure_on,
    read_figures,
    stage_figures,
)
from phoneready.release.stages import (
    RUNNING,
    Stage,
    claim_folder,
    explain_stages,
    run_stages,
    stage_folder,
)
from phoneready.release.steps import (
    RECOVERY_STAGE,
    Steps,
    bench_stage,
    decide_stage,
    export_stage,
    made_files,
)
from phoneready.room import (
    Extent,
    Needs,
    check_room,
    drawing_needs,
    exporting_needs,
    judging_needs,
    pruning_needs,
    recovering_needs,
)
from phoneready.settings.release import budget_problems, planned_figures
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.environment import cpu_model
from runtime_bench.targets.table import target_details


def run_release(
    config: ReleaseConfig,
    folder: Path,
    *,
    show: Callable[[str, str], None],
    progress: Callable[[], AbstractContextManager[Progress]],
    threads: int | None = None,
    label: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[ReleaseManifest, Verdicts]:
    """Do what is not done yet; write the verdicts, the reports, manifest.json and the files.

    Raises InputError for what cannot be used, a folder that is not a release's, or a baseline of another model,
    MissingExtraError, and LimitError if an exported file is too far from its checkpoint.
    """
    check_before_work(config, folder)
    baseline = load_baseline(config)
    with claim_folder(folder):
        stages = release_stages(config, folder, threads)
        left = [stage.name for stage in stages]

        def check(stage: str) -> None:
            left.remove(stage)
            told = (f"{len(stages) - len(left)} of {len(stages)}", stage_figures(folder, stage))
            tell("; ".join(filter(None, told)))
            # As soon as the model is known: not after an hour of work.
            if stage == "dense" and baseline is not None and config.baseline is not None:
                source = read_checkpoint_info(stage_folder(folder, stage) / "model").source
                check_same_model(baseline, source.reference, source.sha256, config.baseline.file)

        def shown(stage: str, state: str) -> None:
            show(stage, state)
            if state == RUNNING:
                check_stage_room(config, folder, stage)

        records = run_stages(stages, folder, show=shown, progress=progress, check=check, threads=threads)
        recorded = read_figures(config, folder)
        figures = collect_figures(config, folder, recorded)
        verdicts = write_verdicts(
            config.budgets, folder, figures, baseline, config.baseline.file if config.baseline else None
        )
        manifest = publish(config, folder, recorded, list(records.values()))
        made = ", ".join(manifest.config["quantize"]["to"])
        entry = entry_of(
            figures,
            outcome=verdicts.outcome,
            settings={"prune_ratio": f"{manifest.prune_ratio:g}", "files": made},
            versions=manifest.versions,
            stages=manifest.stages,
            label=label,
        )
        append_entry(folder, entry)
        shutil.rmtree(Steps(config, folder, threads).recovery_work, ignore_errors=True)
        return manifest, verdicts


def fitted(config: ReleaseConfig) -> ReleaseConfig:
    """With sizes that the model's context has room for.

    Raises InputError for one that is stated and longer, and for a budget on a figure that a shorter one leaves out.
    """
    context = None
    with suppress(InputError, OSError):  # what reads the model says why it cannot be read
        path = Path(find_model(config.model.reference).path or "")
        if path.is_file():
            found = config_from_gguf(read_gguf(path))
        else:
            found = config_from_settings(read_model_config(path), str(path))
        context = getattr(found, "max_position_embeddings", None)
    if not context:
        return config
    config = config.fitted(context)
    if problems := [f"{place_of(place)}: {problem}" for place, problem in budget_problems(config)]:
        raise InputError("; ".join(problems))
    return config


def check_stage_room(config: ReleaseConfig, folder: Path, name: str) -> None:
    """Raise InputError if memory, or a disk, has too little room for what a stage needs at least."""
    prune, export, final = config.prune, config.quantize, Steps(config, folder, None).final
    seqlen, kept = prune.seqlen, config.model.dtype
    needs: Callable[[Sequence[Extent]], Needs]
    what, read = "eval", tuple[str, ...](dict.fromkeys((final, "dense")))
    if name == "dense":
        what, read = "prune", ()
        needs = drawing_needs
    elif name == "prune":
        what, read = "prune", ("dense",)
        settings = config.prune_settings()
        needs = functools.partial(pruning_needs, settings=settings, windows=prune.nsamples, seqlen=seqlen)
    elif name == RECOVERY_STAGE and config.recover:
        # Training, and the proof of an export, keep weights in float32 whatever is asked for.
        what, read, kept = "recover", ("prune",), "float32"
        needs = functools.partial(recovering_needs, settings=config.recover)
    elif name in map(export_stage, (SHIPPED, DENSE)):
        what, read, kept = "quantize", (final if name == export_stage(SHIPPED) else "dense",), "float32"
        windows = min(prune.nsamples, export.rounding_windows or prune.nsamples)
        needs = functools.partial(exporting_needs, settings=export, windows=windows, seqlen=seqlen)
    elif name in ("evaluate", "side-by-side", "evaluate-files"):
        few_bits = (name != "evaluate", False)[-len(read) :]
        needs = functools.partial(judging_needs, seqlen=config.evaluate.seqlen, few_bits=few_bits)
    else:
        return
    models = [str(stage_folder(folder, stage) / "model") for stage in read] or [config.model.reference]
    check_room(
        what, models, needs, stage_folder(folder, name), device=find_device(config.model.device), kept=kept
    )


def check_before_work(config: ReleaseConfig, folder: Path) -> None:
    """Find what would end a release after hours of work before anything is done; raises as `run_release`."""
    check_place(config, folder)
    for family in config.quantize.formats:
        FAMILIES[family].require()
    if config.tracking is not None:
        require_extra("mlflow", "track")
    if any(map(needs_harness, config.evaluate.tasks)):
        require_extra("lm_eval", "eval")
    check_directions(config.budgets)
    prune, training, evaluate = config.prune, config.recover, config.evaluate
    if training is not None:
        check_training(training)
    made_files(config.quantize)
    learnt = () if training is None else training.texts
    check_readable((*learnt, *prune.calibration, *prune.vocabulary_text, *evaluate.text, *evaluate.chats))


def check_place(config: ReleaseConfig, folder: Path) -> None:
    """Raise InputError if a folder cannot be written, or lies in the model's own."""
    writable_place(folder)
    model = Path(config.model.reference)
    if model.is_dir() and folder.resolve().is_relative_to(model.resolve()):
        raise InputError("in the model's folder, which each run would change", field="-o", value=str(folder))


def explain_release(config: ReleaseConfig, folder: Path, threads: int | None = None) -> dict[str, str]:
    """For each stage why it would run; nothing for one that is done. Nothing is run or written."""
    check_place(config, folder)
    return explain_stages(release_stages(config, folder, threads), folder)


def load_baseline(config: ReleaseConfig) -> FigureSet | None:
    """The baseline, if there is one; raises InputError if it cannot be read, or lacks a figure of a budget."""
    if config.baseline is None:
        return None
    keys = list(planned_figures(config))
    relative = [budget for budget in config.budgets if budget.relative_to == "baseline"]
    return read_baseline(config.baseline.file, [key for budget in relative for key in select(budget, keys)])


def checkpoint_stages(steps: Steps) -> list[Stage]:
    """Those that make the checkpoint that ships: the dense model, and what is removed of it and trained."""
    config, prune, how = steps.config, steps.config.prune, steps.config.recover

    def dense() -> dict[str, Any]:
        """With what every stage depends on: the model, code and packages."""
        model = config.model.model_dump(mode="json", exclude={"device"})
        return {
            "seed": config.seed,
            "model": model | {"identity": identity(config.model.reference)},
            **made_with(),
            "calibration": identities(prune.calibration),
            "windows": [prune.nsamples, prune.seqlen],
        }

    def pruned() -> dict[str, Any]:
        in_gguf = makes_gguf((*prune.for_quant, *config.quantize.names))
        counted = {"vocabulary_text": identities(prune.vocabulary_text), "in_gguf": in_gguf}
        return dataclasses.asdict(config.prune_settings()) | counted

    def recovered() -> dict[str, Any]:
        assert how is not None
        data = {"data": identities(how.data), "validation": identities(how.validation), "report_to": None}
        return dataclasses.asdict(how.settings(config.seed)) | data

    stages = [Stage("dense", dense, (), steps.dense)]
    if not config.is_whole:
        stages.append(Stage(steps.pruned, pruned, ("dense",), steps.prune))
    if how is not None:
        stages.append(Stage(RECOVERY_STAGE, recovered, ("dense", steps.pruned), steps.recover))
    return stages


def release_stages(config: ReleaseConfig, folder: Path, threads: int | None = None) -> list[Stage]:
    """The stages in order, with everything that their results depend on."""
    steps = Steps(config, folder, threads)
    exports = tuple(map(export_stage, steps.roles))
    evaluate, bench, final = config.evaluate, config.bench, steps.final
    texts = {"text": evaluate.text, "chats": evaluate.chats}

    def judged() -> dict[str, Any]:
        settings = _without(evaluate, "files", "task_data")
        settings |= {name: identities(references) for name, references in texts.items()}
        settings["tasks"] = [[name, tasks_sha256(name, evaluate.task_data)] for name in evaluate.tasks]
        if evaluate.task_data is not None:
            settings["task_data"] = identity(str(evaluate.task_data))
        settings["metrics"] = [[name, metric_sha256(name)] for name in evaluate.metrics]
        return settings | {"prompts": list(steps.prompts)}

    def exported() -> dict[str, Any]:
        taken = {name: one.record.sha256 for name, one in made_files(config.quantize).items()}
        return dataclasses.asdict(config.quantize) | {"made": taken}

    def asked() -> dict[str, Any]:
        return {"prompts": list(steps.prompts), "max_new_tokens": evaluate.max_new_tokens}

    def side_by_side() -> dict[str, Any]:
        windows = {"windows": [evaluate.seqlen, evaluate.max_windows]}
        return windows | {name: identities(references) for name, references in texts.items()}

    def measured(place: str) -> dict[str, Any]:
        # Other places and devices change nothing here.
        shared = _without(bench, "targets", "devices", "n_ctx", "anchor", "decide_s")
        if bench.anchor:
            shared["anchor"] = identity(bench.anchor)
        return shared | {"target": place, "details": target_details(place), "cpu": cpu_model()}

    def decided(place: str) -> dict[str, Any]:
        budgets = config.speed_budgets(place)
        limits: dict[str, Any] = {"budgets": [one.model_dump(mode="json") for one in budgets]}
        if config.baseline and any(one.relative_to == "baseline" for one in budgets):
            limits["baseline"] = identity(str(config.baseline.file))
        return limits | {"decide_s": bench.decide_s}

    def decide(place: str, output: Path, progress: Progress) -> None:
        measure_on(steps, place, load_baseline(config), output, progress)

    def settled(judge: Callable[..., bool], place: str, output: Path) -> bool:
        try:
            return judge(steps, place, load_baseline(config), output)
        except InputError:
            return True  # what it measured is to be made again before it is asked once more

    stages, checkpoints = checkpoint_stages(steps), tuple(dict.fromkeys(("dense", final)))
    stages += [
        Stage("evaluate", judged, checkpoints, steps.evaluate),
        *(
            Stage(
                export_stage(role),
                exported,
                ("dense" if role == DENSE else final,),
                functools.partial(steps.export, role),
                resumes=True,
                rows=("to",),
            )
            for role in steps.roles
        ),
        Stage("answers", asked, exports, steps.answers, resumes=True),
    ]
    if evaluate.text or evaluate.chats:
        before = (*checkpoints, *exports)
        stages.append(Stage("side-by-side", side_by_side, before, steps.side_by_side, resumes=True))
    if evaluate.judges_files:
        measured_texts = ("side-by-side",) if evaluate.text or evaluate.chats else ()
        before = ("dense", export_stage(SHIPPED), *measured_texts)
        stages.append(
            Stage(
                "evaluate-files",
                lambda: judged() | {"files": list(evaluate.files)},
                before,
                steps.evaluate_files,
                resumes=True,
                rows=("files",),
            )
        )
    if bench.anchor and not Path(bench.anchor).is_file():
        raise InputError("no such file", field="bench.anchor", value=bench.anchor)
    for place in bench.targets:
        name, at = bench_stage(place), functools.partial
        run = at(steps.bench, place, at(disturbed, steps, place, load_baseline(config)))
        is_done = at(settled, bench_settled, place)
        stages.append(Stage(name, at(measured, place), exports, run, is_done, resumes=True, rows=("files",)))
        if config.speed_budgets(place):
            after, run, is_done = (name, *exports), at(decide, place), at(settled, decide_settled, place)
            stages.append(Stage(decide_stage(place), at(decided, place), after, run, is_done, resumes=True))
    return stages


def _without(section: Any, *names: str) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(section).items() if key not in names}
