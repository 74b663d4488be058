"""Makes the points of a search: plans at any ratio from one calibration, checkpoints, files."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cfsp.devices import find_device
from cfsp.models.architectures import model_shape
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.offload import copied
from cfsp.models.reference import load_model
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.axes.vocabulary import Counts, TokenOrder, VocabularyPlan, plan_vocabulary, token_order
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.moments import collect_input_moments, moment_windows, spread_windows
from cfsp.pruning.plan import PruningPlan, make_plan
from cfsp.pruning.prune import (
    Removals,
    check_removals,
    counts_of,
    statistics_for,
    trim,
)
from cfsp.pruning.statistics import BlockStatistics
from cfsp.records import read_record, write_record
from cfsp.text.calibration import Calibration
from phoneready.figures.figure_set import DENSE, PRUNED
from phoneready.release.artifact import Artifact
from phoneready.release.pruning_budget import with_fitting_widths
from phoneready.release.steps import model_stem, run_recovery
from phoneready.settings.schema import ReleaseConfig
from phoneready.settings.structures import Structures
from phoneready.sizes import Sizes
from phoneready.text import load_calibration
from phoneready.tune.space import Point, Recipe, config_of


@dataclass
class Side:
    """A model before channels go, and what calibration finds out about it.

    Attributes:
        loaded: The dense model, or what is left of it with fewer tokens.
        calibration: The windows in its tokens.
        vocabulary: Which tokens those are; None where all are kept.
        statistics: Of the windows, once something has read them.
        sizes: Computes sizes of its files, once something has asked.
    """

    loaded: LoadedModel
    calibration: Calibration
    vocabulary: VocabularyPlan | None = None
    statistics: BlockStatistics | None = None
    sizes: Sizes | None = None
    _removals: Removals | None = None

    def removals(self, progress: Progress) -> Removals:
        """Chooses which blocks, attentions and groups go."""
        if self._removals is None:
            self._removals = Removals(self.loaded.model, self.calibration, progress)
        return self._removals


@dataclass
class TrialRunner:
    """The dense model, what calibration found out about it, and a folder to make things in.

    Args:
        config: What is tuned.
        folder: Keeps the plans, so that no later run calibrates for them again; the rest of it may be deleted.
        threads: Threads outside torch; torch's number where None.
        progress: Told about every step.
        calibrations: How often statistics were taken.
        work: What of the folder this run alone writes, and may delete.
    """

    config: ReleaseConfig
    folder: Path
    threads: int | None = None
    progress: Progress = no_progress
    calibrations: int = 0
    work: str = "work"
    _plans: dict[tuple[str, Structures], PruningPlan] = field(default_factory=dict)
    _vocabularies: dict[int, VocabularyPlan] = field(default_factory=dict)
    _trimmed: dict[int, Side] = field(default_factory=dict)
    _bytes: dict[tuple[Point, str], int] = field(default_factory=dict)

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The dense model."""
        model = self.config.model
        return load_model(
            model.reference,
            trust_remote_code=model.trust_remote_code,
            device=find_device(model.device),
            dtype=model.dtype,
            progress=self.progress,
        )

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
        base = self._base_plan(point.recipe)
        settings = replace(base.settings, align=point.recipe.align)
        files = (*self.config.prune.for_quant, point.recipe.item)
        settings = with_fitting_widths(settings, self.loaded.model, files)
        return replace(base, settings=settings).at_ratio(point.prune_ratio)

    def file_bytes(self, point: Point, role: str = PRUNED) -> int | None:
        """Size of a GGUF file, as `Sizes` computes it; None of a format that has to be exported first."""
        recipe = point.recipe
        if not recipe.is_sized:
            return None
        if (point, role) not in self._bytes:
            dense = role == DENSE
            side, shape = (0, self.dense_shape) if dense else (recipe.vocabulary, self.plan(point).shape)
            self._bytes[point, role] = self.sizes(side).file_bytes(recipe.item, shape, dense=dense)
        return self._bytes[point, role]

    def sizes(self, vocabulary: int = 0) -> Sizes:
        """Computes sizes of files that are not made."""
        side = self.side(vocabulary)
        if side.sizes is None:
            side.sizes = self._sizes(side)
        return side.sizes

    def vocabulary(self, size: int) -> VocabularyPlan:
        """Which tokens a vocabulary of that size keeps; no forward pass is needed.

        Raises:
            InputError: There is no such vocabulary.
        """
        if size not in self._vocabularies:
            sources = self.config.prune.vocabulary_text or self.calibration.sources
            self._vocabularies[size] = plan_vocabulary(
                self.loaded, self._counts, size, sources=sources, order=self._order
            )
        return self._vocabularies[size]

    def check(self, gone: Structures) -> None:
        """Raise InputError where the model has not so many blocks, attentions or groups."""
        check_removals(self.loaded.model, replace(self.config.prune.settings(1), **gone.plain))

    @functools.cached_property
    def _counts(self) -> Counts:
        self.progress("counting tokens", 0, 1)
        counts = counts_of(self.loaded, self.calibration, self.config.prune.vocabulary_text)
        self.progress("counting tokens", 1, 1)
        return counts

    @functools.cached_property
    def _order(self) -> TokenOrder:
        return token_order(self.loaded, self._counts)

    def side(self, vocabulary: int) -> Side:
        """The model with all of its tokens, or with so many; of the latter the latest is kept."""
        if not vocabulary:
            return self._dense_side
        if vocabulary not in self._trimmed:
            self._trimmed.clear()
            kept = self.vocabulary(vocabulary)
            twin = replace(self.loaded, model=copied(self.loaded.model))
            settings = self.config.prune.settings(1)
            left = trim(twin, self.calibration, kept, settings, progress=self.progress)
            self._trimmed[vocabulary] = Side(*left, kept)
        return self._trimmed[vocabulary]

    @functools.cached_property
    def _dense_side(self) -> Side:
        return Side(self.loaded, self.calibration)

    def _sizes(self, side: Side) -> Sizes:
        export = self.config.export
        items = tuple(item for item in export.quants if Recipe(item, "", 1, False).is_sized)
        return Sizes(side.loaded, self._work, export.imatrix, self.config.seed, self._n_threads, items)

    @property
    def dense_checkpoint(self) -> Path:
        """The dense model's checkpoint."""
        return self._once(DENSE, lambda path: self._save(self._dense_side, path))

    def make(self, point: Point) -> Path:
        """Prune, recover where the recipe says so, and save; only the latest checkpoint is kept.

        Raises:
            InputError: The ratio cannot be met.
        """
        recipe = point.recipe
        key = f"{recipe.allocation}-{recipe.align}-{point.prune_ratio!r}{recipe.in_names}"
        pruned = self._once(f"pruned-{key}", lambda path: self._prune(point, path))
        if config_of(self.config, point).recover is None:
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
        side = 0 if role == DENSE else point.recipe.vocabulary
        guided = "calibration" in family.find(item).reads
        text = self.side(side).calibration.input_ids if guided else None
        settings = config.export.options(
            None if text is None else spread_windows(text, config.export.rounding_windows),
            name=name,
            # As in a release: the dense model need not fit what the pruned one must.
            must_fit=role != DENSE,
            mixed_bytes=None if role == DENSE else config.export.mixed_bytes,
            device=str(self.loaded.model.device),
            dtype=config.model.dtype,
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

    def _base_plan(self, recipe: Recipe) -> PruningPlan:
        key = (recipe.allocation, Structures.of(recipe))
        if key not in self._plans:
            path = self.folder / "plans" / f"{recipe.allocation}{recipe.in_names}.json"
            if not path.is_file():
                write_record(path, self._make_plan(recipe))
            self._plans[key] = read_record(PruningPlan, path)
        return self._plans[key]

    def _make_plan(self, recipe: Recipe) -> PruningPlan:
        side, settings = self.side(recipe.vocabulary), self.config.prune.settings(1)
        wanted = replace(settings, prune_ratio=0.0, allocation=recipe.allocation, **recipe.plain)
        removals = side.removals(self.progress).of(wanted)
        plan = make_plan(side.loaded, self._statistics(side), side.calibration, wanted, *removals)
        return replace(plan, vocabulary=side.vocabulary)

    def _statistics(self, side: Side) -> BlockStatistics:
        """Of one pass over the calibration text."""
        if side.statistics is None:
            self.calibrations += 1
            settings = self.config.prune.settings(1)
            side.statistics = statistics_for(
                side.loaded.model, side.calibration, settings, progress=self.progress
            )
        return side.statistics

    def _prune(self, point: Point, path: Path) -> None:
        plan, side = self.plan(point), self.side(point.recipe.vocabulary)
        model = copied(side.loaded.model)
        apply_plan(
            model,
            plan,
            statistics=side.statistics,
            input_ids=side.calibration.input_ids,
            progress=self.progress,
        )
        self._save(replace(side, loaded=replace(side.loaded, model=model)), path, plan)

    def _save(self, side: Side, path: Path, plan: PruningPlan | None = None) -> None:
        """A checkpoint, with what 4-bit types are rounded for, measured as a release measures it."""
        moments = None
        if self.config.export.imatrix:
            with products_in(self.config.prune.dtype, side.loaded.model.device.type):
                windows = moment_windows(side.calibration.input_ids)
                moments = collect_input_moments(side.loaded.model, windows, progress=self.progress)
        save_checkpoint(side.loaded, path, plan=plan, input_moments=moments, seed=self.config.seed)

    def _recover(self, pruned: Path, path: Path) -> None:
        how = self.config.recover
        assert how is not None  # the recipes are of configurations that say how to train
        run_recovery(
            pruned,
            path,
            how,
            self.config.seed,
            teacher=self.dense_checkpoint,
            work=_work_folder(path),
            device=self.config.model.device,
            progress=self.progress,
        )

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """A checkpoint that is made unless it is the latest of its kind."""
        path = self._work / name
        if not path.is_dir():
            kind = name.partition("-")[0]
            for old in self._work.glob(f"{kind}-*"):
                # Where it was killed while it was trained, it goes on.
                if old != _work_folder(path):
                    shutil.rmtree(old, ignore_errors=True)
            make(path)
        return path

    @property
    def _work(self) -> Path:
        return self.folder / self.work

    @property
    def _n_threads(self) -> int:
        return self.threads or torch.get_num_threads()


def _work_folder(recovered: Path) -> Path:
    """Where training keeps its own checkpoints until a recovered one is whole."""
    return recovered.with_name(f"{recovered.name}.work")
