"""manifest.json: what a release made, from what, how, and with what; and whether a folder still is that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from cfsp.errors import InputError, without_credentials
from cfsp.files import sha256_file
from cfsp.models.checkpoint import CheckpointInfo
from cfsp.models.shape import ModelShape
from cfsp.models.source import ModelSource
from cfsp.records import read_record, tool_version
from cfsp.validation import WhereSet
from phoneready.publish.contents import SUMS_FILE, Content, Problem, find_problems, read_sums
from phoneready.publish.single_commands import single_commands
from phoneready.release.results import ReleaseFigures
from phoneready.release.stages import StageRecord
from phoneready.settings.schema import ReleaseConfig

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class ReleasedFile:
    """A GGUF file, or the folder of an ONNX variant: then bytes are of graph and weights, and the hash is the graph's,
    whose metadata has the hash of the weights. `role` is `pruned` or `dense`, `architecture` the runtime's name."""

    file: str
    role: str
    format: str
    quant: str
    architecture: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ReleaseManifest:
    """manifest.json.

    Attributes:
        source: The dense model, whose licence the files inherit.
        shape: Of the pruned model.
        contents: Every file of the release but this one and SHA256SUMS, with its hash.
        kinds: How each group of figures came about.
        config: The configuration, without the credentials of URLs in it.
        commands: Single commands that make the pruned files.
        stages: Stage -> its key.
        seconds: Stage -> its duration.
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
    """The manifest of a finished release, still without its contents."""
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


def verify_release(folder: Path) -> tuple[int, list[Problem]]:
    """Check a release folder, with or without `stages`; every byte of it is read.

    Returns:
        The number of files that were checked, and what is wrong with them.

    Raises:
        InputError: There is no release, or nothing in it can be trusted enough to check the rest.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    sums = read_sums(folder)
    if MANIFEST_FILE not in sums:
        raise InputError(f"{folder / SUMS_FILE} does not list {MANIFEST_FILE}")
    if not (folder / MANIFEST_FILE).is_file():
        return len(sums) + 1, [Problem(MANIFEST_FILE, "is missing")]
    manifest_sha256 = sha256_file(folder / MANIFEST_FILE)
    if manifest_sha256 != sums[MANIFEST_FILE]:
        # What it says of other files is worth nothing; the list of hashes still is checked.
        contents = [Content(path, -1, sha256) for path, sha256 in sums.items()]
        return len(sums) + 1, find_problems(folder, contents)
    manifest = read_record(ReleaseManifest, folder / MANIFEST_FILE)
    listed = {content.path: content.sha256 for content in manifest.contents}
    problems = [
        Problem(path, f"has other hashes in {MANIFEST_FILE} and {SUMS_FILE}")
        for path in sorted({*listed, *sums} - {MANIFEST_FILE})
        if listed.get(path) != sums.get(path)
    ]
    problems += [
        Problem(file.file, f"has other hashes in two places of {MANIFEST_FILE}")
        for file in manifest.files
        if file.sha256 not in {h for path, h in listed.items() if f"{path}/".startswith(f"{file.file}/")}
    ]
    itself = Content(MANIFEST_FILE, (folder / MANIFEST_FILE).stat().st_size, manifest_sha256)
    return len(sums) + 1, problems + find_problems(folder, [*manifest.contents, itself])
