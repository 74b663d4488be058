"""Running a module of this tool in a Python of its own."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path


def python_module(name: str) -> list[str]:
    """The command that runs a module in a Python like this one."""
    return [sys.executable, "-P", "-m", name]


_WAITING, _OURS = "OMP_WAIT_POLICY", "PHONEREADY_OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Let OpenMP threads of children and libraries loaded later sleep while they wait, unless users say otherwise."""
    if _WAITING not in os.environ:
        os.environ.update({_WAITING: "passive", _OURS: "1"})


def measured_environment() -> dict[str, str]:
    """`child_environment` for what is measured, whose threads wait as they do by default."""
    environment = child_environment()
    if environment.pop(_OURS, None):
        environment.pop(_WAITING, None)
    return environment


def child_environment() -> dict[str, str]:
    """This environment, with this package importable whatever the working directory is."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = dict(os.environ)
    # In PYTHONPATH site-packages would come before the standard library.
    if root not in (*site.getsitepackages(), site.getusersitepackages()):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([root, known] if known else [root])
    return environment
