"""manifest.json and SHA256SUMS: what a release made, from what, how, and with what; and whether a folder still is that.

SHA256SUMS lists every file of the release, manifest.json too, so that `sha256sum -c SHA256SUMS` checks a release
where phoneready is not. It is no signature: who can change a file can change it as well; sign it where that matters.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, NamedTuple

from cfsp.errors import InputError, without_credentials
from cfsp.files import sha256_file
from cfsp.models.checkpoint import CheckpointInfo
from cfsp.models.offload import AUTO
from cfsp.models.shape import ModelShape
from cfsp.models.source import ModelSource
from cfsp.records import read_record, tool_version
from cfsp.recovery.settings import reads_teacher
from cfsp.settings import declared, pick
from cfsp.validation import WhereSet
from exporters.families import ExportSettings, find_format, makes_gguf
from phoneready.figures.figures import DENSE, SHIPPED
from phoneready.release.results import ReleaseFigures
from phoneready.release.stages import StageRecord
from phoneready.settings.schema import ReleaseConfig

MANIFEST_FILE = "manifest.json"
SUMS_FILE = "SHA256SUMS"
_KEPT_APART = ("stages", ".phoneready.lock", "history.jsonl", SUMS_FILE)
"""Kept beside a release: what the pipeline goes on from, figures of the releases before, and the list itself."""
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class ReleasedFile:
    """A GGUF file, or the folder of an ONNX variant: then bytes are of graph and weights, and the hash is the graph's,
    whose metadata has the hash of the weights. `role` is `shipped` or `dense`, `architecture` the runtime's name."""

    file: str
    role: str
    format: str
    quant: str
    architecture: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Content:
    """A file of a release: its path from the release folder with slashes, size, and hash."""

    path: str
    bytes: int
    sha256: str


class Problem(NamedTuple):
    """A file that is not as its release says, and how."""

    path: str
    reason: str


@dataclass(frozen=True)
class ReleaseManifest:
    """manifest.json: the dense model, whose licence the files inherit, the shape that ships, and all that made it.

    `contents` are all files but this one and SHA256SUMS, `commands` make what ships, `stages` have their keys.
    """

    KIND: ClassVar[str] = "release-manifest"
    SCHEMA_VERSION: ClassVar[int] = 5

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
    sides = ((SHIPPED, figures.shipped), (DENSE, figures.dense))
    runtimes = ", ".join(dict.fromkeys(record.runtime for record in figures.shipped))
    versions = checkpoint.versions | {"phoneready": tool_version(), "runtime": runtimes}
    return ReleaseManifest(
        source=figures.source,
        license=figures.source.license,
        seed=config.seed,
        prune_ratio=config.prune.prune_ratio,
        removed_ffn_share=1 - figures.plan.keep_ratio if figures.plan else 0.0,
        shape=checkpoint.shape,
        plan_sha256=checkpoint.plan_sha256,
        checkpoint_sha256=checkpoint.weights_sha256,
        files=tuple(
            ReleasedFile(r.file, role, r.format, r.quant, r.architecture, r.file_bytes, r.sha256)
            for role, records in sides
            for r in records
        ),
        contents=(),
        versions=dict(sorted(versions.items())),
        config=without_credentials(config.model_dump(mode="json")),
        commands=single_commands(config, figures, {stage.name: stage.threads for stage in stages}),
        stages={stage.name: stage.key for stage in stages},
        seconds={stage.name: stage.seconds for stage in stages},
        warnings=config.warnings,
    )


