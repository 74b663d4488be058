"""`phoneready doctor MODEL`: what it says is what pruning and exports do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from phoneready.main import main

TinyPath = Callable[..., Path]


EXPECTED = """
llama | remove: FFN channels | ok | deci
llama | remove: attentions | ok | deci
llama | remove: blocks | ok | llama
llama | remove: key-value groups | ok | deci
llama | remove: vocabulary | ok | of 384 tokens
llama | GGUF | ok | llama
llama | chats | ok | template
granite | model | ok | llama: 4 blocks
smollm3 | remove: attentions | warning | ONNX alone
smollm3 | remove: blocks | warning | a rope in all blocks but each 4th
gemma3_text | model | ok | a window of 24 in 2 blocks
gemma3_text | remove: key-value groups | warning | as many heads in every block
gemma3_text | remove: blocks | ok | gemma3
gemma4_text | model | ok | FFNs of 128 to 256, 2 key-value heads, each read by 2 in 2 blocks, those of another
gemma4_text | remove: FFN channels | ok | GGUF as gemma4 (--prune-ratio)
gemma4_text | remove: vocabulary | ok | tokens can go
gemma4_text | remove: key-value groups | warning | read keys and values of other blocks
gemma4_text | remove: attentions | warning | read keys and values of other blocks
gemma4_text | remove: blocks | warning | every block has a part of its own
gemma4_text | GGUF | ok | gemma4
gemma4_text | ONNX | warning | no graph is written yet of blocks that read another block's keys
olmo3 | model | ok | a window of 24 in 3 blocks
olmo3 | remove: FFN channels | warning | untied embeddings only
olmo3 | remove: key-value groups | warning | one norm sees all heads
olmo3 | GGUF | warning | untied embeddings only
olmo3 | ONNX | ok | fused graphs
qwen3_5_text | model | ok | 2 key-value heads, each read by 2 in 2 blocks, a gated delta net in 2
qwen3_5_text | remove: key-value groups | warning | few blocks attend
qwen3_5_text | remove: attentions | warning | few blocks attend
qwen3_5_text | remove: blocks | ok | GGUF as qwen35, ONNX (--blocks)
qwen3_5_text | ONNX | ok | fused graphs
"""
"""Family, check, state, and a part of what is said."""


def examined(model: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    assert main(["doctor", str(model), "--json"]) == 0
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_what_a_folder_can_become(tiny_folder: TinyPath, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row.split(" | ") for row in EXPECTED.strip().splitlines()]
    for model_type in dict.fromkeys(row[0] for row in rows):
        checks = examined(tiny_folder(model_type), capsys)
        for family, name, state, part in rows:
            if family == model_type:
                assert checks[name]["state"] == state, (family, checks[name])
                assert part in checks[name]["found"], (family, checks[name])


def test_a_gguf_file_and_a_folder_of_one_model_can_become_the_same(
    tiny_folder: TinyPath, tiny_gguf: TinyPath, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examined(tiny_gguf("gemma3_text"), capsys) == examined(tiny_folder("gemma3_text"), capsys)
    assert examined(tiny_gguf("gemma4_text"), capsys) == examined(tiny_folder("gemma4_text"), capsys)


def test_what_stands_in_the_way_of_a_file(tiny_folder: TinyPath, capsys: pytest.CaptureFixture[str]) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    checks = examined(tiny_folder("llama", rope_parameters=rope), capsys)
    assert checks["GGUF"]["state"] == checks["ONNX"]["state"] == "warning"
    assert "dynamic" in checks["GGUF"]["found"]
    assert "dynamic" in checks["ONNX"]["found"]


def test_no_model_is_one_line(tmp_path: Path, refused: Callable[..., str], tiny_folder: TinyPath) -> None:
    file = tiny_folder() / "model.safetensors"
    weights = {name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert "is quantized (got 'I8'); allowed: float32" in refused("doctor", file.parent)
    assert "none.gguf" in refused("doctor", tmp_path / "none.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}', encoding="utf-8")
    assert "gemma3_text" in refused("doctor", tmp_path)
