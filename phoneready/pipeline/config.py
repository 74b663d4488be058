"""release.toml: what a release is made of. Unknown keys are errors, and all errors are reported at once."""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pydantic

from cfsp.calibration import SELF
from cfsp.errors import InputError
from cfsp.prune_settings import PruneSettings, check_settings
from cfsp.text import BUILTIN_TEXT
from cfsp.validation import describe_problems
from exporters.gguf import find_quant, required_multiple
from exporters.onnx import find_variant
from runtime_bench.workload import BenchSettings, workloads_of

__all__ = [
    "BenchConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ModelConfig",
    "PruneConfig",
    "ReleaseConfig",
    "demo_config_text",
    "load_config",
    "parse_config",
    "with_variants",
]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """Which model; `reference` as in cfsp.model_reference."""

    reference: str = pydantic.Field(min_length=1)
    trust_remote_code: bool = False


class PruneConfig(_Section):
    """How to prune; see cfsp.prune_settings. `align` 0 means: what the quantizations need."""

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

    @pydantic.model_validator(mode="after")
    def _known_names(self) -> Self:
        _as_value_error(lambda: check_settings(self.settings(self.align or 1)))
        return self

    def settings(self, align: int) -> PruneSettings:
        """For cfsp, with the alignment to use where none is set."""
        names = ("prune_ratio", "score", "coarse_metric", "allocation", "strength", "uniform_width")
        chosen = {
            name: getattr(self, name) for name in (*names, "reconstruct", "ridge", "correction", "dtype")
        }
        return PruneSettings(**chosen, align=self.align or align)


class EvaluateConfig(_Section):
    """What the models are judged on: `text` and `chats` are references as in cfsp.text, chats also `self`.

    `self` means chats sampled from the dense model with another seed than the calibration's.
    """

    text: tuple[str, ...] = (BUILTIN_TEXT,)
    chats: tuple[str, ...] = (SELF,)
    seqlen: int = pydantic.Field(default=1024, ge=2)
    max_windows: int = pydantic.Field(default=16, ge=1)
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = pydantic.Field(default=64, ge=1)


class ExportConfig(_Section):
    """What is made, of the dense model too; names as in exporters.gguf.QUANTS and exporters.onnx.VARIANTS."""

    quants: tuple[str, ...] = pydantic.Field(default=("Q4_0",), min_length=1)
    onnx: tuple[str, ...] = ()
    imatrix: bool = True

    @pydantic.field_validator("quants")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        found: list[str] = []
        _as_value_error(lambda: found.extend(find_quant(name).name for name in names))
        return tuple(dict.fromkeys(found))

    @pydantic.field_validator("onnx")
    @classmethod
    def _known_variants(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        found: list[str] = []
        _as_value_error(lambda: found.extend(find_variant(name).name for name in names))
        return tuple(dict.fromkeys(found))


class BenchConfig(_Section):
    """What is measured; see runtime_bench.workload.BenchSettings."""

    n_prompt: tuple[int, ...] = BenchSettings.n_prompt
    n_gen: tuple[int, ...] = BenchSettings.n_gen
    ttft: tuple[int, ...] = BenchSettings.ttft
    n_threads: tuple[int, ...] = BenchSettings.n_threads
    repetitions: int = BenchSettings.repetitions
    samples_per_process: int = BenchSettings.samples_per_process
    warmup: bool = BenchSettings.warmup
    delay_s: float = BenchSettings.delay_s

    @pydantic.model_validator(mode="after")
    def _usable(self) -> Self:
        _as_value_error(lambda: workloads_of(self.settings(0)))
        return self

    def settings(self, seed: int) -> BenchSettings:
        """For runtime_bench."""
        return BenchSettings(**self.model_dump(), seed=seed)


class ReleaseConfig(_Section):
    """A whole release."""

    model: ModelConfig
    seed: int = pydantic.Field(default=0, ge=0)
    prune: PruneConfig = pydantic.Field(default_factory=PruneConfig)
    evaluate: EvaluateConfig = pydantic.Field(default_factory=EvaluateConfig)
    export: ExportConfig = pydantic.Field(default_factory=ExportConfig)
    bench: BenchConfig = pydantic.Field(default_factory=BenchConfig)

    def prune_settings(self) -> PruneSettings:
        """For cfsp; widths fit the quantizations unless an alignment is set."""
        return self.prune.settings(required_multiple(self.export.quants))


def with_variants(config: ReleaseConfig, names: Sequence[str]) -> ReleaseConfig:
    """The configuration with other ONNX variants.

    Raises:
        InputError: An unknown one.
    """
    variants = tuple(dict.fromkeys(find_variant(name).name for name in names))
    return config.model_copy(update={"export": config.export.model_copy(update={"onnx": variants})})


def demo_config_text() -> str:
    """The release.toml of the embedded demo."""
    return importlib.resources.files("phoneready.pipeline").joinpath("demo.toml").read_text(encoding="utf-8")


def load_config(path: Path | None) -> ReleaseConfig:
    """Read a release.toml, or the embedded demo's for None; relative paths in it start at its folder.

    Raises:
        InputError: Missing, no TOML, or with errors; the message names all of them.
    """
    if path is None:
        return parse_config(demo_config_text(), where="the demo's configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    return _beside(parse_config(text, where=str(path)), path.parent)


def parse_config(text: str, *, where: str) -> ReleaseConfig:
    """Parse and validate; `where` is named in errors.

    Raises:
        InputError: As `load_config`.
    """
    try:
        return ReleaseConfig.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where} is not valid TOML: {error}") from error
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {describe_problems(error)}") from error


def _as_value_error(check: Any) -> None:
    """Let pydantic collect the library's own complaint with all others."""
    try:
        check()
    except InputError as error:
        raise ValueError(str(error)) from error


def _beside(config: ReleaseConfig, folder: Path) -> ReleaseConfig:
    """References that name a file or folder beside the configuration, resolved from there."""

    def resolve(reference: str) -> str:
        return str(folder / reference) if (folder / reference).exists() else reference

    def resolve_all(references: Sequence[str]) -> tuple[str, ...]:
        return tuple(map(resolve, references))

    model = config.model.model_copy(update={"reference": resolve(config.model.reference)})
    prune = config.prune.model_copy(update={"calibration": resolve_all(config.prune.calibration)})
    texts = {name: resolve_all(getattr(config.evaluate, name)) for name in ("text", "chats")}
    evaluate = config.evaluate.model_copy(update=texts)
    return config.model_copy(update={"model": model, "prune": prune, "evaluate": evaluate})
