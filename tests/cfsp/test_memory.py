"""What does not fit into memory is refused before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp import memory
from cfsp.errors import InputError
from cfsp.models.checkpoint import load_pruned, save_checkpoint
from cfsp.models.offload import enter_blocks
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel, ModelSource
from phoneready.main import main
from runtime_bench.targets.local import find_parent, limited_group

TinyPath = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


def little(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: n_bytes)


def test_a_groups_limit_is_what_may_be_used() -> None:
    try:
        find_parent()
    except InputError as error:
        pytest.skip(str(error))
    code = "import os, sys; open(sys.argv[1], 'w').write('0'); from cfsp.memory import *; "
    code += "print(free_memory())"
    with limited_group(300 * 2**20) as group:
        result = subprocess.run(
            [sys.executable, "-c", code, str(group.processes)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    assert 0 < int(result.stdout) < 300 * 2**20


def test_a_model_that_does_not_fit_is_not_loaded(
    tiny_folder: TinyPath,
    tiny_gguf: Any,
    tiny_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, file = tiny_folder(), tiny_gguf()
    model, tokenizer = tiny_model()
    source = ModelSource(reference="tiny", kind="folder", name="tiny")
    save_checkpoint(LoadedModel(model, tokenizer, source), tmp_path / "checkpoint")
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    little(monkeypatch, 4 * n_weights - 1)
    for reference in (folder, file, tmp_path / "checkpoint"):
        with pytest.raises(InputError, match=r"in float32, takes .* of memory at least.*smaller model"):
            load_model(reference)
    with pytest.raises(InputError, match="in float32"):
        load_pruned(tmp_path / "checkpoint")
    load_pruned(tmp_path / "checkpoint", torch.bfloat16)
    capsys.readouterr()
    assert main(["prune", str(folder), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "of memory at least" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    little(monkeypatch, 4 * n_weights)
    load_model(folder)


def test_windows_whose_hidden_states_do_not_fit(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_model()
    ids = torch.zeros(8, 16, dtype=torch.int64)
    little(monkeypatch, 4 * 64 * ids.numel() - 1)
    with pytest.raises(InputError, match=r"8 windows of 16 tokens takes .*fewer windows"):
        enter_blocks(model, list(model.model.layers), ids)
