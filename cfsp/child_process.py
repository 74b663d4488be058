"""Running a module of this tool in a Python of its own."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path


def python_module(name: str) -> list[str]:
    """The command that runs a module in a Python like this one."""
    return [sys.executable, "-P", "-m", name]


def child_environment() -> dict[str, str]:
    """This environment, with this package's folder importable whatever the working directory is.

    Folders that Python searches anyway are not repeated: in PYTHONPATH they would come before the standard
    library.
    """
    root = str(Path(__file__).resolve().parent.parent)
    environment = dict(os.environ)
    if root not in (*site.getsitepackages(), site.getusersitepackages()):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([root, known] if known else [root])
    return environment
