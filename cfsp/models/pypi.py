"""Distributions from PyPI, fetched by pip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class DownloadError(Exception):
    """pip fetched nothing; the text is its reason."""


def download_distribution(requirement: str, folder: Path, *options: str, pattern: str) -> Path:
    """Fetch one distribution, without what it depends on.

    Args:
        requirement: Such as `name==1.0`.
        folder: Where pip puts it.
        options: Of `pip download`, such as `--only-binary`, `:all:`.
        pattern: Of the file's name.

    Raises:
        DownloadError: It could not be fetched.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", *options, "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    file = next(folder.glob(pattern), None)
    if result.returncode or file is None:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines or ["pip failed"]
        raise DownloadError(errors[-1].strip())
    return file
