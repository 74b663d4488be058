"""A family of another distribution is pruned and exported, and its file is read, by its one row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE = "seed_oss = seed_oss:FAMILY\n"


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Path:
    """A folder of a model type that no row of ours has."""
    folder = tiny_folder("qwen2", tied=False)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "seed_oss", "attention_bias": True, "attention_out_bias": False}
    (folder / "config.json").write_text(json.dumps(config | own | {"architectures": ["SeedOssForCausalLM"]}))
    return folder


def phoneready(site: Path, *arguments: Any) -> str:
    """What a command says, with the distributions of a folder installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, "-m", "phoneready", *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr + f"status {result.returncode}"


def test_a_family_by_entry_point(model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if "seed_oss" not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no such model type")
    site, info = tmp_path / "site", tmp_path / "site" / "seed-1.0.dist-info"
    sizes = ("--set", "nsamples=4", "--set", "seqlen=32", "--prune-ratio", "0.25", "-o", tmp_path / "pruned")
    assert "unsupported architecture (got 'seed_oss')" in phoneready(site, "prune", model, *sizes)
    info.mkdir(parents=True)
    shutil.copy(ROOT / "tests/plugins/seed_oss.py", site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: seed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[phoneready.families]\n{LINE}")
    assert phoneready(site, "prune", model, *sizes).endswith("status 0")
    files = tmp_path / "files"
    exported = phoneready(site, "quantize", tmp_path / "pruned", "--to", "f32", "-o", files, "--text", "none")
    assert exported.endswith("status 0"), exported
    (file,) = files.rglob("*.gguf")
    # A file of it is loaded as its row says, too.
    again = phoneready(site, "prune", file, *sizes[:-1], tmp_path / "again")
    assert again.endswith("status 0"), again
    (info / "entry_points.txt").write_text(f"[phoneready.families]\n{LINE.replace('FAMILY', '__name__')}")
    said = phoneready(site, "prune", model, *sizes[:-1], tmp_path / "wrong")
    assert "plugin seed_oss of seed 1.0 is of type str" in said
