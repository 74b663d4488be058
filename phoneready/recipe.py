"""The release: from a model reference to proven files, figures, a report and a manifest, stage by stage.

    dense          load the model, draw the calibration windows, keep both
    prune          make a plan, apply it, save the pruned checkpoint
    evaluate       pruned against dense on text and chats, answers of both
    export-dense   GGUF files and ONNX folders of the dense model, each held against it
    export-pruned  GGUF files and ONNX folders of the pruned model, each held against it
    answers        what the exports themselves answer, each in its own runtime
    side-by-side   what all of them lose on the same windows of text
    bench-<target> all of them, in turns, for each target
    decide-<target> more rounds where budgets on speeds are open there

With [recover] a stage `recover` trains after `prune`, and with evaluate.files `evaluate-files` judges those exports.
The two exports run beside each other in processes, each with half the threads.
Report and manifest are written from what the stages left, in every run; GGUF files are linked into the folder,
ONNX folders copied.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from cfsp.devices import CPU, find_device
from cfsp.errors import InputError, require_extra
from cfsp.evaluation.tasks import needs_harness, tasks_sha256
from cfsp.files import writable_place
from cfsp.memory import usable_memory
from cfsp.models.checkpoint import read_checkpoint_info
from cfsp.progress import Progress
from exporters.families import FAMILIES, makes_gguf
from phoneready.console import prepare_torch
from phoneready.evaluation.metrics import check_directions, metric_sha256
from phoneready.figures.budgets import select
from phoneready.figures.figure_set import DENSE, PRUNED, FigureSet, check_same_model, read_baseline
from phoneready.figures.gate_files import write_verdicts
from phoneready.figures.verdict import Verdicts
from phoneready.history import append_entry, entry_of
from phoneready.publish.manifest import ReleaseManifest
from phoneready.publish.publish import publish
from phoneready.release.before_work import check_inputs
from phoneready.release.beside import Work
from phoneready.release.collect import collect_figures
from phoneready.release.decide import measure_on
from phoneready.release.dependencies import made_with
from phoneready.release.foretold import foretell_stage
from phoneready.release.identities import identities, identity
from phoneready.release.live import stage_figures
from phoneready.release.results import read_figures
from phoneready.release.stages import (
    RUNNING,
    Stage,
    claim_folder,
    explain_stages,
    run_stage,
    run_stages,
    stage_folder,
)
from phoneready.release.steps import RECOVERY_STAGE, Steps, bench_settled, bench_stage, decide_stage
from phoneready.settings.planned import planned_figures
from phoneready.settings.schema import RecoverConfig, ReleaseConfig
from runtime_bench.environment import cpu_model
from runtime_bench.targets.places import place_details

_TIMES_THE_WEIGHTS = 8
"""What a stage holds at most, by the bytes of the dense model's weights; exports of SmolLM2-135M take 6.7."""


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

    Returns:
        What was made, and what the budgets say of it.

    Raises:
        InputError: A setting or an input that cannot be used, a folder that is not a release's, or a baseline of
            another model or schema.
        MissingExtraError: The configuration asks for something whose extra is not installed.
        LimitError: An exported file is too far from its checkpoint.
        PhonereadyError: Any of these in a process of its own, with the same text and exit status; or it was killed.
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
                foretell_stage(config, folder, stage, tell)

        def beside() -> Work | None:
            """Two stages at once if there are threads and memory for both, and no GPU that they would have to share."""
            n_threads = threads or torch.get_num_threads()
            if find_device(config.model.device) != CPU or n_threads < 2:
                return None
            model = stage_folder(folder, "dense") / "model"
            weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
            if usable_memory() < 2 * _TIMES_THE_WEIGHTS * weights:
                return None
            return functools.partial(_run_one, config, folder, n_threads // 2)

        records = run_stages(
            stages, folder, show=shown, progress=progress, check=check, beside=beside, threads=threads
        )
        recorded = read_figures(config, folder)
        figures = collect_figures(config, folder, recorded)
        verdicts = write_verdicts(
            config.budgets, folder, figures, baseline, config.baseline.file if config.baseline else None
        )
        manifest = publish(config, folder, recorded, list(records.values()))
        export = manifest.config["export"]
        made = ", ".join(name for family in FAMILIES.values() for name in export[family.setting])
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


def _run_one(
    config: ReleaseConfig,
    folder: Path,
    threads: int,
    name: str,
    inputs: Mapping[str, str],
    progress: Progress,
) -> None:
    """One stage, in a process of its own."""
    prepare_torch(threads)
    stages = {stage.name: stage for stage in release_stages(config, folder, threads)}
    run_stage(stages[name], inputs, folder, progress, threads=threads)


def check_before_work(config: ReleaseConfig, folder: Path) -> None:
    """Find what would end a release after hours of work before anything is done; raises as `run_release`."""
    check_place(config, folder)
    check_extras(config)
    check_directions(config.budgets)
    check_inputs(config)


def check_place(config: ReleaseConfig, folder: Path) -> None:
    """Raise InputError where a folder cannot be written, or lies in the model's own."""
    writable_place(folder)
    model = Path(config.model.reference)
    if model.is_dir() and folder.resolve().is_relative_to(model.resolve()):
        raise InputError("in the model's folder, which each run would change", field="-o", value=str(folder))


def explain_release(config: ReleaseConfig, folder: Path, threads: int | None = None) -> dict[str, str]:
    """For each stage why it would run; nothing for one that is done. Nothing is run or written.

    Raises:
        InputError: As `run_release`, for the folder.
    """
    check_place(config, folder)
    return explain_stages(release_stages(config, folder, threads), folder)


def load_baseline(config: ReleaseConfig) -> FigureSet | None:
    """The baseline, if there is one, checked for what budgets want of it.

    Raises:
        InputError: It cannot be read, or lacks a figure.
    """
    if config.baseline is None:
        return None
    keys = list(planned_figures(config))
    wanted = [
        key for budget in config.budgets if budget.relative_to == "baseline" for key in select(budget, keys)
    ]
    return read_baseline(config.baseline.file, wanted)


def check_extras(config: ReleaseConfig) -> None:
    """Raise MissingExtraError for what the configuration needs and is not installed, before anything runs."""
    for family in config.export.formats:
        FAMILIES[family].require()
    if config.tracking is not None:
        require_extra("mlflow", "track")
    if any(map(needs_harness, config.evaluate.tasks)):
        require_extra("lm_eval", "eval")


def release_stages(config: ReleaseConfig, folder: Path, threads: int | None = None) -> list[Stage]:
    """The stages in order, with everything that their results depend on."""
    steps, c = Steps(config, folder, threads), config
    exports = ("export-dense", "export-pruned")
    stages = [
        Stage("dense", lambda: _dense(c, steps), (), steps.dense),
        Stage("prune", lambda: _pruned(c), ("dense",), steps.prune),
    ]
    if c.recover is not None:
        recovered = functools.partial(recovery_settings, c.recover, c.seed)
        stages.append(Stage(RECOVERY_STAGE, recovered, ("dense", "prune"), steps.recover))

    made = functools.partial(dataclasses.asdict, c.export)

    def asked() -> dict[str, Any]:
        return {"prompts": list(steps.prompts), "max_new_tokens": c.evaluate.max_new_tokens}

    stages += [
        Stage("evaluate", lambda: _judged(c, steps), ("dense", steps.final), steps.evaluate),
        Stage("export-dense", made, ("dense",), functools.partial(steps.export, DENSE), beside=True),
        Stage("export-pruned", made, (steps.final,), functools.partial(steps.export, PRUNED), beside=True),
        Stage("answers", asked, exports, steps.answers),
    ]
    if c.evaluate.text or c.evaluate.chats:
        measured = functools.partial(_measured_on, c)
        stages.append(Stage("side-by-side", measured, ("dense", steps.final, *exports), steps.side_by_side))
    if c.evaluate.files:
        judged = functools.partial(_files_judged, c, steps)
        stages.append(Stage("evaluate-files", judged, ("dense", "export-pruned"), steps.evaluate_files))
    for place in c.bench.targets:
        stages.append(_bench(c, steps, place, exports))
        stages += [_decide(c, steps, place, exports)] if c.speed_budgets(place) else []
    return stages


def model_settings(config: ReleaseConfig) -> dict[str, Any]:
    """What the dense model depends on, and with it every stage: beside the model, code and packages."""
    stated = config.model.model_dump(mode="json", exclude={"device"})
    model = stated | {"identity": identity(config.model.reference)}
    return {"seed": config.seed, "model": model, **made_with()}


def _dense(config: ReleaseConfig, steps: Steps) -> dict[str, Any]:
    return {
        **model_settings(config),
        "calibration": identities(config.prune.calibration),
        "windows": [config.prune.nsamples, config.prune.seqlen],
        "moments": steps.needs_moments,
    }


def _pruned(config: ReleaseConfig) -> dict[str, Any]:
    counted = {"vocabulary_text": identities(config.prune.vocabulary_text)}
    files = {"in_gguf": makes_gguf((*config.prune.for_quant, *config.export.names))}
    return dataclasses.asdict(config.prune_settings()) | counted | files


def recovery_settings(settings: RecoverConfig, seed: int) -> dict[str, Any]:
    """What a checkpoint that was trained depends on beside the one before."""
    training = dataclasses.asdict(settings.settings(seed)) | {"report_to": None}
    data = {"data": identities(settings.data), "validation": identities(settings.validation)}
    return training | data


def _measured_on(config: ReleaseConfig) -> dict[str, Any]:
    evaluate = config.evaluate
    texts = {name: identities(getattr(evaluate, name)) for name in ("text", "chats")}
    windows = {"windows": [evaluate.seqlen, evaluate.max_windows]}
    return windows | texts


def _files_judged(config: ReleaseConfig, steps: Steps) -> dict[str, Any]:
    return _judged(config, steps) | {"files": list(config.evaluate.files)}


def _judged(config: ReleaseConfig, steps: Steps) -> dict[str, Any]:
    evaluate = config.evaluate
    settings = _without(evaluate, "files", "task_data")
    settings |= {name: identities(getattr(evaluate, name)) for name in ("text", "chats")}
    settings["tasks"] = [[name, tasks_sha256(name, evaluate.task_data)] for name in evaluate.tasks]
    if evaluate.task_data is not None:
        settings["task_data"] = identity(str(evaluate.task_data))
    settings["metrics"] = [[name, metric_sha256(name)] for name in evaluate.metrics]
    return settings | {"prompts": list(steps.prompts)}


def _bench(config: ReleaseConfig, steps: Steps, place: str, exports: tuple[str, ...]) -> Stage:
    if config.bench.anchor and not Path(config.bench.anchor).is_file():
        raise InputError("no such file", field="bench.anchor", value=config.bench.anchor)

    def settings() -> dict[str, Any]:
        # Other places and devices change nothing here.
        shared = _without(config.bench, "targets", "devices", "n_ctx", "anchor", "decide_s")
        if config.bench.anchor:
            shared["anchor"] = identity(config.bench.anchor)
        return shared | {"target": place, "details": place_details(place), "cpu": cpu_model()}

    run = functools.partial(steps.bench, place)
    return Stage(bench_stage(place), settings, exports, run, bench_settled, resumes=True)


def _decide(config: ReleaseConfig, steps: Steps, place: str, exports: tuple[str, ...]) -> Stage:
    budgets = config.speed_budgets(place)

    def settings() -> dict[str, Any]:
        against = any(one.relative_to == "baseline" for one in budgets)
        known = {"baseline": identity(str(config.baseline.file))} if against and config.baseline else {}
        limits = {
            "budgets": [one.model_dump(mode="json") for one in budgets],
            "decide_s": config.bench.decide_s,
        }
        return limits | known

    def run(output: Path, progress: Progress) -> None:
        measure_on(steps, place, load_baseline(config), output, progress)

    return Stage(decide_stage(place), settings, (bench_stage(place), *exports), run, bench_settled)


def _without(section: Any, *names: str) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(section).items() if key not in names}
