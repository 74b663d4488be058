"""Code that a model folder brings along never runs, whatever stands on standard input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def evil(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder whose tokenizer is code of its own."""
    folder = tiny_folder()
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "vocab.json").write_text("{}", encoding="utf-8")
    (folder / "merges.txt").write_text("", encoding="utf-8")
    settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    code = CODE.format(canary=str(tmp_path / "canary"))
    (folder / "evil.py").write_text(code, encoding="utf-8")
    return folder


def test_a_tokenizers_code_does_not_run_where_yes_is_on_standard_input(evil: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "phoneready", "prune", str(evil), "-o", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        line, input="y\n" * 9, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("error:") == 1
    assert result.stderr.splitlines()[-1].startswith("error:")
    assert "a folder with tokenizer.json" in result.stderr
    assert not (tmp_path / "canary").exists()
