"""The npm packages that the page loads: fetched once into the cache, in the versions and with the hashes of
`package-lock.json`."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from cfsp.errors import InputError
from cfsp.files import made_once
from cfsp.models.builtin import cache_directory

FILES = tuple(Path(__file__).with_name(name) for name in ("package.json", "package-lock.json"))
_TIMEOUT_S = 600


def fetch_packages() -> Path:
    """The folder `node_modules`, from the cache or from the npm registry.

    Raises:
        InputError: npm is not installed, cannot fetch them, or fetched something else than the lock has.
    """
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()[:12]
    folder = cache_directory() / "browser" / wanted
    return made_once(folder, Path.is_dir, _install) / "node_modules"


def _install(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            "npm is not installed; it fetches onnxruntime-web and wllama once, for the browser",
            allowed="Node.js with npm in PATH",
        )
    for file in FILES:
        shutil.copy(file, folder)
    # No package of these has to run anything to be installed.
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
    try:
        done = subprocess.run(
            [npm, "ci", *options],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"npm did not fetch the browser's packages within {_TIMEOUT_S} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise InputError(f"npm cannot fetch the browser's packages: {lines[-1][:200]}")
