"""Makes the points of a search: plans at any ratio from one calibration, checkpoints, files."""

from __future__ import annotations

import copy
import functools
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import InputError
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
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import BlockStatistics, collect_input_moments
from cfsp.records import read_record, write_record
from cfsp.text.calibration import Calibration, load_calibration
from exporters.families import family_of
from exporters.options import ExportOptions
from phoneready.figures.figure_set import DENSE, PRUNED
from phoneready.release.artifact import Artifact
from phoneready.settings.schema import ReleaseConfig
from phoneready.tune.sizes import Sizes
from phoneready.tune.space import Point, Recipe


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

    def plan(self, recipe: Recipe, prune_ratio: float) -> PruningPlan:
        """A plan; of each allocation the first is calibrated for, all others are that one at another ratio.

        Raises:
            InputError: Widths in multiples of the recipe's alignment cannot meet the ratio.
        """
        base = self._base_plan(recipe.allocation)
        settings = replace(base.settings, align=recipe.align)
        return replace(base, settings=settings).at_ratio(prune_ratio)

    def file_bytes(self, recipe: Recipe, prune_ratio: float) -> int | None:
        """Size of a GGUF file, exact to one step of its alignment; None of a format that has to be exported first."""
        if not recipe.is_sized:
            return None
        return self.sizes.file_bytes(recipe.item, self.plan(recipe, prune_ratio).shape)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Computes sizes of files that are not made."""
        plan = self._base_plan(self._allocations[0])
        use = self.config.export.imatrix
        return Sizes(self.loaded, plan, self._work, use, self.config.seed, self._n_threads)

    def checkpoint(self, name: str) -> Path:
        """The dense model's checkpoint, or one that was made."""
        path = self._work / name
        if name == DENSE and not path.is_dir():
            save_checkpoint(
                self.loaded, path, input_moments=self._moments(self.loaded.model), seed=self.config.seed
            )
        return path

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

    def export(self, checkpoint: Path, item: str, name: str) -> Artifact:
        """One file of a checkpoint; a GGUF file is not proven, an ONNX folder is.

        Raises:
            LimitError: An ONNX graph is too far from the checkpoint.
        """
        role = DENSE if checkpoint.name == DENSE else PRUNED
        folder = self._work / f"files-{role}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        family, export = family_of(item), self.config.export
        guided = "calibration" in family.find(item).reads
        settings = ExportOptions(
            name=name,
            use_imatrix=export.imatrix,
            calibration=moment_windows(self.calibration.input_ids) if guided else None,
            # As in a release: the dense model need not fit what the pruned one must.
            mixed_bytes=None if role == DENSE else export.mixed_bytes,
            n_threads=self._n_threads,
            progress=self.progress,
        )
        if family.draft is not None:
            family.draft(checkpoint, folder, item, name, settings)
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
            if path.is_file():
                self._plans[allocation] = read_record(PruningPlan, path)
            else:
                settings = replace(self.config.prune.settings(1), prune_ratio=0.0, allocation=allocation)
                plan = make_plan(self.loaded, self._statistics, self.calibration, settings)
                write_record(path, plan)
                self._plans[allocation] = plan
        return self._plans[allocation]

    @functools.cached_property
    def _statistics(self) -> BlockStatistics:
        """Of one pass over the calibration text, for all allocations that are searched over."""
        self.calibrations += 1
        return statistics_for(
            self.loaded.model, self.calibration, self._widest_settings, progress=self.progress
        )

    @property
    def _widest_settings(self) -> PruneSettings:
        """Settings that read whatever any of the allocations reads."""
        settings = self.config.prune.settings(1)
        each = [replace(settings, allocation=allocation) for allocation in self._allocations]
        return next((one for one in each if one.needs_loss), each[0])

    def _prune(self, point: Point, path: Path) -> None:
        plan = self.plan(point.recipe, point.prune_ratio)
        model = copy.deepcopy(self.loaded.model)
        needs = RECONSTRUCTIONS[plan.settings.reconstruct].needs_statistics
        apply_plan(
            model,
            plan,
            statistics=self._statistics if needs else None,
            input_ids=self.calibration.input_ids,
            progress=self.progress,
        )
        pruned = replace(self.loaded, model=model)
        save_checkpoint(pruned, path, plan=plan, input_moments=self._moments(model), seed=self.config.seed)

    def _recover(self, pruned: Path, path: Path) -> None:
        from cfsp.recovery.recover import recover

        how = self.config.recover
        if how is None:
            raise InputError("there is no [recover] that says how to train", field="tune.recover")
        recover(
            str(pruned),
            path,
            how.settings(self.config.seed),
            data=how.data,
            validation=how.validation,
            teacher=str(self.checkpoint(DENSE)),
            force=True,
            progress=self.progress,
        )

    def _once(self, name: str, make: Any) -> Path:
        """A checkpoint that is made unless it is the latest of its kind."""
        path = self._work / name
        if not path.is_dir():
            kind = name.partition("-")[0]
            for old in self._work.glob(f"{kind}-*"):
                shutil.rmtree(old, ignore_errors=True)
            make(path)
        return path

    def _moments(self, model: Any) -> dict[str, torch.Tensor] | None:
        """What 4-bit types are rounded for, measured as a release measures it."""
        if not self.config.export.imatrix:
            return None
        with products_in(self.config.prune.dtype):
            windows = moment_windows(self.calibration.input_ids)
            return collect_input_moments(model, windows, progress=self.progress)

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