def verify_release(folder: Path) -> tuple[int, list[Problem]]:
    """The number of files that were checked, and what is wrong with them; every byte is read, `stages` may be missing.

    Raises InputError if there is no release, or nothing in it can be trusted enough to check the rest.
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


def describe_files(folder: Path, names: Iterable[str], known: Mapping[str, str]) -> tuple[Content, ...]:
    """Size and hash of files, and of all files in folders, in order of their paths."""
    paths: set[Path] = set()
    for name in names:
        path = folder / name
        paths |= {path} if path.is_file() else {file for file in path.rglob("*") if file.is_file()}
    contents = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        contents.append(Content(name, path.stat().st_size, known.get(name) or sha256_file(path)))
    return tuple(sorted(contents, key=lambda content: content.path))


def read_sums(folder: Path) -> dict[str, str]:
    file = folder / SUMS_FILE
    try:
        # Bytes first: reading as text would take several characters for ends of lines.
        *lines, last = file.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{file} does not exist: {folder} is no finished release") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text") from error
    sums = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or not is_inside(match[2]):
            raise InputError(f"{file}, line {number} is no hash and file of the folder")
        sums[match[2]] = match[1]
    if last:
        raise InputError(f"{file} does not end with a whole line")
    return sums


def find_problems(folder: Path, contents: Iterable[Content]) -> list[Problem]:
    """Changed, missing and further files of a folder, in order of their paths; every byte is read."""
    expected = {content.path: content for content in contents}
    present = {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    further = {path.as_posix() for path in present if path.parts[0] not in _KEPT_APART} - set(expected)
    problems = [Problem(path, "is not of this release") for path in further]
    for name, content in expected.items():
        path, reason = folder / name, ""
        if not is_inside(name):
            reason = "is no path inside a release"
        elif path.is_symlink() or not path.is_file():
            reason = "is not a regular file" if path.is_symlink() or path.exists() else "is missing"
        elif content.bytes >= 0 and (size := path.stat().st_size) != content.bytes:
            reason = f"has {size} bytes instead of {content.bytes}"
        elif sha256_file(path) != content.sha256:
            reason = "has changed: its SHA-256 is another"
        problems += [Problem(name, reason)] if reason else []
    return sorted(problems, key=lambda problem: problem.path)


def is_inside(path: str) -> bool:
    """Whether a path stays in the folder that it is read from."""
    parts = PurePosixPath(path)
    return bool(path) and "\\" not in path and not parts.is_absolute() and ".." not in parts.parts


def single_commands(
    config: ReleaseConfig, figures: ReleaseFigures, threads: Mapping[str, int | None]
) -> tuple[str, ...]:
    """A release as single commands; the last one writes its model files, byte for byte, with its stages' threads."""
    asked, model, made = config.prune, config.model, config.quantize.names
    seed: tuple[object, ...] = ("--set", f"seed={config.seed}")
    opened = [] if model.device == "auto" else ["--device", model.device]
    kept = [] if model.dtype == AUTO else ["--set", f"dtype={model.dtype}"]

    commands: dict[str, tuple[object, ...]] = {}
    final = model.reference
    if figures.plan is not None:
        # Without a name one of GGUF is meant.
        named = asked.for_quant or (() if makes_gguf(made) else made)
        pruning = dataclasses.replace(asked, align=figures.plan.settings.align, for_quant=named)
        words = _words(pruning, set() if asked.vocabulary else {"vocabulary_text"})
        weights = [] if model.dtype == pruning.dtype else ["--set", f"weights_dtype={model.dtype}"]
        final = "checkpoint"
        commands["prune"] = ("prune", model.reference, "-o", final, *words, *weights, *seed, *opened)
    if (training := config.recover) is not None:
        settings = dataclasses.replace(training, patience=training.patience or 0, report_to=())
        teacher = ["--teacher", model.reference] if reads_teacher(training, training.texts) else []
        words = (*teacher, *_words(settings))
        commands["recover"] = ("recover", final, "-o", "recovered", *words, *seed, *opened)
        final = "recovered"
    judging = config.evaluate.settings(config.seed + 1, figures.evaluation.prompts)
    no_text = [] if judging.text or judging.chats else ["--text", "none"]
    words = (*_words(judging), *opened, *kept, *no_text)
    against = ("--against", model.reference) if figures.plan else ()
    commands["evaluate"] = ("eval", final, *against, *words)
    record = figures.shipped[0]
    name = record.file.removesuffix(".gguf").removesuffix(f"-{record.quant}")
    exporting = pick(ExportSettings, config.quantize, name=name, seed=config.seed, rounding_windows=None)
    if any("calibration" in find_format(one).reads for one in made):
        exporting = dataclasses.replace(
            exporting, calibration=asked.calibration, nsamples=asked.nsamples, seqlen=asked.seqlen,
            rounding_windows=config.quantize.rounding_windows, dense=model.reference if figures.plan else None,
        )  # fmt: skip
    commands["export"] = ("quantize", final, "-o", "exports", *_words(exporting), *opened, *kept)
    return tuple(
        shlex.join(map(str, ("phoneready", *command, *(("--threads", count) if count else ()))))
        for command, count in ((command, threads.get(stage)) for stage, command in commands.items())
    )


def _words(settings: object, without: Collection[str] = ()) -> Iterable[object]:
    """Settings as command-line options; what is None, empty or in `without` is left to the command's default."""
    for row in (row for row in declared(type(settings)) if row.name not in without):
        value, rare = getattr(settings, row.name), row.setting.rare
        if isinstance(value, bool) and not rare:
            yield from [] if value == row.default else row.options[-1:]
            continue
        for one in filter(None, row.written(value)):
            yield from ("--set", f"{row.name}={one}") if rare else (row.options[-1], one)
