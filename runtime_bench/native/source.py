"""llama.cpp's source, out of the archive that llama-cpp-python is published as."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cfsp.errors import InputError
from cfsp.files import atomic_file, sha256_file
from cfsp.models.builtin import DownloadError, cache_directory, download_distribution
from cfsp.progress import Progress, no_progress

_DISTRIBUTION = "llama-cpp-python"
_DEFAULT_VERSION = "0.3.36"
ALLOWED = "PHONEREADY_LLAMA_SHA256"
"""Variable with the hash of an archive that is trusted besides those that are known."""
_KNOWN = Path(__file__).with_name("llama_source.sha256")
"""Archives whose content is known, as sha256sum writes them; tools/llama_wheel.py reads it, too."""
_WANTED = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "licenses", "src", "vendor")
"""What of llama.cpp's folder the libraries are compiled from."""


@dataclass(frozen=True)
class LlamaSource:
    """A source archive."""

    path: Path
    version: str  # Of llama-cpp-python
    sha256: str  # Of the file


def fetch_source(progress: Progress = no_progress) -> LlamaSource:
    """The archive of the llama-cpp-python that is installed, or else of the version that is known here.

    It is kept in the cache, where the environment's own build (tools/llama_wheel.py) leaves it too.

    Raises:
        InputError: It cannot be fetched, or is not known by its hash.
    """
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = _DEFAULT_VERSION
    path = cache_directory() / "wheels" / f"llama_cpp_python-{version}.tar.gz"
    if not path.is_file():
        progress(f"fetching the source of {_DISTRIBUTION}", 0, 1)
        _download(version, path)
        progress(f"fetching the source of {_DISTRIBUTION}", 1, 1)
    sha256 = sha256_file(path)
    pairs = (line.split() for line in _KNOWN.read_text(encoding="ascii").splitlines())
    known = {name: digest for digest, name in pairs}
    if sha256 not in (known.get(path.name), os.environ.get(ALLOWED)):
        raise InputError(
            f"{path} is not an archive that is known here",
            field="sha256",
            value=sha256,
            allowed=f"{', '.join(map(' '.join, known.items()))}, or what {ALLOWED} says",
        )
    return LlamaSource(path, version, sha256)


def extract_llama(source: LlamaSource, folder: Path) -> Path:
    """Unpack what the libraries are compiled from into `folder`; returns llama.cpp's own folder there.

    Raises:
        InputError: The archive is damaged, or carries no llama.cpp.
    """
    place = PurePosixPath(source.path.name.removesuffix(".tar.gz")) / "vendor" / "llama.cpp"
    wanted = [place / name for name in _WANTED]
    try:
        with tarfile.open(source.path) as archive:
            members = [m for m in archive if any(map(PurePosixPath(m.name).is_relative_to, wanted))]
            archive.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{source.path} cannot be unpacked: {error}") from error
    llama_folder = folder / place
    if not (llama_folder / "CMakeLists.txt").is_file():
        raise InputError(f"{source.path} carries no llama.cpp")
    return llama_folder


def _download(version: str, destination: Path) -> None:
    requirement = f"{_DISTRIBUTION}=={version}"
    with tempfile.TemporaryDirectory(prefix="phoneready-") as scratch:
        try:
            archive = download_distribution(
                requirement, Path(scratch), "--no-binary", _DISTRIBUTION, pattern="*.tar.gz"
            )
        except DownloadError as error:
            raise InputError(
                f"the source of {requirement} could not be fetched from PyPI by pip: {error}"
            ) from error
        with atomic_file(destination) as temporary:
            shutil.copyfile(archive, temporary)
