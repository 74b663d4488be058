"""Makes the points of a search: plans at any ratio from one calibration, checkpoints, files."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cfsp.models.architectures import model_shape
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.reference import load_model
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.cutting import RECONSTRUCTIONS
from cfsp.pruning.plan import PruningPlan, apply_plan, make_plan
from cfsp.pruning.prune import moment_windows, statistics_for
from cfsp.pruning.statistics import BlockStatistics, collect_input_moments
from cfsp.records import read_record, write_record
from cfsp.text.calibration import Calibration, load_calibration
from exporters.options import ExportOptions
from phoneready.figures.figure_set import DENSE
from phoneready.release.artifact import Artifact
from phoneready.release.steps import model_stem
from phoneready.settings.schema import ReleaseConfig
from phoneready.tune.sizes import Sizes
from phoneready.tune.space import Point, config_of


@dataclass
class TrialRunner:
    """The dense model, what calibration found out about it, and a folder to make things in.

    Args:
        config: What is tuned.
        folder: Keeps the plans, so that no later run calibrates for them again; the rest of it may be deleted.
        threads: Threads outside torch; torch's number where None.
        progress: Told about every step.
        calibrations: How often statistics were taken.
    """

    config: ReleaseConfig
    folder: Path
    threads: int | None = None
    progress: Progress = no_progress
    calibrations: int = 0
    _plans: dict[str, PruningPlan] = field(default_factory=dict)

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The dense model."""
        model = self.config.model
        return load_model(model.reference, trust_remote_code=model.trust_remote_code, progress=self.progress)

    @functools.cached_property
    def calibration(self) -> Calibration:
        """The windows that statistics are taken from and reconstructions run on."""
        prune = self.config.prune
        return load_calibration(
            prune.calibration,
            self.loaded,
            nsamples=prune.nsamples,
            seqlen=prune.seqlen,
            seed=self.config.seed,
            progress=self.progress,
        )

    @property
    def dense_shape(self) -> ModelShape:
        """The shape before pruning."""
        return model_shape(self.loaded.model)

    def plan(self, point: Point) -> PruningPlan:
        """A point's plan; of each allocation the first is calibrated for, all others are that one at another ratio.

        Raises:
            InputError: Widths in multiples of the recipe's alignment cannot meet the ratio.
        """
        base = self._base_plan(point.recipe.allocation)
        settings = replace(base.settings, align=point.recipe.align)
        return replace(base, settings=settings).at_ratio(point.prune_ratio)

    def file_bytes(self, point: Point) -> int | None:
        """Size of a GGUF file, exact to one step of its alignment; None of a format that has to be exported first."""
        if not point.recipe.is_sized:
            return None
        return self.sizes.file_bytes(point.recipe.item, self.plan(point).shape)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Computes sizes of files that are not made."""
        plan, use_imatrix = self._base_plan(self._allocations[0]), self.config.export.imatrix
        return Sizes(self.loaded, plan, self._work, use_imatrix, self.config.seed, self._n_threads)

    @property
    def dense_checkpoint(self) -> Path:
        """The dense model's checkpoint."""
        return self._once(DENSE, lambda path: self._save(self.loaded, path))

    def make(self, point: Point) -> Path:
        """Prune, recover where the recipe says so, and save; only the latest checkpoint is kept.

        Raises:
            InputError: The ratio cannot be met.
        """
        recipe = point.recipe
        key = f"{recipe.allocation}-{recipe.align}-{point.prune_ratio!r}"
        pruned = self._once(f"pruned-{key}", lambda path: self._prune(point, path))
        if not recipe.recover:
            return pruned
        return self._once(f"recovered-{key}", lambda path: self._recover(pruned, path))

    def export(self, point: Point, role: str) -> Artifact:
        """A file of a point, or of the dense model beside it; a GGUF file is not proven, an ONNX folder is.

        Raises:
            InputError: As `make`.
            LimitError: An ONNX graph is too far from the checkpoint.
        """
        checkpoint = self.dense_checkpoint if role == DENSE else self.make(point)
        folder = self._work / f"files-{role}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config, item, family = config_of(self.config, point), point.recipe.item, point.recipe.family
        name = model_stem(config, self.loaded.source.name, role)
        guided = "calibration" in family.find(item).reads
        settings = ExportOptions(
            name=name,
            use_imatrix=config.export.imatrix,
            calibration=moment_windows(self.calibration.input_ids) if guided else None,
            # As in a release: the dense model need not fit what the pruned one must.
            mixed_bytes=None if role == DENSE else config.export.mixed_bytes,
            n_threads=self._n_threads,
            progress=self.progress,
        )
        if family.draft is not None:
            family.draft(checkpoint, folder, (item,), settings)
        else:
            folder = folder / family.name
            family.export(checkpoint, folder, (item,), settings)
        model = family.locate(folder, name, item)
        return Artifact(role, item, model.name, model.root, model.path)

    def clear(self) -> None:
        """Delete everything but the plans."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _base_plan(self, allocation: str) -> PruningPlan:
        if allocation not in self._plans:
            path = self.folder / "plans" / f"{allocation}.json"
            if not path.is_file():
                settings = replace(self.config.prune.settings(1), prune_ratio=0.0, allocation=allocation)
                write_record(path, make_plan(self.loaded, self._statistics, self.calibration, settings))
            self._plans[allocation] = read_record(PruningPlan, path)
        return self._plans[allocation]

    @functools.cached_property
    def _statistics(self) -> BlockStatistics:
        """Of one pass over the calibration text, of whatever any of the allocations that are searched over reads."""
        self.calibrations += 1
        settings = self.config.prune.settings(1)
        each = [replace(settings, allocation=allocation) for allocation in self._allocations]
        widest = next((one for one in each if one.needs_loss), each[0])
        return statistics_for(self.loaded.model, self.calibration, widest, progress=self.progress)

    def _prune(self, point: Point, path: Path) -> None:
        plan = self.plan(point)
        model = copy.deepcopy(self.loaded.model)
        needs = RECONSTRUCTIONS[plan.settings.reconstruct].needs_statistics
        apply_plan(
            model,
            plan,
            statistics=self._statistics if needs else None,
            input_ids=self.calibration.input_ids,
            progress=self.progress,
        )
        self._save(replace(self.loaded, model=model), path, plan)

    def _save(self, loaded: LoadedModel, path: Path, plan: PruningPlan | None = None) -> None:
        """A checkpoint, with what 4-bit types are rounded for, measured as a release measures it."""
        moments = None
        if self.config.export.imatrix:
            with products_in(self.config.prune.dtype):
                windows = moment_windows(self.calibration.input_ids)
                moments = collect_input_moments(loaded.model, windows, progress=self.progress)
        save_checkpoint(loaded, path, plan=plan, input_moments=moments, seed=self.config.seed)

    def _recover(self, pruned: Path, path: Path) -> None:
        from cfsp.recovery.recover import recover

        how = self.config.recover
        assert how is not None  # the recipes are of configurations that say how to train
        recover(
            str(pruned),
            path,
            how.settings(self.config.seed),
            data=how.data,
            validation=how.validation,
            teacher=str(self.dense_checkpoint),
            force=True,
            progress=self.progress,
        )

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """A checkpoint that is made unless it is the latest of its kind."""
        path = self._work / name
        if not path.is_dir():
            kind = name.partition("-")[0]
            for old in self._work.glob(f"{kind}-*"):
                shutil.rmtree(old, ignore_errors=True)
            make(path)
        return path

    @property
    def _work(self) -> Path:
        return self.folder / "work"

    @property
    def _allocations(self) -> tuple[str, ...]:
        tune = self.config.tune
        return (tune.allocations if tune else ()) or (self.config.prune.allocation,)

    @property
    def _n_threads(self) -> int:
        return self.threads or torch.get_num_threads()
