"""The sections of release.toml. Unknown keys are errors; names are looked up in the tables of those who use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic

from cfsp.errors import InputError
from cfsp.evaluation.tasks import TaskSettings
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.settings import check_settings as check_prune_settings
from cfsp.recovery.settings import RecoverySettings
from cfsp.recovery.settings import check_settings as check_recovery_settings
from cfsp.text.calibration import SELF
from cfsp.text.tokens import BUILTIN_TEXT
from cfsp.validation import Section, as_value_error
from exporters.gguf import find_quant
from exporters.onnx import find_variant
from runtime_bench.devices.profile import find_profile, load_profiles
from runtime_bench.targets.places import check_place
from runtime_bench.workload import BenchSettings, workloads_of

_Count = Annotated[int, pydantic.Field(ge=1)]
_Sizes = tuple[Annotated[int, pydantic.Field(ge=0)], ...]


class ModelConfig(Section):
    """Which model; `reference` as in cfsp.models.reference."""

    reference: str = pydantic.Field(min_length=1)
    trust_remote_code: bool = False


class PruneConfig(Section):
    """How to prune; see cfsp.pruning.settings. `align` 0 means: what the quantizations need."""

    prune_ratio: float = pydantic.Field(default=PruneSettings.prune_ratio, ge=0, lt=1)
    calibration: tuple[str, ...] = pydantic.Field(default=(SELF,), min_length=1)
    nsamples: int = pydantic.Field(default=128, ge=1)
    seqlen: int = pydantic.Field(default=1024, ge=2)
    score: str = PruneSettings.score
    coarse_metric: str = PruneSettings.coarse_metric
    allocation: str = PruneSettings.allocation
    strength: float = pydantic.Field(default=PruneSettings.strength, ge=0)
    align: int = pydantic.Field(default=0, ge=0)
    uniform_width: bool = PruneSettings.uniform_width
    reconstruct: str = PruneSettings.reconstruct
    ridge: float = pydantic.Field(default=PruneSettings.ridge, gt=0)
    correction: float = pydantic.Field(default=PruneSettings.correction, ge=0, le=1)
    dtype: str = PruneSettings.dtype

    @pydantic.field_validator("score", "coarse_metric", "allocation", "reconstruct", "dtype")
    @classmethod
    def _known(cls, name: str, info: pydantic.ValidationInfo) -> str:
        chosen: dict[str, Any] = {str(info.field_name): name}
        as_value_error(lambda: check_prune_settings(PruneSettings(**chosen)))
        return name

    def settings(self, align: int) -> PruneSettings:
        """For cfsp, with the alignment to use where none is set."""
        others = {"calibration", "nsamples", "seqlen", "align"}
        return PruneSettings(**self.model_dump(exclude=others), align=self.align or align)


class RecoverConfig(Section):
    """Training after pruning; the section's presence turns it on. See cfsp.recovery.RecoverySettings."""

    data: tuple[str, ...] = pydantic.Field(default=(SELF,), min_length=1)
    validation: tuple[str, ...] = ()
    method: str = RecoverySettings.method
    rank: int = RecoverySettings.rank
    alpha: float = RecoverySettings.alpha
    loss: str = RecoverySettings.loss
    temperature: float = RecoverySettings.temperature
    distill_weight: float = RecoverySettings.distill_weight
    chat_labels: str = RecoverySettings.chat_labels
    learning_rate: float | None = None
    max_tokens: int | None = None
    epochs: float | None = None
    seqlen: int = RecoverySettings.seqlen
    batch_size: int = RecoverySettings.batch_size
    gradient_accumulation_steps: int = RecoverySettings.gradient_accumulation_steps
    warmup_ratio: float = RecoverySettings.warmup_ratio
    weight_decay: float = RecoverySettings.weight_decay
    max_grad_norm: float = RecoverySettings.max_grad_norm
    dtype: str = RecoverySettings.dtype
    eval_every: int | None = None
    save_every: int | None = None
    patience: int | None = RecoverySettings.patience
    validation_windows: int = RecoverySettings.validation_windows
    self_tokens: int = RecoverySettings.self_tokens
    report_to: tuple[str, ...] = ()

    @pydantic.field_validator("*")
    @classmethod
    def _usable(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        name = str(info.field_name)
        if name in ("data", "validation", "report_to") or value is None:
            return value
        chosen: dict[str, Any] = {name: value} | ({"max_tokens": None} if name == "epochs" else {})
        as_value_error(lambda: check_recovery_settings(RecoverySettings(**chosen)))
        return value

    @pydantic.model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.max_tokens is not None and self.epochs is not None:
            raise ValueError("max_tokens and epochs both say how long; allowed: one of them")
        return self

    def settings(self, seed: int) -> RecoverySettings:
        """For cfsp."""
        chosen = self.model_dump(exclude={"data", "validation"})
        if self.max_tokens is None and self.epochs is None:
            chosen["max_tokens"] = RecoverySettings.max_tokens
        return RecoverySettings(**chosen, seed=seed)


class EvaluateConfig(Section):
    """What the models are judged on: `text` and `chats` are references as in cfsp.text.tokens, chats also `self`.

    `self` means chats sampled from the dense model with another seed than the calibration's. `files` names exports that
    are judged in their own runtime beside the checkpoint.
    """

    text: tuple[str, ...] = (BUILTIN_TEXT,)
    chats: tuple[str, ...] = (SELF,)
    seqlen: int = pydantic.Field(default=1024, ge=2)
    max_windows: _Count = 16
    prompts: tuple[str, ...] = ()
    max_new_tokens: _Count = 64
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: _Count | None = None
    num_fewshot: int | None = pydantic.Field(default=None, ge=0)
    metrics: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def task_settings(self) -> TaskSettings:
        """For cfsp.evaluation.tasks."""
        return TaskSettings(self.tasks, self.task_data, self.limit, self.num_fewshot)


class ExportConfig(Section):
    """What is made, of the dense model too; names as in exporters.gguf.QUANTS and exporters.onnx.VARIANTS."""

    quants: tuple[str, ...] = pydantic.Field(default=("Q4_0",), min_length=1)
    onnx: tuple[str, ...] = ()
    mixed_bytes: int | None = pydantic.Field(default=None, ge=1)
    imatrix: bool = True

    @pydantic.field_validator("quants")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _all_found(names, lambda name: find_quant(name).name)

    @pydantic.field_validator("onnx")
    @classmethod
    def _known_variants(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _all_found(names, lambda name: find_variant(name).name)

    @property
    def names(self) -> tuple[str, ...]:
        """All quantizations and variants."""
        return (*self.quants, *self.onnx)


class BenchConfig(Section):
    """What is measured where: `files` (quantizations and variants; all of them when empty) on each of `targets`.

    `devices` are profiles for which memory and speed of the GGUF files are projected. For the others see
    runtime_bench.workload.BenchSettings.
    """

    targets: tuple[str, ...] = ("local",)
    devices: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    n_prompt: _Sizes = BenchSettings.n_prompt
    n_gen: _Sizes = BenchSettings.n_gen
    ttft: _Sizes = BenchSettings.ttft
    n_threads: tuple[_Count, ...] = BenchSettings.n_threads
    repetitions: _Count = BenchSettings.repetitions
    samples_per_process: _Count = BenchSettings.samples_per_process
    warmup: bool = BenchSettings.warmup
    delay_s: float = pydantic.Field(default=BenchSettings.delay_s, ge=0, allow_inf_nan=False)
    timeout_s: float = pydantic.Field(default=BenchSettings.timeout_s, gt=0, allow_inf_nan=False)
    n_ctx: _Count = 2048

    @pydantic.field_validator("targets")
    @classmethod
    def _known_targets(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _all_found(names, check_place)

    @pydantic.field_validator("devices")
    @classmethod
    def _known_devices(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _all_found(names, lambda name: find_profile(name, load_profiles()).profile.id)

    def settings(self, seed: int) -> BenchSettings:
        """For runtime_bench."""
        return BenchSettings(**self.model_dump(exclude={"targets", "devices", "files", "n_ctx"}), seed=seed)

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the workloads."""
        return tuple(workload.test for workload in workloads_of(self.settings(0)))


class BaselineConfig(Section):
    """An earlier release's figures.json, for budgets relative to the baseline."""

    file: Path


def _all_found(names: tuple[str, ...], find: Callable[[str], str]) -> tuple[str, ...]:
    """Each name as its table writes it, once; the complaints about all that are not there."""
    found, problems = [], []
    for name in names:
        try:
            found.append(find(name))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(dict.fromkeys(found))
