"""manifest.json: what a release made, from what, how, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from cfsp.errors import without_credentials
from cfsp.models.checkpoint import CheckpointInfo
from cfsp.models.shape import ModelShape
from cfsp.models.source import ModelSource
from cfsp.records import tool_version
from cfsp.validation import WhereSet
from phoneready.publish.contents import Content
from phoneready.publish.single_commands import single_commands
from phoneready.release.results import ReleaseFigures
from phoneready.release.stages import StageRecord
from phoneready.settings.schema import ReleaseConfig

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class ReleasedFile:
    """A GGUF file, or the folder of an ONNX variant.

    Attributes:
        file: Its name in the release folder.
        role: `pruned`, or `dense` for the one it is compared with.
        format: `gguf` or `onnx`.
        quant: Quantization or variant.
        architecture: The runtime's name for it, which may differ from the source's.
        bytes: Size; of a folder, of its graph and weights.
        sha256: Hash; of a folder, of its graph, whose metadata has the hash of the weights.
    """

    file: str
    role: str
    format: str
    quant: str
    architecture: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ReleaseManifest:
    """manifest.json: what was made, from what, how, and with what.

    Attributes:
        source: The dense model.
        license: Its licence, which the files inherit; None where the source states none.
        seed: Seed of the run.
        prune_ratio: Share of FFN channels that was asked to be removed.
        removed_ffn_share: Share that was removed.
        shape: Of the pruned model.
        plan_sha256: Hash of the pruning plan.
        checkpoint_sha256: Hash of the pruned checkpoint's weights.
        files: The models.
        contents: Every file of the release but this one and SHA256SUMS, with its hash.
        kinds: How each group of figures came about.
        versions: Packages and runtime.
        config: The configuration, without the credentials of URLs in it.
        commands: Single commands that make the pruned files.
        stages: Name to key of each stage.
        seconds: Name to duration of each stage.
        warnings: What the configuration says and has had no effect.
    """

    KIND: ClassVar[str] = "release-manifest"
    SCHEMA_VERSION: ClassVar[int] = 4

    source: ModelSource
    license: str | None
    seed: int
    prune_ratio: float
    removed_ffn_share: float
    shape: ModelShape
    plan_sha256: str | None
    checkpoint_sha256: str
    files: tuple[ReleasedFile, ...]
    contents: tuple[Content, ...]
    kinds: dict[str, str]
    versions: dict[str, str]
    config: dict[str, Any]
    commands: tuple[str, ...]
    stages: dict[str, str]
    seconds: dict[str, float]
    warnings: Annotated[tuple[str, ...], WhereSet] = ()


def make_manifest(
    config: ReleaseConfig,
    figures: ReleaseFigures,
    checkpoint: CheckpointInfo,
    stages: Sequence[StageRecord],
) -> ReleaseManifest:
    """The manifest of a finished release, still without its contents.

    Args:
        config: What was asked for.
        figures: What the stages found.
        checkpoint: The pruned checkpoint.
        stages: Records of all stages.
    """
    sides = (("pruned", figures.pruned), ("dense", figures.dense))
    runtimes = ", ".join(dict.fromkeys(record.runtime for record in figures.pruned))
    versions = checkpoint.versions | {"phoneready": tool_version(), "runtime": runtimes}
    return ReleaseManifest(
        source=figures.source,
        license=figures.source.license,
        seed=config.seed,
        prune_ratio=figures.plan.settings.prune_ratio,
        removed_ffn_share=1 - figures.plan.keep_ratio,
        shape=checkpoint.shape,
        plan_sha256=checkpoint.plan_sha256,
        checkpoint_sha256=checkpoint.weights_sha256,
        files=tuple(
            ReleasedFile(r.file, role, r.format, r.quant, r.architecture, r.file_bytes, r.sha256)
            for role, records in sides
            for r in records
        ),
        contents=(),
        kinds={"evaluation": "measured", "parity": "measured", "bench": "measured"},
        versions=dict(sorted(versions.items())),
        config=without_credentials(config.model_dump(mode="json")),
        commands=single_commands(config, figures, {stage.name: stage.threads for stage in stages}),
        stages={stage.name: stage.key for stage in stages},
        seconds={stage.name: stage.seconds for stage in stages},
        warnings=config.warnings,
    )
